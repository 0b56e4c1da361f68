"""Fold the sites' updates into their mean, one at a time, whatever their order.

Memory is one accumulator and the update at hand, which is read where it lies and goes block by block through the
processor's cache. Each value is rounded to a fixed grid of 2^-38 units before it is added in float64, where sums of whole
numbers are exact: so the result is the same to the bit in any order of arrival, and a resumed round gives what the
uninterrupted one would have given. The unit is public: what one site's step can move without noise, so that the grid
stays far below a float32 update's own rounding, however small the learning rate.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np
import numpy.typing as npt

from server.aggregation import kernel
from server.aggregation.kernel import Kernel
from shared.arrays import Arrays
from shared.errors import MoonflowerError

DIGITS = 38  # binary digits of a unit that are kept
LARGEST = 2.0**14  # units, of any value of an update; far beyond what a finite training reaches
EXACT = LARGEST * 2.0**DIGITS  # steps of the grid; a sum and a value of at most so many each add without rounding
HIGH = 2.0**30  # steps: a sum that nears `EXACT` gives its multiples of this away
BLOCK = 2**16  # values that go through the cache together
WORTH = 2**20  # values of an update from which on threads pay
MOST_THREADS = 4  # more would wait for the memory
FLOAT32 = 100  # a power of two up to which float32 scales without loss


class UpdateError(MoonflowerError):
    """A site's update cannot be folded in: wrong names or shapes, not finite, or too large."""


@dataclass
class Block:
    """A stretch of one array's sums, in steps of the grid, and what was carried from them, in multiples of `HIGH`."""

    name: str
    part: slice  # of the array, as one dimension
    sums: npt.NDArray[np.float64]
    bound: float = 0.0  # of any sum, without its sign
    carried: npt.NDArray[np.float64] | None = None

    def make_room(self, coming: float) -> None:
        """Carry, where sums with values of at most `coming` steps could be rounded."""
        if self.bound + coming > EXACT:
            high = np.rint(self.sums / HIGH)
            self.sums -= high * HIGH
            self.carried = high if self.carried is None else self.carried + high
            self.bound = HIGH / 2
        self.bound += coming

    def total(self) -> npt.NDArray[np.float64]:
        """The sums in steps, exact but for one rounding to float64."""
        return self.sums if self.carried is None else self.carried * HIGH + self.sums


@dataclass(frozen=True)
class Scale:
    """How values become steps of the grid: times 2^`digits` times `weight`; `largest` is the most that a value may be."""

    digits: int
    largest: float
    weight: float = 1.0

    def steps(
        self, values: npt.NDArray[np.float32], narrow: npt.NDArray[np.float32], wide: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """Round values to whole steps; `narrow` and `wide` are space to work in, and the result is in `wide`."""
        wide = wide[: len(values)]
        if self.weight == 1.0 and abs(self.digits) <= FLOAT32:  # exact in float32 too, and half the memory
            narrow = narrow[: len(values)]
            np.multiply(values, np.float32(math.ldexp(1.0, self.digits)), out=narrow)
            np.rint(narrow, out=narrow)
            np.copyto(wide, narrow)
        else:
            np.multiply(values, math.ldexp(self.weight, self.digits), out=wide, dtype=np.float64)
            np.rint(wide, out=wide)
        return wide


class Fold:
    """The weighted mean of updates shaped like `like`, whose values are around `unit`: public, any power of two near it.

    Parameters
    ----------
    threads
        How many work on a large update side by side; they change no bit. Without it, as many as there are processors, up to
        `MOST_THREADS`.
    """

    def __init__(self, like: Arrays, unit: float = 1.0, threads: int | None = None) -> None:
        power = math.floor(math.log2(unit))
        self._scale = Scale(DIGITS - power, math.ldexp(LARGEST, power))
        self._shapes = {name: array.shape for name, array in like.items()}
        self._blocks = list(_blocks(self._shapes))
        self._weight = Fraction(0)
        size = sum(len(block.sums) for block in self._blocks)
        wanted = min(MOST_THREADS, len(os.sched_getaffinity(0))) if threads is None else threads
        self._kernel = kernel.compiled() if size >= WORTH else None
        self._shares = _shares(self._blocks, wanted if size >= WORTH else 1)

    def add(self, update: Arrays, weight: float = 1.0, factor: float = 1.0) -> None:
        """Add `factor` times an update, for `weight` in (0, 1] of the mean; both are public.

        Raises
        ------
        UpdateError
            Nothing of the update is in the mean then. It rests on this update alone, not on those before it.
        """
        if {name: array.shape for name, array in update.items()} != self._shapes:
            raise UpdateError("the update's arrays are not the ones that were asked for.")
        flat = {name: np.ravel(array) for name, array in update.items()}
        scale = Scale(self._scale.digits, self._scale.largest, weight * factor)
        added = self._side_by_side(partial(_add, flat, scale, self._kernel), self._shares)
        bad = [share[count] for share, count in zip(self._shares, added, strict=True) if count < len(share)]
        if bad:
            sound = [share[:count] for share, count in zip(self._shares, added, strict=True)]
            self._side_by_side(partial(_take_back, flat, scale), sound)
            raise UpdateError(fault(bad[0].name, flat[bad[0].name], scale.largest))
        self._weight += Fraction(weight)

    def mean(self) -> Arrays:
        """Return the weighted mean, float32; at least one update must have been added."""
        weight, step = float(self._weight), math.ldexp(1.0, -self._scale.digits)
        held = {name: np.empty(math.prod(shape), np.float32) for name, shape in self._shapes.items()}
        for block in self._blocks:
            held[block.name][block.part] = block.total() * step / weight
        return {name: held[name].reshape(shape) for name, shape in self._shapes.items()}

    def _side_by_side(self, work: Callable[[Sequence[Block]], int], shares: Sequence[Sequence[Block]]) -> list[int]:
        if len(shares) == 1:
            return [work(shares[0])]
        with ThreadPoolExecutor(len(shares)) as pool:  # numpy lets other threads run while it computes
            return list(pool.map(work, shares))


def fault(name: str, values: npt.NDArray[np.float32], largest: float) -> str | None:
    """Say what is wrong with an array of an update whose values may be at most `largest`; None where nothing is."""
    with np.errstate(invalid="ignore"):
        low, high = values.min(initial=0.0), values.max(initial=0.0)
    if -largest <= low and high <= largest:
        return None
    if np.isfinite(low) and np.isfinite(high):
        return f"the update of {name!r} is above {largest:g}; lower the learning rate."
    return f"the update of {name!r} is not finite."


def _add(flat: Arrays, scale: Scale, loops: Kernel | None, share: Sequence[Block]) -> int:
    """Add an update to blocks up to the first where it is unsound; return how many that are."""
    narrow, wide = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float64)
    step = math.ldexp(scale.weight, scale.digits)
    for count, block in enumerate(share):
        values = flat[block.name][block.part]
        largest = _largest(values, loops)
        if not largest <= scale.largest:  # nor where it is no number
            return count
        block.make_room(largest * step + 1)
        if loops is None:
            block.sums += scale.steps(values, narrow, wide)
        else:
            loops.add(values, block.sums, step)
    return len(share)


def _largest(values: npt.NDArray[np.float32], loops: Kernel | None) -> float:
    """Return the largest of values without their sign; what is no number, if one is."""
    if loops is not None:
        return float(np.int32(loops.largest(values.view(np.int32))).view(np.float32))
    with np.errstate(invalid="ignore"):
        low, high = float(values.min()), float(values.max())
    return high if math.isnan(high) else max(-low, high)


def _take_back(flat: Arrays, scale: Scale, share: Sequence[Block]) -> int:
    """Undo `_add`: what was added without rounding is subtracted without rounding."""
    narrow, wide = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float64)
    for block in share:
        block.sums -= scale.steps(flat[block.name][block.part], narrow, wide)
    return len(share)


def _blocks(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Block]:
    for name, shape in shapes.items():
        sums = np.zeros(math.prod(shape))
        for start in range(0, len(sums), BLOCK):
            part = slice(start, min(start + BLOCK, len(sums)))
            yield Block(name, part, sums[part])


def _shares(blocks: list[Block], count: int) -> list[list[Block]]:
    """Deal blocks out, in order, to `count` shares of about as many values."""
    size, done = sum(len(block.sums) for block in blocks), 0
    shares: list[list[Block]] = [[] for _ in range(count)]
    for block in blocks:
        shares[min(count - 1, done * count // max(1, size))].append(block)
        done += len(block.sums)
    return shares
