"""Weights of labels, made of histograms that sites have released: post-processing, for which no privacy is spent.

A histogram of predictions tells, noised, how many records have each label. The coordinator adds those of all evaluated
rounds up, because the labels are the same in each, and sends weights with every later request for training. They are
bounded for everybody to see, so that a site takes none that its configuration could not have given.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.arrays import Arrays
from shared.metrics import Counts
from shared.run_config import LARGEST_WEIGHT, RunConfig

WEIGHTS = "labels"  # name of the array that travels


@dataclass(frozen=True)
class Held:
    """How many records have each label, (C,), of how many: noised, the first with a deviation of `spread`."""

    records: npt.NDArray[np.float64]
    of: float
    spread: float

    def __add__(self, other: "Held") -> "Held":
        """Add another release up."""
        return Held(self.records + other.records, self.of + other.of, float(np.hypot(self.spread, other.spread)))


def held(counts: Counts, noise: float, *, many: bool) -> Held:
    """Read a released histogram, whose cells carry noise of deviation `noise`.

    Its shape is (C, C, K): true label, predicted label, bin; of `many` labels a record (C, 2, K): label, whether a record
    has it, bin.
    """
    each = counts.sum((1, 2))
    if many:
        return Held(counts[:, 1].sum(1), float(each.mean()), noise * float(np.sqrt(counts.shape[2])))
    return Held(each, float(each.sum()), noise * float(np.sqrt(counts[0].size)))


def weights(found: Held, *, many: bool) -> npt.NDArray[np.float32]:
    """Return the weights (C,) that make every label count as much, within 1 / `LARGEST_WEIGHT` and `LARGEST_WEIGHT`.

    Of one label a record: 1 / (C x share), whose mean over records is 1. Of many: what makes the records that have the label
    weigh as much as those that do not. Shares are drawn towards each other by as many records as the noise's deviation:
    where there is more noise than there are records, no label weighs more.
    """
    labels = len(found.records)
    records = np.maximum(found.records, 0.0) + found.spread
    if many:
        share = np.clip(records / max(found.of + 2 * found.spread, 1e-9), 1e-9, 1.0)
        wanted = (1 - share) / share
    else:
        wanted = records.sum() / np.maximum(labels * records, 1e-9)
    return np.clip(wanted, 1 / LARGEST_WEIGHT, LARGEST_WEIGHT).astype(np.float32)


def fault(arrays: Mapping[str, npt.NDArray[np.float32]], config: RunConfig) -> str | None:
    """Say what is wrong with weights that came with a request; none are always right."""
    if not arrays:
        return None
    if config.loss.class_weights != "released":
        return f"weights of labels came with the request, and loss.class_weights={config.loss.class_weights!r} has none of the coordinator's."
    values = arrays.get(WEIGHTS)
    if len(arrays) != 1 or values is None or values.shape != (len(config.task.labels),):
        return f"the request's weights are not one number for each of the {len(config.task.labels)} labels."
    if not ((values >= np.float32(1 / LARGEST_WEIGHT)) & (values <= LARGEST_WEIGHT)).all():  # NaN is neither
        return f"the request's weights of labels are outside {1 / LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}."
    return None


def arrays(values: npt.NDArray[np.float32] | None) -> Arrays:
    """Make weights ready to travel."""
    return {} if values is None else {WEIGHTS: values}
