"""A received array where it lies: a view of its message's bytes, which cannot be written to.

Flower's `Array.numpy()` reads the bytes through a file in memory, which copies a model at every reply.
"""

import io
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array

NUMPY = "numpy.ndarray"  # Flower's name of what `numpy.save` writes
LONGEST = 4096  # bytes of its header, of which an honest one has 128
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def view(array: Array) -> npt.NDArray[Any]:
    """Return an array without a copy of it.

    Raises
    ------
    ValueError
        Where the bytes are not one array of plain values, and nothing else; of some headers numpy's reader raises others.
    """
    if array.stype != NUMPY:
        raise ValueError(f"arrays travel as {NUMPY}.")
    start = io.BytesIO(array.data[:LONGEST])
    version = np.lib.format.read_magic(start)
    if version not in HEADERS:
        raise ValueError("the array's header is of another version.")
    shape, fortran, kind = HEADERS[version](start)
    if kind.hasobject or len(array.data) - start.tell() != prod(shape) * kind.itemsize:
        raise ValueError("the bytes are not those of one array.")
    flat = np.frombuffer(array.data, kind, count=prod(shape), offset=start.tell())
    return flat.reshape(shape, order="F" if fortran else "C")
