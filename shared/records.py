"""Records as they lie in a file: read, each checked against what is declared of it, with the row in every error.

A task names the columns that it needs (`shared.tasks`); a site maps them to those of its own file. What a column may hold
is its kind. Nothing of a record is in what leaves a site; these errors stay where the file is.
"""

import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared import record_files, record_kinds
from shared.errors import DataError, Fault
from shared.record_kinds import KINDS

if TYPE_CHECKING:
    from shared.tasks.base import Task

ID = "id"
SHOWN = 12  # columns, in an error


@dataclass(frozen=True)
class Layout:
    """How a file's columns are called, and which values of its labels are which declared ones.

    `columns` maps roles, and `id`, to names in the file; a role that is not in it is called what it is. `label_names` maps
    the file's labels to declared ones. `unit` is the column that names the person; None: every record is a unit.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    label_names: Mapping[str, str] = field(default_factory=dict)
    unit: str | None = None

    def column(self, role: str) -> str:
        """Name in the file."""
        return self.columns.get(role, role)


@dataclass(frozen=True)
class Record:
    """One record: its id, whose it is (its own id, where every record is a unit), and a value for each role."""

    id: str
    unit: str
    values: Mapping[str, Any]


def read(
    path: Path,
    task: "Task",
    layout: Layout = Layout(),
    *,
    labels: Collection[str] | None = None,
    identified: bool = True,
) -> list[Record]:
    """Read all records, as `each` does."""
    return list(each(path, task, layout, labels=labels, identified=identified))


def each(
    path: Path,
    task: "Task",
    layout: Layout = Layout(),
    *,
    labels: Collection[str] | None = None,
    identified: bool = True,
) -> Iterator[Record]:
    """Read the records of a file or a folder, one after another.

    Parameters
    ----------
    labels
        Those that a record may have; by default all of the task's.
    identified
        Whether records have ids, each another one; else the row's number is the id.

    Raises
    ------
    DataError
        Naming the row: a missing column, an empty text, an undeclared label, an id twice.
    """
    declared = frozenset(task.settings.labels if labels is None else labels)
    check = _Check(task, layout, declared, identified, record_files.base(path))
    seen: set[str] = set()
    for number, (where, row) in enumerate(record_files.rows(path), 1):
        record = check.record(row, number, where)
        if record.id in seen:
            raise DataError(f"{where}: id {record.id!r} stands twice; a record is one row.")
        seen.add(record.id)
        yield record
    if not seen:
        raise DataError(f"{path} holds no records.")


def person(name: object) -> str:
    """Who a value of the unit's column names: the same text, however it is composed and whatever blanks stand around it.

    Two that are taken for one share one clipping norm, and lose nothing; one that is taken for two has no bound.
    """
    return unicodedata.normalize("NFC", str(name)).strip()


@dataclass(frozen=True)
class _Check:
    task: "Task"
    layout: Layout
    labels: frozenset[str]
    identified: bool
    folder: Path

    def record(self, row: Mapping[str, Any], number: int, where: str) -> Record:
        values: dict[str, Any] = {}
        for role, column in self.task.columns.items():
            name = self.layout.column(role)
            if name not in row and not column.needed and role not in self.layout.columns:
                continue
            kind = "labels" if column.kind == "label" and self.task.settings.multi_label else column.kind
            values[role] = self._value(row, name, where, partial(KINDS[kind], declared=self))
        fault = self.task.fault(values)
        if fault is not None:
            raise DataError(f"{where}: {fault}.")
        own = self._value(row, self.layout.column(ID), where, record_kinds.name) if self.identified else str(number)
        unit = own if self.layout.unit is None else person(self._value(row, self.layout.unit, where, record_kinds.name))
        return Record(own, unit, values)

    def label(self, value: str) -> str:
        label = self.layout.label_names.get(value, value)
        if label not in self.labels:
            declared = [known for known in self.task.settings.labels if known in self.labels]
            raise Fault(f"holds the label {label!r}, which is not one of the declared {declared}")
        return label

    def _value(self, row: Mapping[str, Any], name: str, where: str, read: Callable[[Any], Any]) -> Any:
        if name not in row:
            among = ", ".join(map(repr, list(row)[:SHOWN])) or "none"
            remedy = "name the columns in site.toml, [dataset.columns]" if self.identified else "call it so"
            raise DataError(f"{where}: column {name!r} is missing among {among}; {remedy}.")
        try:
            return read(row[name])
        except Fault as fault:
            raise DataError(f"{where}: {name!r} {fault}.") from None
