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
CALIBRATION_GROUPS = 15


@dataclass(frozen=True)
class Score:
    """One score; `low` and `high` bound it at 95 % where noise was added to the counts."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def cells(probabilities: npt.NDArray[Any], labels: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Return each record's flat cell (N,) in a histogram of `shape` (C, C, K).

    `probabilities` are (N, C), the true `labels` (N,). A probability that is not a number counts as unsure: every
    record has its one cell, whatever the model.
    """
    classes, _, bins = shape
    if not len(labels):
        return np.zeros(0, dtype=np.int64)
    predicted = probabilities.argmax(1)
    confidence = probabilities[np.arange(len(labels)), predicted]
    place = (confidence - 1 / classes) / (1 - 1 / classes) * bins
    bin_of = np.clip(np.nan_to_num(place, nan=0.0), 0, bins - 1).astype(np.int64)
    found: npt.NDArray[np.int64] = (labels.astype(np.int64) * classes + predicted) * bins + bin_of
    return found


def label_cells(
    probabilities: npt.NDArray[Any], labels: npt.NDArray[Any], shape: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    """Return each record's flat cells (N, C), one a label, in a histogram of `shape` (C, 2, K).

    `probabilities` (N, C) are each label's own, `labels` (N, C) are 0 or 1; the bins split [0, 1] evenly.
    """
    classes, _, bins = shape
    bin_of = np.clip(np.nan_to_num(probabilities * bins, nan=bins / 2), 0, bins - 1).astype(np.int64)
    found: npt.NDArray[np.int64] = (np.arange(classes) * 2 + labels.astype(np.int64)) * bins + bin_of
    return found


def count(probabilities: npt.NDArray[Any], labels: npt.NDArray[Any], bins: int) -> Counts:
    """Count records, one a row of `probabilities` (N, C) with true `labels` (N,), into (C, C, bins)."""
    classes = probabilities.shape[1]
    found = np.bincount(cells(probabilities, labels, (classes, classes, bins)), minlength=classes * classes * bins)
    return found.astype(np.float64).reshape(classes, classes, bins)


def scores(counts: Counts, noise: float = 0.0) -> list[Score]:
    """All scores of a classifier's histogram whose cells each carry Gaussian noise of deviation `noise`.

    Accuracy; macro precision, recall and F1; expected calibration error; for two labels the area under
    the ROC curve (ties within a bin count half). An interval comes from adding the same noise once more,
    many times, and reading the spread around the score: it covers the noise, not the sampling of records.
    """
    return with_intervals(_all, counts, noise)


def with_intervals(
    find: Callable[[Counts], dict[str, Counts]], counts: Counts, noise: float, *, highest: float = 1.0
) -> list[Score]:
    """Scores that `find` makes of counts (..., *cells), each of shape (...), with the interval that the noise leaves."""
    values = {name: float(value) for name, value in find(counts).items()}
    if noise == 0:
        return [Score(name, value) for name, value in values.items()]
    # A fixed generator: this randomises a confidence interval, it protects nothing.
    draws = find(counts + np.random.default_rng(0).normal(0, noise, (DRAWS, *counts.shape)))
    spread = {name: 1.96 * float(np.std(drawn)) for name, drawn in draws.items()}
    return [
        Score(name, value, max(0.0, value - spread[name]), min(highest, value + spread[name]))
        for name, value in values.items()
    ]


def label_scores(counts: Counts, noise: float = 0.0) -> list[Score]:
    """Scores of a multi-label histogram (C, 2, K): label, whether a record has it, bin of its probability.

    Micro and macro F1, precision and recall at a probability of one half.
    """
    return with_intervals(_of_labels, counts, noise)


def _of_labels(counts: Counts) -> dict[str, Counts]:
    half = counts.shape[-1] // 2
    hits, wrong = counts[..., 1, half:].sum(-1), counts[..., 0, half:].sum(-1)  # (..., C)
    held = counts[..., 1, :].sum(-1)
    precision, recall = _share(hits, hits + wrong), _share(hits, held)
    all_precision, all_recall = _share(hits.sum(-1), (hits + wrong).sum(-1)), _share(hits.sum(-1), held.sum(-1))
    return {
        "f1_micro": _share(2 * all_precision * all_recall, all_precision + all_recall),
        "f1": _share(2 * precision * recall, precision + recall).mean(-1),
        "precision": precision.mean(-1),
        "recall": recall.mean(-1),
    }


def accuracy(counts: Counts) -> Counts:
    """Share of records on the diagonal, shape (...)."""
    return _share(np.trace(counts.sum(-1), axis1=-2, axis2=-1), counts.sum((-3, -2, -1)))


def auc(counts: Counts) -> Counts:
    """Area under the ROC curve of label 1 against label 0, from binned scores (Mann-Whitney, ties half), shape (...)."""
    # Ascending probability of label 1: predicted 0 from sure to unsure, then predicted 1 from unsure to sure.
    ordered = np.concatenate([counts[..., 0, ::-1], counts[..., 1, :]], axis=-1)
    negative, positive = ordered[..., 0, :], ordered[..., 1, :]
    below = np.cumsum(negative, axis=-1) - negative
    return _share((positive * (below + negative / 2)).sum(-1), negative.sum(-1) * positive.sum(-1))


def calibration_error(counts: Counts) -> Counts:
    """Mean gap between confidence and accuracy over at most 15 groups of bins (Guo et al. 2017, section 2), shape (...).

    Finer groups would hold few records each, and count their chance as miscalibration.
    """
    classes, _, bins = counts.shape[-3:]
    centres = 1 / classes + (1 - 1 / classes) * (np.arange(bins) + 0.5) / bins
    right, held = np.einsum("...iik->...k", counts), counts.sum((-3, -2))
    starts = np.unique(np.arange(CALIBRATION_GROUPS) * bins // CALIBRATION_GROUPS)
    gaps = np.add.reduceat(right - centres * held, starts, axis=-1)
    return _share(np.abs(gaps).sum(-1), counts.sum((-3, -2, -1)))


def _all(counts: Counts) -> dict[str, Counts]:
    """Every score by name, each of shape (...), of histograms (..., C, C, K)."""
    precision, recall, f1 = _macro(counts)
    found = {"accuracy": accuracy(counts), "f1": f1, "precision": precision, "recall": recall}
    found["calibration_error"] = calibration_error(counts)
    return found | ({"auc": auc(counts)} if counts.shape[-2] == 2 else {})


def _macro(counts: Counts) -> tuple[Counts, Counts, Counts]:
    confusion = counts.sum(-1)
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    precision, recall = _share(right, confusion.sum(-2)), _share(right, confusion.sum(-1))
    f1 = _share(2 * precision * recall, precision + recall)
    return precision.mean(-1), recall.mean(-1), f1.mean(-1)


def _share(part: Counts, whole: Counts) -> Counts:
    """`part / whole` within [0, 1]: noise can push a count below zero, and a rate has its bounds; 0 of nothing."""
    return np.clip(np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0), 0.0, 1.0)
