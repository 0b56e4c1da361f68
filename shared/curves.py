"""Scores of a ranking from binned counts: those without and with the label, by bin of ascending probability.

`negative` and `positive` are (..., K); each score is (...). A tie within a bin counts half under the ROC curve, and as one
threshold in average precision: both are scikit-learn's, of probabilities rounded to the bins.
"""

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.float64]
CALIBRATION_GROUPS = 15


def share(part: Counts, whole: Counts) -> Counts:
    """`part / whole` within [0, 1]: noise can push a count below zero, and a rate has its bounds; 0 of nothing."""
    return np.clip(np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0), 0.0, 1.0)


def roc_auc(negative: Counts, positive: Counts) -> Counts:
    """Area under the ROC curve (Mann-Whitney)."""
    below = np.cumsum(negative, axis=-1) - negative
    return share((positive * (below + negative / 2)).sum(-1), negative.sum(-1) * positive.sum(-1))


def average_precision(negative: Counts, positive: Counts) -> Counts:
    """Precision at each threshold, weighted by the recall that it adds: the area under the precision-recall curve."""
    hits = np.cumsum(positive[..., ::-1], axis=-1)
    chosen = hits + np.cumsum(negative[..., ::-1], axis=-1)
    return share((positive[..., ::-1] * share(hits, chosen)).sum(-1), positive.sum(-1))


def calibration_error(held: Counts, right: Counts, centres: Counts) -> Counts:
    """Mean gap between confidence and accuracy over at most 15 groups of bins (Guo et al. 2017, section 2).

    Of the `held` records of a bin (..., K), whose probability is its centre (K,), `right` are right. Finer groups would hold
    few records each, and count their chance as miscalibration.
    """
    starts = np.unique(np.arange(CALIBRATION_GROUPS) * len(centres) // CALIBRATION_GROUPS)
    gaps = np.add.reduceat(right - centres * held, starts, axis=-1)
    return share(np.abs(gaps).sum(-1), held.sum(-1))
