"""Fold the sites' updates into their mean, one at a time, whatever their order.

Memory is one accumulator and the update at hand. Each value is rounded to a fixed grid of 2^-38 units
before it is added in float64, where sums of multiples of the grid are exact below 2^15 units: so the
result is the same to the bit in any order of arrival, and a resumed round gives what the uninterrupted
one would have given. The unit is public: what one site's step can move without noise, so that the grid
stays far below a float32 update's own rounding, however small the learning rate.
"""

import math

import numpy as np
import numpy.typing as npt

from shared.arrays import Arrays
from shared.errors import MoonflowerError

GRID = 2.0**-38
LARGEST = 2.0**14  # units, of any value of the sum; far beyond what a finite training reaches


class UpdateError(MoonflowerError):
    """A site's update cannot be folded in: wrong names or shapes, not finite, or too large."""


class Fold:
    """The weighted mean of updates shaped like `like`, whose values are around `unit`: public, any power of two near it."""

    def __init__(self, like: Arrays, unit: float = 1.0) -> None:
        power = 2.0 ** math.floor(math.log2(unit))
        self._grid, self._largest = GRID * power, LARGEST * power
        self._sums: dict[str, npt.NDArray[np.float64]] = {name: np.zeros(array.shape) for name, array in like.items()}
        self._weight = 0.0

    def add(self, update: Arrays, weight: float = 1.0) -> None:
        """Add one update; `weight` in (0, 1] is public.

        Raises
        ------
        UpdateError
            Before anything is added.
        """
        if {name: array.shape for name, array in update.items()} != {
            name: array.shape for name, array in self._sums.items()
        }:
            raise UpdateError("the update's arrays are not the ones that were asked for.")
        # float32 times a weight in (0, 1] over the grid stays far below the largest float64.
        scaled = {
            name: np.rint(array.astype(np.float64) * (weight / self._grid)) * self._grid
            for name, array in update.items()
        }
        for name, array in scaled.items():
            if not np.isfinite(array).all():
                raise UpdateError(f"the update of {name!r} is not finite.")
            if np.abs(array).max(initial=0.0) + np.abs(self._sums[name]).max(initial=0.0) > self._largest:
                raise UpdateError(f"the update of {name!r} is above {self._largest:g}; lower the learning rate.")
        for name, array in scaled.items():
            self._sums[name] += array
        self._weight += weight

    def mean(self) -> Arrays:
        """Return the weighted mean, float32; at least one update must have been added."""
        return {name: (total / self._weight).astype(np.float32) for name, total in self._sums.items()}
