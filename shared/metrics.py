"""Scores of a classifier from a histogram of predictions.

With one label a record, a histogram counts records by (true label, predicted label, bin of the predicted label's
probability), shape (C, C, K); the bins split [1/C, 1] evenly. With any number of labels it counts, for each label, records by
(whether they have it, bin of its probability), shape (C, 2, K); the bins split [0, 1] evenly. It is all that a site releases
of an evaluation: every score here is post-processing of it, and a sum of sites' histograms is a histogram. Where noise was
added, a score carries the interval that the noise leaves.

`f1`, `precision` and `recall` are means over labels (macro), `auc` is of the ROC curve and `pr_auc` average precision. What
a histogram cannot tell is left out: with three labels or more it keeps the probability of the predicted label alone, so that
there is no ROC curve of one against the rest; and with one label a record, micro F1, precision and recall all are the accuracy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.curves import average_precision, calibration_error, roc_auc, share

Counts = npt.NDArray[np.float64]
DRAWS = 400  # noise patterns behind an interval
VALUES = 2**22  # of draws side by side: a histogram of many labels takes fewer at once
LOWEST = {"mcc": -1.0}  # of a score; 0 of any other


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

    `probabilities` (N, C) are each label's own, `labels` (N, C) are 0 or 1.
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
    """All scores of a histogram (C, C, K) whose cells each carry Gaussian noise of deviation `noise`.

    Accuracy; macro F1, precision and recall; Matthews's correlation coefficient; expected calibration error; for two labels
    the areas under the ROC and the precision-recall curve of the second one.
    """
    return with_intervals(_of_one, counts, noise)


def label_scores(counts: Counts, noise: float = 0.0) -> list[Score]:
    """All scores of a multi-label histogram (C, 2, K), noised likewise.

    Micro and macro F1, precision and recall at a probability of one half; the mean over labels of the areas under their ROC
    and precision-recall curves (over those that some records have and others have not) and of their calibration errors.
    """
    return with_intervals(_of_labels, counts, noise)


def with_intervals(
    find: Callable[[Counts], dict[str, Counts]], counts: Counts, noise: float, *, highest: float = 1.0
) -> list[Score]:
    """Scores that `find` makes of counts (..., *cells), each of shape (...), with the interval that the noise leaves.

    The interval comes from adding the same noise once more, many times, and reading the spread around the score: it covers
    the noise, not the sampling of records. Beyond a bound there is no spread, and noise that spoils a ranking moves its score to
    one side: the spread is that of the side to which the score moves further, and taken to both.
    """
    values = {name: float(value) for name, value in find(counts).items()}
    if noise == 0:
        return [Score(name, value) for name, value in values.items()]
    # A fixed generator: this randomises a confidence interval, it protects nothing.
    random = np.random.default_rng(0)
    drawn: dict[str, list[Counts]] = {name: [] for name in values}
    at_once = max(1, min(DRAWS, VALUES // max(1, counts.size)))
    for start in range(0, DRAWS, at_once):
        noised = counts + random.normal(0, noise, (min(at_once, DRAWS - start), *counts.shape))
        for name, found in find(noised).items():
            drawn[name].append(found)
    return [_bounded(name, value, np.concatenate(drawn[name]), highest) for name, value in values.items()]


def thresholds(counts: Counts, noise: float = 0.0, *, many: bool = False) -> npt.NDArray[np.float64]:
    """Return the probability from which on a record is taken to have a label, such that F1 is highest: post-processing.

    Of `many` labels a record, counts (C, 2, K), one threshold a label, (C,); of two labels, counts (2, 2, K), that of the
    second, (1,); of more, none, (0,). They lie on the edges of bins. Where the cells carry noise of deviation `noise`, one
    half stays unless F1 is higher elsewhere by more than the noise alone makes of it.
    """
    if many:
        by_score = counts
    elif counts.shape[0] == 2:
        # Ascending probability of the second label, as in `_of_one`: (1, 2, 2 K).
        by_score = np.concatenate([counts[:, 0, ::-1], counts[:, 1, :]], axis=-1)[None]
    else:
        return np.zeros(0)
    bins = by_score.shape[-1]
    half = _half(bins)
    found = _f1_from(by_score)
    best = (found - 1e-9 * np.abs(np.arange(bins) - half)).argmax(-1)  # of equals the nearest to one half
    gain = np.take_along_axis(found, best[:, None], -1)[:, 0] - found[:, half]
    least = np.zeros(len(found))
    if noise > 0:  # a fixed generator, as in `with_intervals`
        drawn = _f1_from(by_score + np.random.default_rng(0).normal(0, noise, (DRAWS, *by_score.shape)))
        apart = np.take_along_axis(drawn, best[None, :, None], -1)[..., 0] - drawn[..., half]
        least = 1.96 * apart.std(0)
    places: Counts = np.where(gain > least, best / bins, 0.5)
    return places


def _f1_from(by_score: Counts) -> Counts:
    """F1 (..., C, K) of taking records from each bin on for positive, of counts (..., C, 2, K) by ascending score."""
    above = np.cumsum(by_score[..., ::-1], axis=-1)[..., ::-1]
    wrong, hits = above[..., 0, :], above[..., 1, :]
    return share(2 * hits, wrong + hits + hits[..., :1])


def _bounded(name: str, value: float, drawn: Counts, highest: float) -> Score:
    moved = drawn - value
    sides = (np.sqrt(2 * np.mean(np.clip(side, 0, None) ** 2)) for side in (moved, -moved))
    reach = 1.96 * float(max(sides))
    return Score(name, value, max(LOWEST.get(name, 0.0), value - reach), min(highest, value + reach))


def _of_one(counts: Counts) -> dict[str, Counts]:
    """Every score by name, each of shape (...), of histograms (..., C, C, K)."""
    classes, _, bins = counts.shape[-3:]
    confusion = counts.sum(-1)
    right, total = np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum((-2, -1))
    true, predicted = confusion.sum(-1), confusion.sum(-2)
    precision, recall, f1 = _rates(right, predicted, true)
    centres = 1 / classes + (1 - 1 / classes) * (np.arange(bins) + 0.5) / bins
    found = {
        "accuracy": share(right.sum(-1), total),
        "f1": f1.mean(-1),
        "precision": precision.mean(-1),
        "recall": recall.mean(-1),
        "mcc": _correlation(right.sum(-1), total, true, predicted),
        "calibration_error": calibration_error(counts.sum((-3, -2)), np.einsum("...iik->...k", counts), centres),
    }
    if classes == 2:
        # Ascending probability of label 1: predicted 0 from sure to unsure, then predicted 1 from unsure to sure.
        ordered = np.concatenate([counts[..., 0, ::-1], counts[..., 1, :]], axis=-1)
        negative, positive = ordered[..., 0, :], ordered[..., 1, :]
        found |= {"auc": roc_auc(negative, positive), "pr_auc": average_precision(negative, positive)}
    return found


def _of_labels(counts: Counts) -> dict[str, Counts]:
    """Every score by name, each of shape (...), of histograms (..., C, 2, K)."""
    bins = counts.shape[-1]
    negative, positive = counts[..., 0, :], counts[..., 1, :]  # (..., C, K)
    hits, held, absent = positive[..., _half(bins) :].sum(-1), positive.sum(-1), negative.sum(-1)
    chosen = hits + negative[..., _half(bins) :].sum(-1)
    precision, recall, f1 = _rates(hits, chosen, held)
    every = _rates(hits.sum(-1), chosen.sum(-1), held.sum(-1))
    ranked = (held > 0) & (absent > 0)

    def mean_of_ranked(each: Counts) -> Counts:
        return share((each * ranked).sum(-1), ranked.sum(-1).astype(np.float64))

    off = calibration_error(negative + positive, positive, (np.arange(bins) + 0.5) / bins)
    return {
        "f1": f1.mean(-1),
        "f1_micro": every[2],
        "precision": precision.mean(-1),
        "precision_micro": every[0],
        "recall": recall.mean(-1),
        "recall_micro": every[1],
        "auc": mean_of_ranked(roc_auc(negative, positive)),
        "pr_auc": mean_of_ranked(average_precision(negative, positive)),
        "calibration_error": off.mean(-1),
    }


def _half(bins: int) -> int:
    """First bin of a probability of at least one half; of an odd number, the one in the middle counts as below."""
    return (bins + 1) // 2


def _rates(right: Counts, predicted: Counts, true: Counts) -> tuple[Counts, Counts, Counts]:
    """Precision, recall and F1."""
    precision, recall = share(right, predicted), share(right, true)
    return precision, recall, share(2 * precision * recall, precision + recall)


def _correlation(right: Counts, total: Counts, true: Counts, predicted: Counts) -> Counts:
    """Matthews's correlation coefficient of any number of labels (Gorodkin 2004), within [-1, 1]; 0 where it has none."""
    covariance = right * total - (true * predicted).sum(-1)
    spreads = (total**2 - (true**2).sum(-1)) * (total**2 - (predicted**2).sum(-1))
    known = spreads > 0
    found: Counts = np.clip(covariance / np.sqrt(np.where(known, spreads, 1.0)), -1.0, 1.0) * known
    return found
