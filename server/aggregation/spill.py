"""A round's updates on the disk, for rules that need all of them at once: a row each, read back by columns.

The file has no name: it is the process's alone, and gone when that ends, however it ends.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.errors import MachineError


class Spill:
    """Rows of `width` float32 values in a file in `folder`."""

    def __init__(self, folder: Path, width: int) -> None:
        self._folder, self._row = folder, 4 * width
        self._rows = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".updates-")  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise self._refused(error) from None

    def add(self, arrays: Sequence[npt.NDArray[np.float32]]) -> int:
        """Write arrays as one row, end to end, and return its number.

        Raises
        ------
        MachineError
            Where the disk does not take it.
        """
        place = self._rows * self._row
        try:
            for array in arrays:
                left = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                while left:
                    written = os.pwrite(self._file.fileno(), left, place)
                    left, place = left[written:], place + written
        except OSError as error:
            raise self._refused(error) from None
        self._rows += 1
        return self._rows - 1

    def columns(self, rows: Sequence[int], part: slice) -> npt.NDArray[np.float32]:
        """Return some rows' values in some columns, (rows, columns).

        Raises
        ------
        MachineError
            Where the disk does not give them back.
        """
        held = np.empty((len(rows), part.stop - part.start), np.float32)
        try:
            for row, values in zip(rows, held, strict=True):
                left, place = values.view(np.uint8).data, row * self._row + 4 * part.start
                while left:
                    read = os.preadv(self._file.fileno(), [left], place)
                    if not read:
                        raise OSError(0, "the file is shorter than what was written to it")
                    left, place = left[read:], place + read
        except OSError as error:
            raise self._refused(error) from None
        return held

    def close(self) -> None:
        """Give the disk its room back."""
        self._file.close()

    def _refused(self, error: OSError) -> MachineError:
        return MachineError(
            f"{self._rows + 1} updates of {self._row} bytes each cannot be kept in {self._folder}, which "
            f"federation.aggregation needs: {error.strerror}; mend that, then resume the run."
        )
