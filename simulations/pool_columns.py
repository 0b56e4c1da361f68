"""The pool of a partitioned scenario: its rows, and the columns by which they are dealt out to sites.

A row is a number here: the place, from 0, at which `shared.records.each` yields its record. Of a row only the few values are
kept that a partition looks at; texts, images and sounds are passed over.
"""

from collections.abc import Collection, Iterable, Iterator
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
        yield from domain_rows(domain, sentences)


def domain_rows(domain: str, sentences: Iterable[vader.Sentence]) -> Iterator[Row]:
    """Yield the rows of one domain of the built-in data."""
    for sentence in sentences:
        row = {"id": sentence.id, "text": sentence.text, "label": sentence.label}
        yield f"the vader data, {sentence.id}", row | {"domain": domain, "document": sentence.document}


def path(scenario: Scenario, name: str = POOL) -> Path:
    """Return the file or folder of a folder's pool, or of one site.

    Raises
    ------
    DataError
        Where there is none, or two.
    """
    folder = scenario.data.folder or Path()
    found = find(folder, name)
    if found is None:
        needed = (
            f" one {POOL}.jsonl, .csv, .parquet or .arrow, or a folder {POOL}, for its [partition]"
            if name == POOL
            else ", for each site, one SITE.jsonl, .csv, .parquet or .arrow, or a folder SITE"
        )
        raise DataError(f"{folder} holds no records of {name!r}; data.folder needs{needed}.")
    return found


def find(folder: Path, name: str) -> Path | None:
    """Return the file or folder of this name, in whichever form it is there.

    Raises
    ------
    DataError
        Where it is there in two.
    """
    found = [place for place in (folder / name, *(folder / f"{name}{suffix}" for suffix in FORMATS)) if place.exists()]
    if len(found) > 1:
        raise DataError(f"{found[0]} and {found[1]} are both there; keep one.")
    return found[0] if found else None


def read(scenario: Scenario, wished: Collection[str] = ()) -> dict[str, list[str]]:
    """Return the columns that the scenario's partition looks at, by the names that it has for them, as text.

    Parameters
    ----------
    wished
        More columns, which are left out where a row lacks one or holds what is no name in it.

    Raises
    ------
    DataError
        Naming the row in which a column is missing, or holds what is no name.
    """
    by = None if scenario.partition is None else scenario.partition.by
    return columns(scenario, [ID, *filter(None, (by, scenario.data.unit_column))], rows(scenario), wished)


def columns(
    scenario: Scenario, needed: Collection[str], found: Iterator[Row], wished: Collection[str] = ()
) -> dict[str, list[str]]:
    """Return columns of rows, as `read` does: they are called as roles of the task, or as in the file."""
    layout = scenario.data.layout()
    named = {name: layout.column(name) for name in (*needed, *wished)}
    held: dict[str, list[str]] = {name: [] for name in named}
    for where, row in found:
        for name in list(held):
            column = named[name]
            try:
                value = _name(row, column, where)
            except DataError:
                if name in needed:
                    raise
                del held[name]
                continue
            held[name].append(layout.label_names.get(value, value) if column == layout.column(LABEL) else value)
    return held


def _name(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        among = ", ".join(map(repr, list(row)[:SHOWN])) or "none"
        raise DataError(f"{where}: column {column!r} is missing among {among}; name one of these.")
    value = row[column]
    try:
        return record_kinds.name(str(value).lower() if isinstance(value, bool) else value)
    except Fault as fault:
        raise DataError(f"{where}: {column!r} {fault}, and sites are told apart by it; take another column.") from None
