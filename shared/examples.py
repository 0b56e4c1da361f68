"""A data set ready for a network: the arrays that are kept of its records, end to end, in memory or on a disk.

A unit of privacy is a record, or a person with several; a record has one row, or one for each of its chunks. Rows of a
record lie together, and records of a unit; sampling goes by units, and scores by records.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared.errors import EngineError
from shared.tasks.base import Batch, Chunks, Encoded, Task, Uniform, Width

TOKENS = 64  # a micro-batch holds at most so many times its number of rows


@dataclass(frozen=True)
class Ragged:
    """Arrays of one field: row i is `values[starts[i] : starts[i + 1]]`, or `values[i]` where every row is one value."""

    values: npt.NDArray[Any]
    starts: npt.NDArray[np.int64] | None

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        """Return one row's array."""
        if self.starts is None:
            return np.asarray(self.values[row])
        return np.asarray(self.values[self.starts[row] : self.starts[row + 1]])

    def take(self, rows: npt.NDArray[np.int64]) -> "Ragged":
        """Return some rows alone."""
        if self.starts is None:
            return Ragged(np.asarray(self.values[rows]), None)
        lengths = self.starts[rows + 1] - self.starts[rows]
        return Ragged(np.asarray(self.values[_ranges(self.starts[rows], lengths)]), _starts(lengths))

    @classmethod
    def of(cls, arrays: Sequence[npt.NDArray[Any]]) -> "Ragged":
        """Lay arrays end to end; all have the same dimensions but for the first."""
        if arrays[0].ndim == 0:
            return cls(np.stack(arrays), None)
        lengths = np.fromiter((len(array) for array in arrays), dtype=np.int64, count=len(arrays))
        return cls(np.concatenate(arrays), np.concatenate([[0], np.cumsum(lengths)]))


@dataclass(frozen=True)
class Examples:
    """Encoded records of a task: fields, where each unit's rows begin, (units + 1,), and each record's, (records + 1,).

    Without `chunks` each row is a record.
    """

    task: Task
    processor: Any
    fields: dict[str, Ragged]
    units: npt.NDArray[np.int64]
    chunks: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """How many units there are."""
        return len(self.units) - 1

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return int(self.units[-1])

    @cached_property
    def records(self) -> npt.NDArray[np.int64]:
        """Where each record's rows begin, (records + 1,)."""
        return np.arange(self.rows + 1) if self.chunks is None else self.chunks

    def of_record(self, number: int) -> range:
        """Rows of a record."""
        return range(int(self.records[number]), int(self.records[number + 1]))

    def row(self, number: int) -> Encoded:
        """Return what is kept of one row."""
        return {name: field[number] for name, field in self.fields.items()}

    def records_of(self, unit: int) -> range:
        """Numbers of a unit's records."""
        first, last = np.searchsorted(self.records, self.units[unit : unit + 2])
        return range(int(first), int(last))

    def rows_of(self, unit: int) -> range:
        """Rows of a unit."""
        return range(int(self.units[unit]), int(self.units[unit + 1]))

    @classmethod
    def of(cls, task: Task, processor: Any, units: Sequence[Sequence[Encoded | Chunks]]) -> "Examples":
        """Keep encoded records, unit by unit.

        Raises
        ------
        EngineError
            Where a task cuts a record in chunks and does not say that it does: the probe would not cover them.
        """
        records = [record if isinstance(record, list) else [record] for unit in units for record in unit]
        rows = [row for record in records for row in record]
        if len(rows) > len(records) and not task.chunks:
            raise EngineError(f"{task.name} cuts records in chunks, and its `chunks` is false.")
        begins = _starts([len(record) for record in records])
        names = list(rows[0]) if rows else []
        return cls(
            task,
            processor,
            {name: Ragged.of([row[name] for row in rows]) for name in names},
            begins[_starts([len(unit) for unit in units])],
            begins if len(rows) > len(records) else None,
        )

    @classmethod
    def single(cls, task: Task, processor: Any, records: Sequence[Encoded | Chunks]) -> "Examples":
        """Keep encoded records, each a unit of its own."""
        return cls.of(task, processor, [[record] for record in records])

    def first(self, units: int) -> "Examples":
        """Return the first units alone."""
        kept = self.units[: units + 1]
        chunks = None if self.chunks is None else self.chunks[self.chunks <= kept[-1]]
        return Examples(self.task, self.processor, self.fields, kept, chunks)

    def take(self, units: npt.NDArray[np.int64]) -> "Examples":
        """Return some units alone, in the order that `units` names them; their values are copied."""
        begins, ends = self.units[units], self.units[units + 1]
        rows = _ranges(begins, ends - begins)
        fields = {name: field.take(rows) for name, field in self.fields.items()}
        chunks = None
        if self.chunks is not None:
            first, last = np.searchsorted(self.chunks, begins), np.searchsorted(self.chunks, ends)
            records = _ranges(first, last - first)
            chunks = _starts(np.diff(self.chunks)[records])
        return Examples(self.task, self.processor, fields, _starts(ends - begins), chunks)

    def save(self, folder: Path) -> None:
        """Write the arrays to an empty folder."""
        np.save(folder / "units.npy", self.units)
        if self.chunks is not None:
            np.save(folder / "chunks.npy", self.chunks)
        for name, field in self.fields.items():
            np.save(folder / f"{name}.values.npy", field.values)
            if field.starts is not None:
                np.save(folder / f"{name}.starts.npy", field.starts)

    @classmethod
    def open(cls, task: Task, processor: Any, folder: Path) -> "Examples":
        """Map a folder's arrays into memory: they are read where they are needed; what is written to them stays there."""
        fields = {}
        for file in sorted(folder.glob("*.values.npy")):
            name = file.name.removesuffix(".values.npy")
            starts = folder / f"{name}.starts.npy"
            held = np.load(starts, allow_pickle=False) if starts.exists() else None
            fields[name] = Ragged(np.load(file, mmap_mode="c", allow_pickle=False), held)
        chunks = folder / "chunks.npy"
        return cls(
            task,
            processor,
            fields,
            np.load(folder / "units.npy", allow_pickle=False),
            np.load(chunks, allow_pickle=False) if chunks.exists() else None,
        )


def _starts(lengths: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _ranges(begins: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Numbers from each beginning on, so many of each, end to end."""
    places = _starts(lengths)
    return np.arange(places[-1]) + np.repeat(begins - places[:-1], lengths)


Unit = Sequence[int]  # rows of a unit that act together


def width(examples: Examples, unit: Unit) -> Width:
    """What a unit's rows are padded to: the widest of its own, and nobody else's."""
    return tuple(map(max, zip(*(examples.task.width(examples.row(row)) for row in unit), strict=True)))


def collate(
    examples: Examples,
    units: Sequence[Unit],
    device: torch.device,
    padded: Width | None = None,
    uniform: Uniform | None = None,
) -> Batch:
    """Put units of as many rows each side by side: tensors (B, ...), or (B, rows, ...) where a unit has several.

    `padded` pads further than the units' own width (the probe does). `uniform` gives random numbers, by which each row is
    changed as `augmentation` says.
    """
    rows = [examples.row(row) for unit in units for row in unit]
    if uniform is not None:
        rows = [examples.task.augmented(row, uniform, examples.processor) for row in rows]
    wide = (
        padded if padded is not None else tuple(map(max, zip(*(width(examples, unit) for unit in units), strict=True)))
    )
    batch = {name: value.to(device) for name, value in examples.task.collate(rows, wide, examples.processor).items()}
    each = len(units[0]) if units else 1
    return batch if each == 1 else {name: value.reshape(-1, each, *value.shape[1:]) for name, value in batch.items()}


def batches(examples: Examples, units: Sequence[Unit], micro_batch: int) -> Iterator[list[int]]:
    """Yield places in `units` in groups of one width and number of rows, the smallest first; at most `micro_batch` rows.

    Wide units go in smaller groups, so that a group never holds more than `micro_batch` x 64 tokens.
    """
    groups: dict[tuple[Width, int], list[int]] = {}
    for place, unit in enumerate(units):
        groups.setdefault((width(examples, unit), len(unit)), []).append(place)
    for (wide, rows), members in sorted(groups.items()):
        most = micro_batch if not wide else min(micro_batch, micro_batch * TOKENS // sum(wide))
        step = max(1, most // rows)
        for start in range(0, len(members), step):
            yield members[start : start + step]
