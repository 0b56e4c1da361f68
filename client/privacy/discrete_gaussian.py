"""Whole-number noise: draws from the discrete Gaussian, exactly as its formula says.

The discrete Gaussian of deviation s gives each whole number x a probability proportional to
exp(-x² / (2 s²)) (Canonne, Kamath and Steinke 2020, "The Discrete Gaussian for Differential Privacy").
A continuous Gaussian that is rounded is another distribution, and its low bits can still tell the sum below.

Drawn by rejection, in whole numbers. The magnitudes are cut into bins of a power of two, at least 16 a
deviation. A bin gets so many of 2**16 cells that its share is at least its largest probability; 16 random bits
choose a cell, others the place in its bin and the sign, and x is kept with probability

    N exp(-x² / (2 s²)) / (cells of its bin),

for a constant N that makes it at most 1; 97 % and more are kept from a deviation of 16 on. The test
"uniform < that" is done in float64 where 2**-40 of relative error, far more than it makes, cannot change
the answer; else by decimals of as many digits, and the uniform by as many more random bits, as it takes.
So the only departure from the formula is the end of the last bin: what lies beyond weighs less than
2**-107, as the discrete Gaussian's tail from m on is below the continuous one's from m - 1 on, 12 deviations
out. A thousand releases of 22 million numbers are together within 1e-21 of exact in statistical distance,
which at epsilon 8 adds less than 1e-17 to delta.

As for the continuous noise, running time is not constant; it depends on the noise and never on the sum.
"""

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from client.privacy.randomness import Keystream
from shared.errors import ConfigError

SMALLEST, LARGEST = 2.0**-6, 2.0**40  # deviations; the largest leaves 11 bits of a word for the uniform

_CELL_BITS = 16
_REACH = 12.0  # deviations
_BLOCK = 1 << 16  # numbers made at a time: the temporaries stay in the processor's cache
_MARGIN = 2.0**-40  # relative, of a probability in float64


class DiscreteGaussian:
    """The table of one deviation; get it from `sampler`, which keeps the last few."""

    def __init__(self, deviation: float) -> None:
        if not SMALLEST <= deviation <= LARGEST:
            raise ConfigError(
                f"Discrete noise of deviation {deviation:g} is outside {SMALLEST:g} to {LARGEST:g} steps of its grid; "
                "change privacy.grid, or lower privacy.epsilon."
            )
        self.deviation = deviation
        self._offset_bits = max(0, math.floor(math.log2(deviation / 16)))
        width = 1 << self._offset_bits
        bins = math.ceil((_REACH * deviation + 2) / width)
        highest = np.exp(-0.5 * (np.arange(bins) * (width / deviation)) ** 2)  # of each bin: at its lower end
        cells_left = (1 << _CELL_BITS) - bins  # as each bin's share is rounded up
        self._scale = cells_left / (highest.sum() * (1 + _MARGIN))  # N
        self._cells = np.maximum(1, np.ceil(self._scale * highest * (1 + _MARGIN / 2))).astype(np.int64)
        self._cells[0] += (1 << _CELL_BITS) - self._cells.sum()
        self._bin_of_cell = np.repeat(np.arange(bins), self._cells)
        self._uniform_bits = 64 - _CELL_BITS - 1 - self._offset_bits
        self._most = self._scale / self._cells * 2.0**self._uniform_bits

    def draw(self, n: int, randomness: Keystream) -> npt.NDArray[np.int64]:
        """Draw `n` independent whole numbers, about 50 ns each."""
        drawn, filled = np.empty(n, dtype=np.int64), 0
        while filled < n:
            some = self._some(randomness.words(min(_BLOCK, n - filled + (n - filled) // 16 + 8)), randomness)
            some = some[: n - filled]
            drawn[filled : filled + len(some)] = some
            filled += len(some)
        return drawn

    def _some(self, words: npt.NDArray[np.uint64], randomness: Keystream) -> npt.NDArray[np.int64]:
        """Return what is kept of one proposal a word: from its low bits up, cell, sign, place, uniform."""
        cell = (words & np.uint64((1 << _CELL_BITS) - 1)).astype(np.int64)
        negative = (words & np.uint64(1 << _CELL_BITS)) != 0
        words = words >> np.uint64(_CELL_BITS + 1)
        bins = self._bin_of_cell[cell]
        x = (bins << self._offset_bits) + (words & np.uint64((1 << self._offset_bits) - 1)).astype(np.int64)
        uniform = (words >> np.uint64(self._offset_bits)).astype(np.int64)  # the first bits of a real in [0, 1)
        threshold = self._most[bins] * np.exp(-0.5 * np.square(x / self.deviation))
        above = threshold - uniform  # the uniform lies in [uniform, uniform + 1] / 2**uniform_bits
        kept = above > 0.5
        for index in np.flatnonzero(np.abs(above - 0.5) <= 0.5 + threshold * _MARGIN):
            kept[index] = self._decide(int(uniform[index]), int(x[index]), int(bins[index]), randomness)
        kept &= ~(negative & (x == 0))  # 0 has one sign
        signed: npt.NDArray[np.int64] = np.where(negative, -x, x)[kept]
        return signed

    def _decide(self, uniform: int, x: int, number: int, randomness: Keystream) -> bool:
        """Whether a real, known by its first bits, is below the probability of keeping x: exactly."""
        bits, digits = self._uniform_bits, 40
        while True:
            with localcontext() as context:
                context.prec = digits
                exponent = -(Decimal(x) ** 2) / (2 * Decimal(self.deviation) ** 2)
                threshold = Fraction(Decimal(self._scale) * exponent.exp() / int(self._cells[number]))
            error = threshold / 10 ** (
                digits - 6
            )  # the exponent, above -20,000, is within a few units of its last digit
            if Fraction(uniform + 1, 1 << bits) <= threshold - error:
                return True
            if Fraction(uniform, 1 << bits) >= threshold + error:
                return False
            uniform = uniform << 64 | int(randomness.words(1)[0])
            bits, digits = bits + 64, digits + 20


@lru_cache(maxsize=8)
def sampler(deviation: float) -> DiscreteGaussian:
    """Return the sampler of a deviation, in steps of the grid; its table takes a millisecond.

    Raises
    ------
    ConfigError
        If the deviation is outside `SMALLEST` to `LARGEST`.
    """
    return DiscreteGaussian(deviation)
