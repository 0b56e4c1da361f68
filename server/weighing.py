"""What the coordinator makes of released histograms beside scores: labels' thresholds, and their weights in the loss.

Both are post-processing. Weights rest on how many records of each label the rounds committed so far have released, which
stand in the history: whatever dies, the next attempt sends the same.
"""

from functools import reduce
from operator import add

import numpy as np

from server.history.records import Metric
from server.history.store import History
from shared import imbalance, metrics
from shared.arrays import Arrays
from shared.imbalance import Held
from shared.metrics import Counts
from shared.run_config import RunConfig
from shared.score_names import HELD, THRESHOLD
from shared.tasks.base import Task

CONFIDENT = 1.96  # deviations of an interval of 95 %


def found(task: Task, counts: Counts, noise: float) -> list[Metric]:
    """Return what the sum of the sites' histograms tells of labels, noised by `noise` times a unit's largest share."""
    if not task.weighable:
        return []
    many, labels, deviation = task.settings.multi_label, task.settings.labels, noise * task.sensitivity
    chosen = metrics.thresholds(counts, deviation, many=many).tolist()
    said = [
        Metric("validation", None, f"{THRESHOLD}{label}", value)
        for label, value in zip(labels[len(labels) - len(chosen) :], chosen, strict=True)
    ]
    if task.config.loss.class_weights == "released":
        held = imbalance.held(counts, deviation, many=many)
        apart = CONFIDENT * held.spread
        said += [
            Metric("validation", None, f"{HELD}{label}", value, value - apart, value + apart)
            for label, value in zip(labels, held.records.tolist(), strict=True)
        ]
        said.append(Metric("validation", None, HELD, held.of))
    return said


def weights(config: RunConfig, history: History, run: str, number: int | None = None) -> Arrays:
    """Return the labels' weights that go with the next request, or went with round `number`'s: none where none are released."""
    if config.loss.class_weights != "released":
        return {}
    rounds: dict[int, dict[str, Metric]] = {}
    for said_in, metric in history.metrics(run):
        if metric.name.startswith(HELD) and (number is None or said_in < number):
            rounds.setdefault(said_in, {})[metric.name] = metric
    if not rounds:
        return {}
    total = reduce(add, (_held(said, config.task.labels) for _, said in sorted(rounds.items())))
    return imbalance.arrays(imbalance.weights(total, many=config.task.multi_label))


def _held(said: dict[str, Metric], labels: tuple[str, ...]) -> Held:
    each = [said[f"{HELD}{label}"] for label in labels]
    spread = ((each[0].high or 0.0) - (each[0].low or 0.0)) / 2 / CONFIDENT
    return Held(np.array([metric.value for metric in each]), said[HELD].value, spread)
