"""Records to predict: from a file, a folder of images or clips, or standard input; each checked, with its row in every error."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from shared import record_files, record_kinds
from shared.errors import DataError, Fault

STDIN = "-"
ONE_TEXT = ".txt"
NO_LABEL = "a record to predict holds no label"
ROLES: dict[str, dict[str, str]] = {  # plain code -> what a record has, and its kind; of several forms one
    "texts": {"text": "text", "pair": "text"},
    "words": {"words": "words"},
    "answers": {"question": "text", "context": "text"},
    "images": {"image": "image"},
    "sounds": {"audio": "audio"},
    "writing": {"prompt": "text", "text": "text", "messages": "messages"},
    "rewriting": {"source": "text"},
    "dictation": {"audio": "audio"},
}
NEEDED = {"texts": ("text",), "writing": ()}  # where it is not all of them


@dataclass(frozen=True)
class Row:
    """A record: what it is called, and its values by role."""

    name: str
    values: dict[str, Any]


@dataclass(frozen=True)
class _Nothing:
    """What `record_kinds` asks of declared values: no label is read here."""

    folder: Path

    def label(self, value: str) -> str:
        raise Fault(f"{NO_LABEL}, and this one holds {value!r}")


def rows(path: str, plain: str, columns: Mapping[str, str], stdin: TextIO) -> list[Row]:
    """Read all records.

    Parameters
    ----------
    path
        A file of rows, a text file of one record a line, a folder or a single image or clip; `-` is `stdin`: JSON
        objects or texts, one a line.
    plain
        The module of `server.export.plain` that they are for.
    columns
        Role -> name in the file, where it is not the role's own.

    Raises
    ------
    DataError
        Naming the row.
    """
    unknown = sorted(columns.keys() - ROLES[plain].keys())
    if unknown:
        raise DataError(f"--column {unknown[0]}: this model reads {' and '.join(ROLES[plain])}; name one of them.")
    folder = Path() if path == STDIN else record_files.base(Path(path))
    found = []
    for number, (where, values) in enumerate(_given(path, plain, stdin), 1):
        record = {}
        for role, kind in ROLES[plain].items():
            column = columns.get(role, role)
            if column in values and not (values[column] is None and role not in NEEDED.get(plain, (role,))):
                try:
                    record[role] = record_kinds.KINDS[kind](values[column], declared=_Nothing(folder))
                except Fault as fault:
                    raise DataError(f"{where}: column {column!r} {fault}.") from None
        missing = [role for role in NEEDED.get(plain, tuple(ROLES[plain])) if role not in record]
        if missing or not record:
            wanted = missing[0] if missing else " or ".join(ROLES[plain])
            raise DataError(
                f"{where}: there is no column {columns.get(wanted, wanted)!r}, and its columns are {', '.join(map(repr, values))}; "
                f"name it with --column {wanted.partition(' ')[0]}=NAME."
            )
        found.append(Row(str(values.get("id", number)), record))
    if not found:
        raise DataError(f"{'standard input' if path == STDIN else path} holds no records.")
    return found


def _given(path: str, plain: str, stdin: TextIO) -> Iterator[tuple[str, dict[str, Any]]]:
    if path == STDIN:
        yield from _lines(stdin, "standard input", plain)
        return
    file = Path(path)
    suffix = file.suffix.lower()
    single = next((kind for kind, suffixes in record_files.MEDIA.items() if suffix in suffixes), None)
    if file.is_file() and suffix == ONE_TEXT:
        try:
            with file.open(encoding="utf-8") as stream:
                yield from _lines(stream, str(file), plain)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read: {error}.") from None
    elif file.is_file() and single is not None:
        yield str(file), {"id": file.name, single: file.name}
    else:
        yield from record_files.rows(file)


def _lines(stream: TextIO, said: str, plain: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read one record a line: a JSON object, or a text. Empty lines are left out."""
    role, kind = next(iter(ROLES[plain].items()))
    for number, line in enumerate(stream, 1):
        where, text = f"{said}, row {number}", line.strip()
        if text.startswith("{"):
            try:
                values = json.loads(text)
            except (ValueError, RecursionError):
                raise DataError(f"{where}: not a JSON object.") from None
            yield where, values
        elif text:
            if kind not in ("text", "words") or (len(ROLES[plain]) > 1 and plain == "answers"):
                raise DataError(
                    f"{where}: a line of text is no record for this model; write a JSON object with {' and '.join(ROLES[plain])}."
                )
            yield where, {role: text.split() if kind == "words" else text}
