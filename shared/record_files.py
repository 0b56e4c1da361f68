"""Rows of a data set as its files have them: each with the words that an error says of where it stands.

A data set is one file (.jsonl, .csv, .parquet, .arrow), or a folder: of images or clips of sound, of such files, or one
that `datasets.Dataset.save_to_disk` wrote. Rows are read one after another, never all at once, and nothing is written.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.errors import DataError
from shared.record_tables import FORMATS, Broken

Row = tuple[str, dict[str, Any]]  # where it stands, and its values by column

MEDIA = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"),
    "audio": (".wav", ".flac", ".ogg", ".mp3"),
}
METADATA = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"  # the column of the metadata that names a file


def rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file or a folder.

    Raises
    ------
    DataError
        Naming the file and the row.
    """
    if not path.exists():
        raise DataError(f"{path} cannot be read: there is no such file or folder.")
    yield from _folder(path) if path.is_dir() else _file(path)


def base(path: Path) -> Path:
    """Return the folder in which the files that rows name lie."""
    return path if path.is_dir() else path.parent


def _file(path: Path) -> Iterator[Row]:
    reader = FORMATS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} cannot be read: {path.suffix or 'no suffix'!r} is none of {', '.join(FORMATS)}.")
    number = 0
    try:
        for number, values in enumerate(reader(path), 1):
            yield f"{path}, row {number}", values
    except Broken as error:
        raise DataError(f"{path}, row {number + 1}: {error}.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _folder(path: Path) -> Iterator[Row]:
    if (path / "dataset_dict.json").exists():
        parts = ", ".join(sorted(part.name for part in path.iterdir() if part.is_dir()))
        raise DataError(f"{path} holds several parts ({parts}); name the folder of one.")
    if (path / "state.json").exists():
        yield from _saved(path)
        return
    files = list(walk(path))
    media = [file for file in files if _medium(file)]
    if media:
        yield from _media(path, files)
        return
    tables = [file for file in files if file.suffix.lower() in FORMATS and file.parent == path]
    if not tables:
        raise DataError(f"{path} holds neither images nor clips of sound nor files of {', '.join(FORMATS)}.")
    for table in tables:
        yield from _file(table)


def _saved(path: Path) -> Iterator[Row]:
    """Read what `datasets.Dataset.save_to_disk` wrote."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        parts = [path / Path(part["filename"]).name for part in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path} cannot be read: its state.json is not what datasets.save_to_disk writes.") from None
    for part in parts:
        yield from _file(part)


def walk(path: Path) -> Iterator[Path]:
    """Yield the files under a folder by their names; what begins with a dot is none of them.

    Raises
    ------
    DataError
        Where a folder is a link, or cannot be read.
    """
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and entry.is_dir():
            raise DataError(f"{entry.path} is a link to a folder; put the folder itself there.")
        if entry.is_dir():
            yield from walk(Path(entry.path))
        else:
            yield Path(entry.path)


def _medium(file: Path) -> str | None:
    return next((kind for kind, suffixes in MEDIA.items() if file.suffix.lower() in suffixes), None)


def _media(path: Path, files: list[Path]) -> Iterator[Row]:
    """Yield a row a file: its path as `image` or `audio` and as `id`, its folder's name as `label`, and its metadata."""
    tables = [path / name for name in METADATA if path / name in files]
    if not tables:
        strange = [file for file in files if not _medium(file)]
        if strange:
            raise DataError(
                f"{strange[0]} is neither an image nor a clip of sound by its suffix; take it out of {path}, or begin its "
                "name with a dot."
            )
        for file in files:
            name = file.relative_to(path).as_posix()
            yield f"{path}, file {name!r}", _described(name)
        return
    if len(tables) > 1:
        raise DataError(f"{path} holds both {' and '.join(METADATA)}; keep one.")
    left = {file.relative_to(path).as_posix() for file in files if _medium(file)}
    for where, values in _file(tables[0]):
        named = values.get(FILE_NAME)
        if not isinstance(named, str) or not _medium(Path(named)):
            raise DataError(f"{where}: {FILE_NAME!r} names no image and no clip of sound.")
        left.discard(Path(named).as_posix())
        yield where, _described(Path(named).as_posix()) | values
    if left:
        raise DataError(f"{tables[0]} has no row for {min(left)!r}; add one, or take the file out.")


def _described(name: str) -> dict[str, Any]:
    place = Path(name)
    described: dict[str, Any] = {"id": name, str(_medium(place)): name}
    return described | {"label": place.parent.name} if place.parent.name else described
