"""Where the virtual sites' records come from: the built-in data, or a folder of one's own.

Tables are copied into the run's folder. Images and clips of sound are not: the site's site.toml names them where they lie,
so that they must stay there until the run has ended. The public test set is copied whole, under the task's own columns.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from client import data
from client.site import Dataset
from server.job import TEST_FILE, TEST_FOLDER
from shared import records, tasks
from shared.errors import ConfigError
from shared.media import Clip, Image
from shared.record_files import FILE_NAME, MEDIA, METADATA
from simulations import vader
from simulations.pool_columns import POOL, find, path
from simulations.scenario import Scenario


class Origin(Protocol):
    """The records of a scenario's sites."""

    def units(self, site: str, dataset: Dataset) -> int:
        """How many units a site has; every record is checked.

        Raises
        ------
        DataError
            Naming the row.
        """

    def lay_out(self, site: str, place: Path) -> Path:
        """Put a site's records into its folder `place`; return what its site.toml says of where they are."""

    def lay_out_test(self, folder: Path) -> None:
        """Put the public test set, where there is one, into the run's folder."""


def of(scenario: Scenario) -> Origin:
    """Return the scenario's.

    Raises
    ------
    ConfigError, DataError
        Where it has no records for a site.
    """
    return BuiltIn(scenario) if scenario.data.source == "vader" else Folder(scenario)


class BuiltIn:
    """The four domains of the vader data, a site each."""

    def __init__(self, scenario: Scenario) -> None:
        names = [site.name for site in scenario.sites] if scenario.partition is None else list(vader.DOMAINS)
        unknown = sorted(set(names) - vader.DOMAINS.keys())
        if unknown:
            raise ConfigError(f"sites: {unknown[0]!r} is not a domain of the vader data ({', '.join(vader.DOMAINS)}).")
        held, kept = vader.split(vader.sentences())
        self._held = held | {POOL: [sentence for name in held for sentence in held[name]]}
        # Not by domain, so that any first part of the test set is like the whole.
        self._test = sorted(
            (sentence for name in names for sentence in kept[name]),
            key=lambda sentence: hashlib.sha256(sentence.id.encode()).digest(),
        )

    def units(self, site: str, dataset: Dataset) -> int:  # noqa: ARG002 - of the protocol
        """How many sentences of a domain are no test records."""
        return len(self._held[site])

    def lay_out(self, site: str, place: Path) -> Path:
        """Write a domain's sentences."""
        _write(place / "records.jsonl", map(_row, self._held[site]))
        return Path("records.jsonl")

    def lay_out_test(self, folder: Path) -> None:
        """Write all sites' test sentences."""
        _write(folder / TEST_FILE, map(_row, self._test))


class Folder:
    """SITE.jsonl, .csv, .parquet or .arrow for each site, or a folder SITE; and `test`, in any of these forms, or none."""

    def __init__(self, scenario: Scenario) -> None:
        self._folder = scenario.data.folder or Path()
        self._task = tasks.of(scenario.run_config())
        self._layout = scenario.data.layout()
        self._in_files = any(column.kind in MEDIA for column in self._task.columns.values())
        names = [site.name for site in scenario.sites] if scenario.partition is None else [POOL]
        self._sites = {name: path(scenario, name) for name in names}
        self._test = find(self._folder, "test")
        for _ in self._test_records():
            pass  # each is looked at

    def units(self, site: str, dataset: Dataset) -> int:
        """Read the site's records, and count those whose they are."""
        own = dataset.model_copy(update={"path": self._sites[site]})
        return len({record.unit for record in data.read(own, self._task)})

    def lay_out(self, site: str, place: Path) -> Path:
        """Copy a table; name what holds images or sound, and folders."""
        found = self._sites[site]
        if self._in_files or found.is_dir():
            return found.resolve()
        copy = Path(f"records{found.suffix.lower()}")
        shutil.copyfile(found, place / copy)
        return copy

    def lay_out_test(self, folder: Path) -> None:
        """Write the test records anew, and their images or clips beside them."""
        if self._test is None:
            return
        if not self._in_files:
            _write(folder / TEST_FILE, (record.values for record in self._test_records()))
            return
        place = folder / TEST_FOLDER
        place.mkdir()
        rows = (_with_files(number, record.values, place) for number, record in enumerate(self._test_records(), 1))
        _write(place / METADATA[0], rows)

    def _test_records(self) -> Iterator[records.Record]:
        if self._test is not None:
            yield from records.each(self._test, self._task, self._layout, identified=False)


def _row(sentence: vader.Sentence) -> dict[str, Any]:
    return {"id": sentence.id, "text": sentence.text, "label": sentence.label}


def _with_files(number: int, values: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Copy what a record has in files; return its row of the metadata."""
    row: dict[str, Any] = {}
    for role, value in values.items():
        if isinstance(value, Image | Clip):
            name = f"{number:06d}{value.suffix}"
            (place / name).write_bytes(value.source.read())
            row |= {FILE_NAME: name}
        else:
            row[role] = value
    return row


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(dict(row), ensure_ascii=False) + "\n")
