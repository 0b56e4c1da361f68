"""Files of rows, a format a function: each yields a row's values by column, one after another.

A column's values stay what the file says that they are, but for the labels of `datasets`, which it keeps as numbers.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

MOST_AT_ONCE = 64  # rows of a table that are in memory together


class Broken(ValueError):
    """What is wrong with the row that was to come next."""


def _lines(path: Path) -> Iterator[str]:
    """Yield lines with their ends, which are those of bytes: a text may hold U+2028."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines):
            try:
                yield line.decode("utf-8" if number else "utf-8-sig")
            except UnicodeDecodeError:
                raise Broken("not UTF-8; save the file so") from None


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    for line in _lines(path):
        try:
            row: Any = json.loads(line, object_pairs_hook=_once)
        except RecursionError:
            row = None
        except Broken:
            raise
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise Broken("not a JSON object")
        yield row


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Broken(f"{name!r} stands twice in the object")
        found[name] = value
    return found


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    """Every value stays the text that it is: 01 is no 1, and NA no gap."""
    csv.field_size_limit(2**31 - 1)  # the module's own setting, meant for programs that trust no file
    lines = csv.reader(_lines(path), strict=True)
    try:
        header = next(lines, [])
        twice = {name for name in header if header.count(name) > 1}
        if twice:
            raise Broken(f"the header names column {min(twice)!r} twice")
        for line in lines:
            if len(line) != len(header):
                raise Broken(f"{len(line)} values, and the header has {len(header)} columns")
            yield dict(zip(header, line, strict=True))
    except csv.Error as error:
        raise Broken(f"not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as stream:
        try:
            opened = ParquetFile(stream)
            yield from _tables(opened.schema_arrow, opened.iter_batches(MOST_AT_ONCE))
        except (ArrowException, OSError):
            raise Broken("not Parquet, or a broken file") from None


def _arrow(path: Path) -> Iterator[dict[str, Any]]:
    """Read an Arrow file or stream: `datasets` writes streams."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            try:
                opened = pyarrow.ipc.open_file(source)
                batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                opened = batches = pyarrow.ipc.open_stream(source)
            yield from _tables(opened.schema, batches)
        except (pyarrow.ArrowException, OSError):
            raise Broken("not Arrow, or a broken file") from None


def _tables(schema: Any, tables: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Yield rows; a label that the table keeps as a number, as `datasets` does, is the name that stands for it."""
    named = _label_names(schema)
    for table in tables:
        for start in range(0, table.num_rows, MOST_AT_ONCE):
            for row in table.slice(start, MOST_AT_ONCE).to_pylist():
                yield row | {column: name(row[column]) for column, name in named.items()}


def _label_names(schema: Any) -> dict[str, Callable[[Any], Any]]:
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import ClassLabel, Features

    def namer(names: list[str]) -> Callable[[Any], Any]:
        def name(value: Any) -> Any:
            if isinstance(value, list):
                return [name(item) for item in value]
            return names[value] if isinstance(value, int) and 0 <= value < len(names) else None

        return name

    features = Features.from_arrow_schema(schema)
    inner = {column: getattr(kind, "feature", kind) for column, kind in features.items()}
    return {column: namer(kind.names) for column, kind in inner.items() if isinstance(kind, ClassLabel)}


FORMATS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
