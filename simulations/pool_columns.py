"""The pool of a partitioned scenario: its rows, and the columns by which they are dealt out to sites.

A row is a number here: the place, from 0, at which `shared.records.each` yields its record. Of a row only the few values are
kept that a partition looks at; texts, images and sounds are passed over.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared import record_files, record_kinds
from shared.errors import DataError, Fault
from shared.record_files import Row
from shared.record_tables import FORMATS
from shared.records import ID, SHOWN
from simulations import vader
from simulations.partition import LABEL
from simulations.scenario import Scenario

POOL = "pool"


def rows(scenario: Scenario) -> Iterator[Row]:
    """Yield the pool's rows, each with the words that say where it stands.

    The pool of the built-in data is all sites' records of the four domains, one domain after another; its rows have `id`, `text`,
    `label`, `domain` and `document`.

    Raises
    ------
    DataError
        Where there is no pool, or it cannot be read.
    """
    if scenario.data.source == "folder":
        yield from record_files.rows(path(scenario))
        return
    held, _ = vader.split(vader.sentences())
    for domain, sentences in held.items():
        for sentence in sentences:
            row = {"id": sentence.id, "text": sentence.text, "label": sentence.label}
            yield f"the vader data, {sentence.id}", row | {"domain": domain, "document": sentence.document}


def path(scenario: Scenario) -> Path:
    """Return the file or folder of a folder's pool.

    Raises
    ------
    DataError
        Where there is none, or two.
    """
    folder = scenario.data.folder or Path()
    found = [place for place in (folder / POOL, *(folder / f"{POOL}{suffix}" for suffix in FORMATS)) if place.exists()]
    if len(found) > 1:
        raise DataError(f"{found[0]} and {found[1]} are both there; keep one.")
    if not found:
        raise DataError(
            f"{folder} holds no pool; with [partition], data.folder needs one pool.jsonl, .csv, .parquet or .arrow, or a "
            "folder pool."
        )
    return found[0]


def read(scenario: Scenario) -> dict[str, list[str]]:
    """Return the columns that the scenario's partition looks at, by the names that it has for them, as text.

    Raises
    ------
    DataError
        Naming the row in which a column is missing, or holds what is no name.
    """
    if scenario.partition is None:
        raise ValueError("the scenario has no partition")
    wanted = [ID, *filter(None, (scenario.partition.by, scenario.data.unit_column))]
    return columns(scenario, wanted, rows(scenario))


def columns(scenario: Scenario, wanted: list[str], found: Iterator[Row]) -> dict[str, list[str]]:
    """Return columns of rows: `wanted` are roles of the task, or names in the file."""
    layout = scenario.data.layout()
    named = {name: layout.column(name) for name in wanted}
    held: dict[str, list[str]] = {name: [] for name in wanted}
    for where, row in found:
        for name, column in named.items():
            value = _name(row, column, where)
            renamed = column == layout.column(LABEL)
            held[name].append(layout.label_names.get(value, value) if renamed else value)
    return held


def _name(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        among = ", ".join(map(repr, list(row)[:SHOWN])) or "none"
        raise DataError(f"{where}: column {column!r} is missing among {among}; name one of these.")
    value = row[column]
    try:
        return record_kinds.name(str(value).lower() if isinstance(value, bool) else value)
    except Fault as fault:
        raise DataError(f"{where}: {column!r} {fault}, and sites are made by it; take another column.") from None
