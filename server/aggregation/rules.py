"""How a round's updates become one, as the run's configuration says: a rule takes them as they come, and gives their mean.

`mean` and `norm-bound` fold each update in and forget it. `median`, `trimmed-mean` and `multi-krum` keep all of a round on the
disk, and read them back by columns in the order of the sites' names: so whoever came first changes no bit, and memory
does not grow with the number of sites.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from server.aggregation import product, robust
from server.aggregation.fold import LARGEST, Fold, UpdateError, fault
from server.aggregation.product import Pair, ProductFold
from server.aggregation.spill import Spill
from shared.arrays import Arrays
from shared.errors import RunFailedError
from shared.run_config import Federation, RunConfig

MEMORY = 2**26  # bytes of updates that are read back at once
EACH = 24  # bytes of memory a value, while columns are sorted or multiplied


class Rule(Protocol):
    """Takes a round's updates, and gives what the server's step takes for their mean."""

    def add(self, update: Arrays, weight: float, site: str, factor: float = 1.0) -> None:
        """Take `factor` times a site's update in, for `weight` of the mean; raises `UpdateError`, where nothing of it counts."""

    def mean(self) -> Arrays:
        """Return the updates' mean, or what stands for it."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Sites whose updates count for nothing in that mean."""

    @property
    def pairs(self) -> Mapping[str, Pair]:
        """Which of the mean's arrays are products, and of which factors."""


class Mean:
    """The weighted mean, streaming: of updates no longer than `bound` (L2), where there is one.

    A longer one is shortened to it, whatever it says: Sun et al. 2019, "Can you really backdoor federated learning?". A
    hostile site moves the mean by at most `bound` times its share.
    """

    left_out = ()

    def __init__(self, fold: Fold | ProductFold, pairs: Mapping[str, Pair], bound: float | None = None) -> None:
        self.pairs = pairs
        self._fold, self._bound = fold, bound

    def add(self, update: Arrays, weight: float, site: str, factor: float = 1.0) -> None:  # noqa: ARG002 - as `Rule`'s
        """Fold an update in."""
        if self._bound is not None:
            length = robust.norm(update.values())
            factor *= self._bound / length if self._bound < length < math.inf else 1.0
        self._fold.add(update, weight, factor)

    def mean(self) -> Arrays:
        """Return the mean."""
        return self._fold.mean()


class Gathered:
    """A rule that needs all updates at once, and counts each site once."""

    pairs: Mapping[str, Pair] = {}

    def __init__(self, federation: Federation, like: Arrays, unit: float, folder: Path) -> None:
        self._federation = federation
        self._shapes = {name: array.shape for name, array in like.items()}
        self._width = sum(math.prod(shape) for shape in self._shapes.values())
        self._largest = math.ldexp(LARGEST, math.floor(math.log2(unit)))
        self._spill = Spill(folder, self._width)
        self._rows: dict[str, int] = {}
        self.left_out: tuple[str, ...] = ()

    def add(self, update: Arrays, weight: float, site: str, factor: float = 1.0) -> None:  # noqa: ARG002 - each counts once
        """Write an update down.

        Raises
        ------
        UpdateError
            Where it is not finite, too large, or not what was asked for; as `Fold`.
        MachineError
            Where the disk does not take it.
        """
        if {name: array.shape for name, array in update.items()} != self._shapes:
            raise UpdateError("the update's arrays are not the ones that were asked for.")
        for name, array in update.items():
            if (wrong := fault(name, array, self._largest)) is not None:
                raise UpdateError(wrong)
        self._rows[site] = self._spill.add([update[name] for name in self._shapes])

    def mean(self) -> Arrays:
        """Return what the rule makes of the updates.

        Raises
        ------
        RunFailedError
            Where there are too few for what it promises.
        """
        rule, sites = self._federation.aggregation, sorted(self._rows)
        if len(sites) < self._federation.least:
            raise RunFailedError(
                f"federation.aggregation={rule!r} needs {self._federation.least} updates, and {len(sites)} are there; set "
                "federation.on_shortfall='wait', or take another rule."
            )
        rows = [self._rows[site] for site in sites]
        result = np.empty(self._width, np.float32)
        if rule == "multi-krum":
            bad = self._federation.presumed_bad or 0
            taken = robust.krum(robust.products(block for _, block in self._columns(rows)), bad)
            self.left_out = tuple(site for row, site in enumerate(sites) if row not in taken)
            rows = [rows[row] for row in taken]
        for part, block in self._columns(rows):
            if rule == "multi-krum":
                result[part] = block.mean(axis=0, dtype=np.float64)
            elif rule == "trimmed-mean":
                result[part] = robust.trimmed_mean(block, self._federation.trimmed(len(rows)))
            else:
                result[part] = robust.median(block)
        ends = np.cumsum([math.prod(shape) for shape in self._shapes.values()])[:-1]
        parts = np.split(result, ends)
        return {name: values.reshape(shape) for (name, shape), values in zip(self._shapes.items(), parts, strict=True)}

    def _columns(self, rows: list[int]) -> Iterator[tuple[slice, robust.Matrix]]:
        wide = max(1, MEMORY // (EACH * len(rows)))
        for start in range(0, self._width, wide):
            part = slice(start, min(start + wide, self._width))
            yield part, self._spill.columns(rows, part)

    def close(self) -> None:
        """Forget the updates."""
        self._spill.close()


@contextmanager
def chosen(config: RunConfig, number: int, iterate: Arrays, like: Arrays, folder: Path) -> Iterator[Rule]:
    """Give the rule of round `number`.

    Parameters
    ----------
    iterate
        What the sites train from.
    like
        Arrays of the shapes that an update has.
    folder
        Where a rule may keep updates meanwhile; nothing is left there.

    Raises
    ------
    MachineError
        Where that folder cannot be written to.
    """
    name, phase, _ = config.place(number)
    unit, federation = phase.learning_rate * phase.clipping_norm, config.federation
    if federation.gathers:
        rule = Gathered(federation, like, unit, folder)
        try:
            yield rule
        finally:
            rule.close()
    elif config.products and name == "training":
        found = product.pairs(tuple(like))
        yield Mean(ProductFold(iterate, found, like, unit), found)
    else:
        yield Mean(Fold(like, unit), {}, federation.norm_bound)
