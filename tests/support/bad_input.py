"""The matrix of bad input: each mistake as real files, and what a site says of it, word by word.

`python tests/support/bad_input.py` prints the table of docs/guides/data.md; a test holds the two together.
"""

import io
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import soundfile

from shared import records, tasks
from shared.errors import DataError
from shared.records import Layout
from shared.run_config import RunConfig

ROW = {"id": 1, "text": "a good film", "label": "good"}
Make = Callable[[Path], Path]


@dataclass(frozen=True)
class Mistake:
    """A mistake, in words; what makes a data set with it in an empty folder; and of which task and layout that is."""

    what: str
    make: Make
    task: str = "text-classification"
    layout: Layout = field(default_factory=Layout)
    settings: Mapping[str, Any] = field(default_factory=dict)


def said(mistake: Mistake, folder: Path) -> str:
    """Return the error that reading gives, with the folder's own path left out."""
    path = mistake.make(folder)
    labels = LABELS.get(mistake.task)
    labelled = {} if labels is None else {"labels": labels}
    config = RunConfig.model_validate(
        {
            "model": {"name": "any"},
            "task": {"name": mistake.task, **labelled, **mistake.settings},
            "training": {"rounds": 1, "batch_size": 1},
        }
    )
    try:
        records.read(path, tasks.of(config), mistake.layout)
    except DataError as error:
        return str(error).replace(f"{folder}/", "").replace(str(folder), "FOLDER")
    raise AssertionError(f"{mistake.what}: nothing was said")


def table() -> str:
    """Return the table of the guide."""
    lines = ["| what is wrong | what is said |", "| --- | --- |"]
    for mistake in MISTAKES:
        with tempfile.TemporaryDirectory() as folder:
            text = said(mistake, Path(folder)).replace("|", "\\|")
        lines.append(f"| {mistake.what} | `{text}` |")
    return "\n".join(lines) + "\n"


LABELS = {
    **{name: ["bad", "good"] for name in ("text-classification", "image-classification", "audio-classification")},
    "token-classification": ["O", "B-good", "I-good"],
}


# -- how the files are made -----------------------------------------------------------------------------------------


def lines(*rows: dict[str, Any] | str) -> Make:
    """Make records.jsonl."""

    def make(folder: Path) -> Path:
        path = folder / "records.jsonl"
        path.write_text(
            "".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
        return path

    return make


def second(**changes: Any) -> Make:
    """Make records.jsonl of a good row and another one that differs from it by `changes`."""
    return lines(ROW, ROW | {"id": 2} | changes)


def raw(name: str, content: bytes) -> Make:
    """Make a file of these bytes."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def parquet(**columns: list[Any]) -> Make:
    """Make records.parquet."""

    def make(folder: Path) -> Path:
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "records.parquet")
        return folder / "records.parquet"

    return make


def files(**contents: bytes) -> Make:
    """Make a folder of a good image or clip and these files; `__` stands for a folder, and `_` for a dot."""

    def make(folder: Path) -> Path:
        place = folder / "site"
        for name, content in contents.items():
            file = place / name.replace("__", "/").replace("_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return place

    return make


def beside(row: dict[str, Any], **contents: bytes) -> Make:
    """Make records.jsonl of one row, and files beside it."""

    def make(folder: Path) -> Path:
        for name, content in contents.items():
            (folder / name.replace("_", ".")).write_bytes(content)
        return lines(row)(folder)

    return make


def linked(folder: Path) -> Path:
    """Make a folder with a link that leads out of it."""
    (folder / "elsewhere.png").write_bytes(png())
    (folder / "site" / "good").mkdir(parents=True)
    (folder / "site" / "good" / "a.png").symlink_to(folder / "elsewhere.png")
    return folder / "site"


def linked_folder(folder: Path) -> Path:
    """Make a folder with a link to another."""
    (folder / "elsewhere").mkdir()
    (folder / "site").mkdir()
    (folder / "site" / "good").symlink_to(folder / "elsewhere")
    return folder / "site"


def in_parts(folder: Path) -> Path:
    """Make what `datasets.DatasetDict.save_to_disk` writes, as far as it matters."""
    for part in ("test", "train"):
        (folder / "site" / part).mkdir(parents=True)
    (folder / "site" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}', encoding="utf-8")
    return folder / "site"


def png(size: tuple[int, int] = (4, 4), mode: str = "RGB") -> bytes:
    """Return an image."""
    stream = io.BytesIO()
    PIL.Image.new(mode, size).save(stream, "PNG")
    return stream.getvalue()


def noise() -> bytes:
    """Return an image that cannot be packed much."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def tiff() -> bytes:
    """Return an image of floating-point pixels."""
    stream = io.BytesIO()
    PIL.Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(stream, "TIFF")
    return stream.getvalue()


def wav(samples: Any = (0.0, 0.5, -0.5, 0.0) * 100, rate: int = 8000, kind: str = "PCM_16") -> bytes:
    """Return a clip of sound."""
    stream = io.BytesIO()
    soundfile.write(stream, np.asarray(samples, dtype=np.float32), rate, format="WAV", subtype=kind)
    return stream.getvalue()


def hours(count: float, rate: int = 1000) -> bytes:
    """Return a clip of silence, as flac: small for how long it is."""
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros(int(count * 3600 * rate), dtype=np.int16), rate, format="FLAC")
    return stream.getvalue()


ANSWERED = {"id": 1, "question": "How many?", "context": "There are two."}
PICTURE, SOUND, CHAT, QUESTION = "image-classification", "audio-classification", "causal-lm", "question-answering"
TAGGED = {"id": 1, "words": ["a", "film"], "tags": ["O", "B-good"]}

MISTAKES = (
    # Files
    Mistake("no such file", lambda folder: folder / "records.jsonl"),
    Mistake("a file of another format", raw("records.xlsx", b"PK")),
    Mistake("an empty file", raw("records.jsonl", b"")),
    Mistake("a file that is not UTF-8", raw("records.jsonl", b'{"id": 1, "text": "caf\xe9"}\n')),
    Mistake("a line that is not JSON", lines(ROW, "{")),
    Mistake("an empty line", lines(ROW, "")),
    Mistake("a line that is no object", lines(ROW, "[1, 2]")),
    Mistake("a column twice in an object", lines('{"id": 1, "text": "a", "text": "b", "label": "good"}')),
    Mistake("csv: a column twice in the header", raw("records.csv", b"id,text,text,label\n1,a,b,good\n")),
    Mistake("csv: a row of too few values", raw("records.csv", b"id,text,label\n1,a good film\n")),
    Mistake("csv: a quote that nothing ends", raw("records.csv", b'id,text,label\n1,"a good film,good\n')),
    Mistake("csv: another separator", raw("records.csv", b"id;text;label\n1;a good film;good\n")),
    Mistake("parquet: a broken file", raw("records.parquet", b"PAR1 and no more")),
    Mistake("arrow: a broken file", raw("records.arrow", b"ARROW1 and no more")),
    Mistake("a folder of several parts, as `datasets` writes them", in_parts),
    Mistake("a folder without records", files(readme_txt=b"nothing")),
    # Columns, ids, persons
    Mistake("a column that is missing", lines({"id": 1, "label": "good"})),
    Mistake(
        "a column that [dataset.columns] names and that is missing",
        lines(ROW),
        layout=Layout({"text": "note"}),
    ),
    Mistake("no column of ids", lines({"text": "a good film", "label": "good"})),
    Mistake("an id twice", lines(ROW, ROW)),
    Mistake("an id twice, as text and as number", second(id="1")),
    Mistake("an id that is null", second(id=None)),
    Mistake("an id that is no whole number", second(id=1.5)),
    Mistake("an id that is empty", second(id=" ")),
    Mistake("no column of persons", lines(ROW), layout=Layout(unit="patient")),
    Mistake("a person that is null", lines(ROW | {"patient": None}), layout=Layout(unit="patient")),
    # Texts and labels
    Mistake("an empty text", second(text="")),
    Mistake("a text of blanks", second(text=" \t")),
    Mistake("a text that is null", second(text=None)),
    Mistake("a text that is a number", second(text=5)),
    Mistake("a text that is NaN", lines(ROW, '{"id": 2, "text": NaN, "label": "good"}')),
    Mistake("a text that is a list", second(text=["a"])),
    Mistake("a text that is a table", second(text={"a": 1})),
    Mistake("half of a surrogate pair", second(text="\ud800")),
    Mistake("a label that is not declared", second(label="ugly")),
    Mistake("a label that differs in its case", second(label="Good")),
    Mistake("csv: a label with a blank", raw("records.csv", b"id,text,label\n1,a good film, good\n")),
    Mistake("a label that is null", second(label=None)),
    Mistake(
        "parquet: numbers as labels, with a gap (NaN)", parquet(id=[1, 2], text=["a", "b"], label=[1.0, float("nan")])
    ),
    Mistake("several labels where a record has one", second(label=["good", "bad"])),
    Mistake("one label where a record has any number", lines(ROW), settings={"multi_label": True}),
    Mistake("a label twice in one record", lines(ROW | {"label": ["good", "good"]}), settings={"multi_label": True}),
    # Images
    Mistake("an image that is cut off", files(good__a_png=noise()[:-200]), PICTURE),
    Mistake("an image that is none", files(good__a_png=b"no image"), PICTURE),
    Mistake("an empty file as image", files(good__a_png=b""), PICTURE),
    Mistake("an image of too many pixels", files(good__a_png=png((10_000, 8_500), "1")), PICTURE),
    Mistake("an image of floating-point pixels", files(good__a_tiff=tiff()), PICTURE),
    Mistake("a file beside the images that is none", files(good__a_png=png(), good__b_dcm=b"DICM"), PICTURE),
    Mistake("an image in no folder of a label", files(a_png=png()), PICTURE),
    Mistake("an image in the folder of an undeclared label", files(ugly__a_png=png()), PICTURE),
    Mistake("a link that leads out of the data's folder", linked, PICTURE),
    Mistake("a link to a folder", linked_folder, PICTURE),
    Mistake(
        "a path that leads out of the data's folder", beside({"id": 1, "image": "../a.png", "label": "good"}), PICTURE
    ),
    Mistake("a path of a file that is not there", beside({"id": 1, "image": "a.png", "label": "good"}), PICTURE),
    Mistake("a path that is null", beside({"id": 1, "image": None, "label": "good"}), PICTURE),
    Mistake(
        "metadata that name a file that is not there",
        files(a_png=png(), metadata_csv=b"file_name,label\na.png,good\nb.png,bad\n"),
        PICTURE,
    ),
    Mistake(
        "metadata without a row for an image",
        files(a_png=png(), b_png=png(), metadata_csv=b"file_name,label\na.png,good\n"),
        PICTURE,
    ),
    Mistake("metadata without names of files", files(a_png=png(), metadata_csv=b"name,label\na.png,good\n"), PICTURE),
    Mistake(
        "metadata that name a file twice",
        files(a_png=png(), metadata_csv=b"file_name,label\na.png,good\na.png,good\n"),
        PICTURE,
    ),
    # Sound
    Mistake("a clip that is none", files(good__a_wav=b"no sound"), SOUND),
    Mistake("a clip that is cut off", files(good__a_wav=wav()[:400]), SOUND),
    Mistake("a clip without a sample", files(good__a_wav=wav(())), SOUND),
    Mistake("a clip with samples that are no numbers", files(good__a_wav=wav((0.0, np.nan), kind="FLOAT")), SOUND),
    Mistake("a clip of more than an hour", files(good__a_flac=hours(1.1)), SOUND),
    Mistake("a clip of too low a rate", files(good__a_wav=wav(rate=100)), SOUND),
    Mistake(
        "a rate that is not the clip's own",
        beside({"id": 1, "audio": {"path": "a.wav", "sampling_rate": 16_000}, "label": "good"}, a_wav=wav()),
        SOUND,
    ),
    # Lists
    Mistake("as many tags as words, and not", lines(TAGGED | {"tags": ["O"]}), "token-classification"),
    Mistake("an empty list of words", lines(TAGGED | {"words": [], "tags": []}), "token-classification"),
    Mistake("an empty word", lines(TAGGED | {"words": ["a", ""]}), "token-classification"),
    Mistake("a tag that is not declared", lines(TAGGED | {"tags": ["O", "B-bad"]}), "token-classification"),
    Mistake("answers that are no table", lines(ANSWERED | {"answers": ["two"]}), QUESTION),
    Mistake(
        "an answer without its place", lines(ANSWERED | {"answers": {"text": ["two"], "answer_start": []}}), QUESTION
    ),
    Mistake(
        "an answer that is not at its place",
        lines(ANSWERED | {"answers": {"text": ["two"], "answer_start": [3]}}),
        QUESTION,
    ),
    Mistake("an empty conversation", lines({"id": 1, "messages": []}), CHAT),
    Mistake("a message of an unknown role", lines({"id": 1, "messages": [{"role": "boss", "content": "Hm."}]}), CHAT),
    Mistake("a message without content", lines({"id": 1, "messages": [{"role": "user"}]}), CHAT),
    Mistake("a message of empty content", lines({"id": 1, "messages": [{"role": "user", "content": ""}]}), CHAT),
    Mistake(
        "a conversation in which nobody answers",
        lines({"id": 1, "messages": [{"role": "user", "content": "Hm."}]}),
        CHAT,
    ),
)

if __name__ == "__main__":
    sys.stdout.write(table())
