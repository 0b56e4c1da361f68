"""Scores from a histogram of predictions.

A histogram counts records by (true label, predicted label, bin of the predicted label's probability),
shape (C, C, K); the bins split [1/C, 1] evenly. It is all that a site releases of an evaluation: every
score here is post-processing of it, and a sum of sites' histograms is a histogram. Where noise was
added, a score carries the interval that the noise leaves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.float64]
DRAWS = 400  # noise patterns behind an interval


@dataclass(frozen=True)
class Score:
    """One score; `low` and `high` bound it at 95 % where noise was added to the counts."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def count(probabilities: npt.NDArray[Any], labels: npt.NDArray[Any], bins: int) -> Counts:
    """Count records, one a row of `probabilities` (N, C) with true `labels` (N,), into (C, C, bins).

    Each record adds 1 to one cell: adding or removing a record changes the counts by 1 in L2 norm.
    """
    classes = probabilities.shape[1]
    counts = np.zeros((classes, classes, bins))
    if len(labels):
        predicted = probabilities.argmax(1)
        confidence = probabilities[np.arange(len(labels)), predicted]
        place = (confidence - 1 / classes) / (1 - 1 / classes) * bins
        np.add.at(counts, (labels, predicted, np.clip(place, 0, bins - 1).astype(int)), 1.0)
    return counts


def scores(counts: Counts, noise: float = 0.0) -> list[Score]:
    """All scores of a histogram whose cells each carry Gaussian noise of deviation `noise`.

    Accuracy; macro precision, recall and F1; expected calibration error; for two labels the area under
    the ROC curve (ties within a bin count half). An interval comes from adding the same noise once more,
    many times, and reading the spread around the score: it covers the noise, not the sampling of records.
    """
    functions: dict[str, Callable[[Counts], float]] = {
        "accuracy": accuracy,
        "f1": lambda cells: _macro(cells)[2],
        "precision": lambda cells: _macro(cells)[0],
        "recall": lambda cells: _macro(cells)[1],
        "calibration_error": calibration_error,
    }
    if counts.shape[0] == 2:
        functions["auc"] = auc
    values = {name: function(counts) for name, function in functions.items()}
    if noise == 0:
        return [Score(name, value) for name, value in values.items()]
    # A fixed generator: this randomises a confidence interval, it protects nothing.
    draws = counts + np.random.default_rng(0).normal(0, noise, (DRAWS, *counts.shape))
    found = []
    for name, function in functions.items():
        deviation = float(np.std([function(draw) for draw in draws]))
        low, high = values[name] - 1.96 * deviation, values[name] + 1.96 * deviation
        found.append(Score(name, values[name], max(0.0, low), min(1.0, high)))
    return found


def accuracy(counts: Counts) -> float:
    """Share of records on the diagonal."""
    return _share(np.trace(counts.sum(2)), counts.sum())


def auc(counts: Counts) -> float:
    """Area under the ROC curve of label 1 against label 0, from binned scores (Mann-Whitney, ties half)."""
    # Ascending probability of label 1: predicted 0 from sure to unsure, then predicted 1 from unsure to sure.
    ordered = np.concatenate([counts[:, 0, ::-1], counts[:, 1, :]], axis=1)
    negative, positive = ordered
    below = np.cumsum(negative) - negative
    return _share(float((positive * (below + negative / 2)).sum()), negative.sum() * positive.sum())


def calibration_error(counts: Counts) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over the bins (Guo et al. 2017)."""
    classes, _, bins = counts.shape
    centres = 1 / classes + (1 - 1 / classes) * (np.arange(bins) + 0.5) / bins
    right, held = np.einsum("iik->k", counts), counts.sum((0, 1))
    return _share(float(np.abs(right - centres * held).sum()), counts.sum())


def _macro(counts: Counts) -> tuple[float, float, float]:
    confusion = counts.sum(2)
    right = np.diag(confusion)
    precision = [_share(hit, total) for hit, total in zip(right, confusion.sum(0), strict=True)]
    recall = [_share(hit, total) for hit, total in zip(right, confusion.sum(1), strict=True)]
    f1 = [_share(2 * p * r, p + r) for p, r in zip(precision, recall, strict=True)]
    return float(np.mean(precision)), float(np.mean(recall)), float(np.mean(f1))


def _share(part: float, whole: float) -> float:
    """`part / whole` within [0, 1]: noise can push a count below zero, and a rate has its bounds."""
    return float(min(1.0, max(0.0, part / whole))) if whole > 0 else 0.0
