"""What the coordinator makes of released histograms: weights and thresholds, from the history and nothing else."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from server import weighing
from server.history.records import Round, Run
from server.history.store import History
from shared import imbalance, tasks
from shared.run_config import RunConfig
from shared.score_names import telling


def config(**loss: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": "m"},
            "task": {"labels": ["a", "b"]},
            "training": {"rounds": 4, "sampling_rate": 0.5},
            "loss": loss,
        }
    )


def histogram(first: float, second: float) -> Any:
    counts = np.zeros((2, 2, 10))
    counts[0, 0, 9], counts[1, 0, 5] = first, second
    return counts


def test_weights_come_from_all_committed_rounds_histograms_and_from_nothing_else(
    history: History, new_run: Callable[..., Run], new_round: Callable[..., Round]
) -> None:
    run, settings = new_run(history), config(class_weights="released")
    task, noise = tasks.of(settings), 2.0
    assert weighing.weights(settings, history, run.id) == {}
    total = None
    for number, (first, second) in enumerate([(95.0, 4.0), (80.0, -3.0)], 1):
        counts = histogram(first, second)
        found = weighing.found(task, counts, noise)
        done = new_round(run=run.id, number=number)
        history.commit_round(replace(done, metrics=(*done.metrics, *found)))
        held = imbalance.held(counts, noise, many=False)
        total = held if total is None else total + held
        sent = weighing.weights(settings, history, run.id)
        assert np.array_equal(sent["labels"], imbalance.weights(total, many=False))
        assert imbalance.fault(sent, settings) is None
    assert float(sent["labels"][1]) > 1 > float(sent["labels"][0])
    for other in ({}, {"class_weights": "given", "weights": [1.0, 2.0]}):
        assert weighing.weights(config(**other), history, run.id) == {}


def test_a_threshold_is_recorded_and_is_no_score_and_counts_only_where_they_are_asked_for() -> None:
    said = {metric.name: metric.value for metric in weighing.found(tasks.of(config()), histogram(900, 50), 0.0)}
    assert said == {"threshold/b": 0.2}  # the positives lie between 0.2 and 0.25
    named = [metric.name for metric in weighing.found(tasks.of(config(class_weights="released")), histogram(9, 5), 1.0)]
    assert named == ["threshold/b", "held/a", "held/b", "held/"]
    assert telling([*named, "f1"]) == ["f1"]
