"""Encoded records written to a folder one after another, as `shared.examples.Examples` opens them: never all in memory."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from shared.errors import EngineError
from shared.tasks.base import Chunks, Encoded, Task

Array = npt.NDArray[Any]


class Writer:
    """Writes the records of a part, in whatever order they come; those of a unit lie together in the end."""

    def __init__(self, folder: Path, task: Task) -> None:
        self._folder, self._task = folder, task
        self._fields: dict[str, _Field] = {}
        self._units: dict[str, int] = {}
        self._unit_of: list[int] = []  # of each record
        self._rows: list[int] = []  # of each record

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the files, or leave them where something went wrong."""
        for field in self._fields.values():
            field.close()
        if error is None:
            self._finish()

    def add(self, unit: str, encoded: Encoded | Chunks) -> None:
        """Write a record of a unit: a row, or several.

        Raises
        ------
        EngineError
            Where a task that has no chunks gives several rows, or keeps other fields of a record than of the first.
        """
        rows = encoded if isinstance(encoded, list) else [encoded]
        if len(rows) != 1 and not self._task.chunks:
            raise EngineError(f"{self._task.name} cuts records in chunks, and its `chunks` is false.")
        self._unit_of.append(self._units.setdefault(unit, len(self._units)))
        self._rows.append(len(rows))
        for row in rows:
            if self._fields and row.keys() != self._fields.keys():  # a record would get the rows of others
                raise EngineError(
                    f"{self._task.name} keeps {sorted(row)} of a record, and of others {sorted(self._fields)}."
                )
            for name, array in row.items():
                if name not in self._fields:
                    self._fields[name] = _Field(self._folder, name, array)
                self._fields[name].add(array)

    def _finish(self) -> None:
        order = np.argsort(np.asarray(self._unit_of, dtype=np.int64), kind="stable")
        rows = np.asarray(self._rows, dtype=np.int64)
        if (np.diff(order) != 1).any():
            begins = starts(rows)
            of_rows = np.concatenate([np.arange(begins[record], begins[record + 1]) for record in order])
            for field in self._fields.values():
                field.reorder(of_rows)
        ends = starts(rows[order])
        counts = np.bincount(np.asarray(self._unit_of, dtype=np.int64))
        np.save(self._folder / "units.npy", ends[starts(counts)])
        if len(rows) < rows.sum():
            np.save(self._folder / "chunks.npy", ends)


class _Field:
    """One field's rows, end to end, behind a header that is filled in at the end."""

    def __init__(self, folder: Path, name: str, first: Array) -> None:
        self._values, self._starts = folder / f"{name}.values.npy", folder / f"{name}.starts.npy"
        self._single, self._kind, self._shape = first.ndim == 0, first.dtype, first.shape[1:]
        self._lengths: list[int] = []
        self._stream = self._values.open("wb")
        self._header(0)

    def add(self, array: Array) -> None:
        """Write one row.

        Raises
        ------
        EngineError
            Where its further axes are not the first row's.
        """
        if (array.ndim == 0) != self._single or array.shape[1:] != self._shape:
            raise EngineError(
                f"{self._values.name}: a record has an array {array.shape}, others {('T', *self._shape)}."
            )
        length = 1 if self._single else len(array)
        self._stream.write(np.ascontiguousarray(array, dtype=self._kind).tobytes())
        self._lengths.append(length)

    def close(self) -> None:
        """Say how many values there are, and where each row begins."""
        self._stream.seek(0)
        self._header(sum(self._lengths))
        self._stream.close()
        if not self._single:
            np.save(self._starts, starts(self._lengths))

    def reorder(self, rows: Array) -> None:
        """Write the rows anew, in the order that `rows` names."""
        held, begins = np.load(self._values, mmap_mode="r"), starts(self._lengths)
        self._values.unlink()
        self._stream, self._lengths = self._values.open("wb"), []
        self._header(0)
        for row in rows:
            self.add(held[row] if self._single else held[begins[row] : begins[row + 1]])
        self.close()

    def _header(self, length: int) -> None:
        """Write numpy's header, which has room for any length and so always is of one size."""
        described = {"descr": np.lib.format.dtype_to_descr(self._kind), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._stream, described | {"shape": (length, *self._shape)})


def starts(lengths: Sequence[int] | Array) -> npt.NDArray[np.int64]:
    """Where things of these lengths begin, end to end, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
