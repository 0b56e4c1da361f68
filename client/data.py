"""The site's dataset: read, check, split, encode.

Nothing of it leaves this module but examples for training and evaluation on this machine. A row that
breaks the declaration is an error with its number, before the site joins; the error stays at the site.
"""

import hashlib
import hmac
import inspect
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from client.cache import Cache, references
from client.digests import Digests
from client.encoded import Writer
from client.site import Dataset, Site, split_key
from shared import record_files, records
from shared.errors import DataError, let_interrupts_through
from shared.examples import Examples
from shared.media import Clip, Image
from shared.records import Record
from shared.tasks.base import Chunks, Encoded, Task

log = logging.getLogger("moonflower.site")

PARTS = ("train", "validation")
PACKAGES = (
    "numpy",
    "pillow",
    "scipy",
    "soundfile",
    "tokenizers",
    "transformers",
)  # whose code makes numbers of a record


@dataclass(frozen=True)
class Parts:
    """A site's units by part. A unit, with all its records, is in one part for the dataset's whole life.

    `references` are the digests of the files that records name beside the data set's own.
    """

    train: Examples
    validation: Examples
    references: Mapping[str, str]


def read(dataset: Dataset, task: Task) -> Iterator[Record]:
    """Read the records one after another, each checked against what the site and the run declare.

    Raises
    ------
    DataError
        Naming the row.
    """
    return records.each(dataset.path, task, dataset.layout(), labels=dataset.labels)


def is_validation(unit: str, key: bytes, share: float) -> bool:
    """Whether a unit is kept for validation: a keyed hash of its own id and nothing else."""
    value = int.from_bytes(hmac.digest(key, unit.encode(), "sha256")[:8], "big")
    return value < share * 2**64


def load(site: Site, task: Task, processor: Any, digests: Digests) -> Parts:
    """Return a site's records, split and encoded: from its cache, or read and put there.

    Raises
    ------
    DataError
        Naming the row, where a record is at fault; or where the cache cannot be used.
    """
    dataset, key = site.dataset, split_key(site)
    content = digests.of(dataset.path)

    def make(folder: Path) -> set[Path]:
        named = _encode(dataset, task, key, processor, digests, folder)
        if digests.of(dataset.path) != content or digests.each(map(Path, named)) != named:
            raise DataError(f"{dataset.path} has changed while it was read; start when nothing writes to it any more.")
        return {Path(name) for name in named}

    entry = Cache(site.cache, dataset.id).get(content, _made_of(dataset, task, key, processor), digests, make)
    train, validation = (Examples.open(task, processor, entry / part) for part in PARTS)
    return Parts(train, validation, references(entry))


def _encode(dataset: Dataset, task: Task, key: bytes, processor: Any, digests: Digests, folder: Path) -> dict[str, str]:
    """Write both parts; return the files that the records name, as they were before they were encoded."""
    strange, named = 0, dict[str, str]()
    widest = task.widest(processor)
    places = [folder / part for part in PARTS]
    for place in places:
        place.mkdir()
    with Writer(places[0], task) as train, Writer(places[1], task) as validation:
        for record in read(dataset, task):
            media = (value for value in record.values.values() if isinstance(value, Image | Clip))
            named = digests.each(value.source.path for value in media if value.source.path is not None) | named
            encoded = _encoded(record, task, processor)
            encoded = encoded if encoded is not None and _goes_through(encoded, task, widest) else None
            strange += encoded is None
            writer = validation if is_validation(record.unit, key, dataset.validation) else train
            writer.add(record.unit, task.stand_in(record.values) if encoded is None else encoded)
    if strange:
        log.warning("the run's processor cannot take %d records", strange)
    return named


def _encoded(record: Record, task: Task, processor: Any) -> Encoded | Chunks | None:
    """Encode a record alone; None where the run's processor cannot take it, for which it gets a stand-in.

    A refusal would tell the coordinator, which chose the processor, that there is such a record.
    """
    try:
        return task.encode(record.values, processor)
    except BaseException as error:  # whatever it is: a tokenizer that panics raises no `Exception`
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        let_interrupts_through(error)
        return None


def _goes_through(encoded: Encoded | Chunks, task: Task, widest: Encoded) -> bool:
    """Whether what the network reads is no longer than the widest record, which it took when it was loaded, and of no higher token.

    A tokenizer that puts more tokens around a text than `task.max_length` leaves room for cuts nothing, without a word: the
    model would fail on long texts alone.
    """
    rows = encoded if isinstance(encoded, list) else [encoded]
    read = [(name, row[name]) for row in rows for name in task.inputs if name in widest]
    return all(
        len(array) <= len(widest[name]) and (name != "input_ids" or array.max(initial=0) <= widest[name].max())
        for name, array in read
    )


def _made_of(dataset: Dataset, task: Task, key: bytes, processor: Any) -> str:
    """Return a digest of what decides, beside the files, what is kept of the records: declaration, split, task and code."""
    declared = dataset.model_dump(
        mode="json", include={"labels", "columns", "label_names", "unit_column", "validation"}
    )
    said = [
        str(record_files.base(dataset.path).absolute()),  # where the files lie that records name
        json.dumps([declared, task.name, task.settings.model_dump(mode="json"), _own(task)], sort_keys=True),
        hashlib.sha256(key).hexdigest(),
        _processor_digest(processor),
        *(f"{package} {version(package)}" for package in PACKAGES),
        *_code(task),
    ]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def _own(task: Task) -> dict[str, Any]:
    """What a task has worked out for itself, from the model say."""
    return {name: value for name, value in vars(task).items() if isinstance(value, int | float | str | list | tuple)}


def _processor_digest(processor: Any) -> str:
    with tempfile.TemporaryDirectory() as place:
        processor.save_pretrained(place)
        for file in Path(place).glob("tokenizer.json"):  # how it last cut and padded is in there too
            saved = json.loads(file.read_text(encoding="utf-8")) | {"truncation": None, "padding": None}
            file.write_text(json.dumps(saved), encoding="utf-8")
        return Digests().of(Path(place))


def _code(task: Task) -> list[str]:
    """Digests of the modules that a record goes through."""
    here = Path(inspect.getfile(records)).parent
    modules = {Path(__file__), Path(inspect.getfile(Writer)), here / "examples.py", here / "media.py"}
    modules |= {*here.glob("record*.py"), *(here / "tasks").glob("*.py")}
    modules |= {Path(inspect.getfile(kind)) for kind in type(task).__mro__[:-1] if kind.__module__ != "abc"}
    digests = Digests()
    return [f"{module.name} {digests.of(module)}" for module in sorted(modules)]
