"""Rules for sites' updates of which some may be hostile, on a matrix of all: (sites, columns), float32, finite.

Each gives the same bits for the same matrix. That the sites lie in it by their names, whoever came first, is up to the
caller.
"""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
Values = npt.NDArray[np.float64]


def median(block: Matrix) -> Values:
    """Coordinate-wise median, (columns,): of an even number, the mean of the two in the middle.

    Yin et al. 2018, "Byzantine-robust distributed learning: towards optimal statistical rates". While fewer than half of the
    sites are hostile, each coordinate is between two honest sites'.
    """
    return trimmed_mean(block, (len(block) - 1) // 2)


def trimmed_mean(block: Matrix, out: int) -> Values:
    """Coordinate-wise mean, (columns,), without the `out` smallest and the `out` largest values (Yin et al. 2018).

    While at most `out` sites are hostile, each coordinate is between two honest sites'.
    """
    ordered = np.sort(np.ascontiguousarray(block.T), axis=1)
    return np.asarray(ordered[:, out : len(block) - out].mean(axis=1, dtype=np.float64))


def products(blocks: Iterable[Matrix]) -> Values:
    """Products of the sites' updates with one another, (sites, sites), from their columns block by block."""
    total: Values | None = None
    for block in blocks:
        wide = block.astype(np.float64)
        total = wide @ wide.T if total is None else total + wide @ wide.T
    return np.zeros((0, 0)) if total is None else total


def krum(products: Values, bad: int) -> list[int]:
    """Return the sites, by their rows, that Multi-Krum takes the mean of, when `bad` of them may be hostile.

    A site's score is the sum of its squared distances to the n - f - 2 sites nearest to it; the n - f - 2 of the smallest scores
    are taken, the earlier row where two are equal. Blanchard et al. 2017, "Machine learning with adversaries: Byzantine
    tolerant gradient descent"; that many may be taken by Damaskinos et al. 2019, "AggregaThor", section 3. It needs
    n >= 2 f + 3, and costs n^2 multiplications a parameter.
    """
    count = len(products)
    nearest = count - bad - 2
    norms = np.diag(products)
    distances = np.maximum(norms[:, None] + norms[None, :] - 2 * products, 0.0)
    np.fill_diagonal(distances, np.inf)  # a site is not its own neighbour
    scores = np.sort(distances, axis=1)[:, :nearest].sum(axis=1)
    return sorted(np.argsort(scores, kind="stable")[:nearest].tolist())


def norm(update: Iterable[Matrix], block: int = 2**16) -> float:
    """L2 norm of an update's arrays together; not finite where a value is not."""
    squares = 0.0
    for array in update:
        flat = array.reshape(-1)
        for start in range(0, len(flat), block):
            wide = flat[start : start + block].astype(np.float64)
            squares += float(wide @ wide)
    return math.sqrt(squares)
