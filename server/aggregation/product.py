"""The mean of low-rank adapters whose two factors are both trained: the mean of their products.

A site's adapter adds s B A to a frozen weight. The mean of the sites' B times the mean of their A is another matrix than the
mean of the products (Sun et al. 2024, "Improving LoRA in privacy-preserving federated learning", section 3), so each update
is multiplied out before it is folded in, exactly as any other array is, and the mean product is split again: the best of its
rank is its truncated singular value decomposition (Eckart and Young 1936). The constant s goes with the mean.

Memory: a matrix as large as the adapted weight, for each of them, instead of its two thin factors.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.aggregation.fold import Fold, UpdateError
from shared.arrays import Arrays

A, B = ".lora_A.", ".lora_B."
NOTHING = 1e-6  # of the largest singular value: below it a direction is float32's rounding
SAME = 1e-3  # of a row that is left beside others: below it, it is one of them but for rounding
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """Names of an adapter's two factors."""

    a: str
    b: str


def pairs(names: tuple[str, ...]) -> dict[str, Pair]:
    """Return the adapters both of whose factors are among `names`, under their names without the factor."""
    found = {name.replace(A, "."): name for name in names if A in name}
    return {product: Pair(name, other) for product, name in found.items() if (other := name.replace(A, B)) in names}


class ProductFold:
    """A `Fold` of updates in which each pair's two arrays stand for one product: what it adds to the product of `start`."""

    def __init__(self, start: Arrays, found: Mapping[str, Pair], like: Arrays, unit: float = 1.0) -> None:
        self._start, self._pairs = start, found
        self._factors = {name: like[name].shape for pair in found.values() for name in (pair.a, pair.b)}
        self._others = [name for name in like if name not in self._factors]
        shapes: Arrays = {name: like[name] for name in self._others}
        for name, pair in found.items():
            a, b = _flat(start[pair.a]), _flat(start[pair.b])
            shapes[name] = np.broadcast_to(np.float32(0), (b.shape[0], a.shape[1]))
        self._fold = Fold(shapes, unit)

    def add(self, update: Arrays, weight: float = 1.0, factor: float = 1.0) -> None:
        """Add `factor` times what one update adds to the products, for `weight` of the mean, as `Fold.add` does.

        Raises
        ------
        UpdateError
            Nothing of the update is in the mean then.
        """
        factors = {name: array.shape for name, array in update.items() if name in self._factors}
        if factors != self._factors or update.keys() - factors.keys() != set(self._others):
            raise UpdateError("the update's arrays are not the ones that were asked for.")
        multiplied: Arrays = {name: update[name] for name in self._others}
        with np.errstate(over="ignore", invalid="ignore"):  # the fold looks for what is not finite
            for name, pair in self._pairs.items():
                a, b = _flat(self._start[pair.a]), _flat(self._start[pair.b])
                moved = (b + _flat(update[pair.b])) @ (a + _flat(update[pair.a]))
                multiplied[name] = (moved - b @ a).astype(np.float32)
        self._fold.add(multiplied, weight, factor)

    def mean(self) -> Arrays:
        """Return the weighted mean, float32: of each pair, under its product's name, of shape (outputs, inputs)."""
        return self._fold.mean()


def moved(iterate: Arrays, pair: Pair, update: npt.NDArray[np.float32], rate: float) -> Arrays:
    """Return a pair's factors after its product has moved by `rate` times `update`, (outputs, inputs)."""
    a, b = _flat(iterate[pair.a]), _flat(iterate[pair.b])
    new_b, new_a = split(b @ a + rate * update.astype(np.float64), a)
    return {
        name: np.ascontiguousarray(new, np.float32).reshape(iterate[name].shape)
        for name, new in ((pair.a, new_a), (pair.b, new_b))
    }


def split(product: Matrix, before: Matrix) -> tuple[Matrix, Matrix]:
    """Split a product (m, n) into B (m, r) and A (r, n), the best of the rank of `before`, which is A until now.

    The rows of A are orthogonal and as long as those of `before` are in the mean, and each row's largest value has the sign
    plus: the same product has the same factors, whatever it came from. Where the product has fewer directions than A has rows,
    the others are `before`'s own, made orthogonal, and their columns of B are zero: the next round can fill them.
    """
    rank = len(before)
    left, sizes, right = np.linalg.svd(product, full_matrices=False)
    kept = min(rank, int(np.sum(sizes > NOTHING * sizes[0]))) if sizes[0] > 0 else 0
    length = float(np.sqrt(np.mean(np.sum(before**2, axis=1))))
    rows = _completed(right[:kept], before)
    signs = np.where(np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1) < 0, -1.0, 1.0)
    b = np.zeros((len(product), rank))
    b[:, :kept] = left[:, :kept] * sizes[:kept] * signs[:kept, 0] / length
    return b, rows * signs * length


def _completed(rows: Matrix, before: Matrix) -> Matrix:
    """Return as many orthonormal rows as `before` has: these, which are so, and then what of `before` is another direction."""
    found = list(rows)
    for candidate in (*before, *np.eye(before.shape[1])) if len(rows) < len(before) else ():
        rest = candidate
        for _ in range(2):  # once leaves rounding behind
            rest = rest - sum((row * (row @ rest) for row in found), np.zeros_like(rest))
        if len(found) < len(before) and np.linalg.norm(rest) > SAME * np.linalg.norm(candidate):
            found.append(rest / np.linalg.norm(rest))
    return np.stack(found)


def _flat(array: npt.NDArray[np.float32]) -> Matrix:
    """A factor as a matrix: of a convolution, (r, channels, height, width) or (channels, r, 1, 1)."""
    return array.reshape(len(array), -1).astype(np.float64)
