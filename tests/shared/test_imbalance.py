"""Weights of labels and thresholds, made of counts; and the losses that they go into."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from shared import imbalance, metrics, tasks
from shared.imbalance import Held
from shared.run_config import LARGEST_WEIGHT, Loss, RunConfig
from shared.tasks.base import Task

Values = npt.NDArray[np.float64]


def task(labels: int = 3, *, many: bool = False) -> Task:
    names = ["a", "b", "c", "d"][:labels]
    return tasks.of(
        RunConfig.model_validate(
            {
                "model": {"name": "m"},
                "task": {"labels": names, "multi_label": many},
                "training": {"rounds": 1, "sampling_rate": 0.5},
            }
        )
    )


def loss(given: dict[str, Any], logits: list[list[float]], labels: Any, weights: list[float] | None = None) -> Values:
    many = isinstance(labels[0], list)
    found = task(len(logits[0]), many=many).objective(
        torch.tensor(logits),
        {"labels": torch.tensor(labels)},
        Loss.model_validate(given),
        None if weights is None else torch.tensor(weights),
    )
    return np.asarray(found.numpy())


# -- losses --------------------------------------------------------------------------------------------------------

LOGITS = [[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]]


def test_a_weight_multiplies_the_loss_of_its_label() -> None:
    plain = loss({}, LOGITS, [0, 2])
    assert np.allclose(loss({}, LOGITS, [0, 2], [2.0, 3.0, 0.5]), plain * [2.0, 0.5])
    assert np.allclose(loss({"class_weights": "given", "weights": [2, 3, 0.5]}, LOGITS, [0, 2]), plain * [2.0, 0.5])
    assert np.allclose(plain, task(3).losses(torch.tensor(LOGITS), {"labels": torch.tensor([0, 2])}).numpy())


def test_of_many_labels_a_weight_counts_where_a_record_has_the_label() -> None:
    logits, labels = torch.tensor(LOGITS).double(), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, labels.double(), pos_weight=torch.tensor([2.0, 3.0, 0.5]).double(), reduction="none"
    ).mean(1)
    assert np.allclose(loss({}, LOGITS, labels.tolist(), [2.0, 3.0, 0.5]), expected.numpy())


def test_focal_is_cross_entropy_times_a_power_of_what_is_missing_to_one() -> None:
    plain = loss({}, LOGITS, [0, 2])
    assert np.allclose(loss({"kind": "focal", "gamma": 2.0}, LOGITS, [0, 2]), plain * (1 - np.exp(-plain)) ** 2)
    assert np.allclose(loss({"kind": "focal", "gamma": 0.0}, LOGITS, [0, 2]), plain)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("sure", [0.0, 30.0, 1000.0])
def test_a_focal_loss_has_a_gradient_however_sure_the_model_is(gamma: float, sure: float) -> None:
    logits = torch.tensor([[sure, -sure]], requires_grad=True)
    how = Loss(kind="focal", gamma=gamma)
    task(2).objective(logits, {"labels": torch.tensor([0])}, how, None).sum().backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


# -- weights -------------------------------------------------------------------------------------------------------


def test_without_noise_every_label_weighs_as_much_and_records_one_on_average() -> None:
    counts = np.zeros((3, 3, 5))
    counts[0, 0, 2], counts[1, 2, 0], counts[2, 1, 4] = 600, 300, 100
    found = imbalance.held(counts, 0.0, many=False)
    weights = imbalance.weights(found, many=False)
    assert np.allclose(weights, [1000 / 1800, 1000 / 900, 1000 / 300])
    assert np.isclose((weights * found.records).sum(), 1000)


def test_of_many_labels_those_that_have_one_weigh_as_much_as_those_that_do_not() -> None:
    counts = np.zeros((2, 2, 4))
    counts[0, 0, 1], counts[0, 1, 3] = 75, 25
    counts[1, 0, 0], counts[1, 1, 0] = 50, 50
    assert np.allclose(imbalance.weights(imbalance.held(counts, 0.0, many=True), many=True), [3.0, 1.0])


@pytest.mark.parametrize("many", [False, True])
def test_weights_are_within_their_public_bounds_whatever_was_released(many: bool) -> None:
    for records in ([0, 0], [1e30, -1e30], [-5, -9], [1e6, 1.0], [0.0, 1e6]):
        for spread in (0.0, 3.0, 1e9):
            found = imbalance.weights(Held(np.array(records, float), float(sum(records)), spread), many=many)
            config = RunConfig.model_validate(
                {
                    "model": {"name": "m"},
                    "task": {"labels": ["a", "b"], "multi_label": many},
                    "training": {"rounds": 1, "sampling_rate": 0.5},
                    "loss": {"class_weights": "released"},
                }
            )
            assert imbalance.fault(imbalance.arrays(found), config) is None
            assert float(found.max()) <= LARGEST_WEIGHT


def test_where_there_is_more_noise_than_records_no_label_weighs_more() -> None:
    found = Held(np.array([900.0, 100.0]), 1000.0, 1e5)
    assert np.allclose(imbalance.weights(found, many=False), 1.0, atol=0.01)
    assert np.allclose(imbalance.weights(found, many=True), 1.0, atol=0.01)


def test_releases_add_up_and_their_noise_by_its_squares() -> None:
    total = Held(np.array([3.0]), 5.0, 3.0) + Held(np.array([1.0]), 2.0, 4.0)
    assert (total.records.tolist(), total.of, total.spread) == ([4.0], 7.0, 5.0)


# -- thresholds ----------------------------------------------------------------------------------------------------


def brute(counts: Values) -> float:
    """The bin edge of the highest F1, of (2, K) counts by ascending score."""
    bins = counts.shape[1]

    def f1(start: int) -> float:
        hits, wrong = counts[1, start:].sum(), counts[0, start:].sum()
        return float(2 * hits / max(hits + wrong + counts[1].sum(), 1e-9))

    return max(range(bins), key=lambda start: (round(f1(start), 6), -abs(start - bins // 2))) / bins


def test_a_threshold_is_where_f1_is_highest() -> None:
    random = np.random.default_rng(0)
    counts = random.integers(0, 30, (6, 2, 10)).astype(float)
    found = metrics.thresholds(counts, many=True)
    assert found.tolist() == [brute(label) for label in counts]
    rare = np.zeros((1, 2, 10))
    rare[0, 0, :3], rare[0, 1, 2:5] = [500, 100, 3], [10, 20, 5]
    assert metrics.thresholds(rare, many=True).tolist() == [0.2]


def test_of_two_labels_it_is_the_seconds_and_of_more_there_is_none() -> None:
    counts = np.zeros((2, 2, 5))  # by confidence in the predicted label, from one half
    counts[0, 0, 4], counts[0, 0, 2], counts[1, 0, 1] = 900, 20, 50  # the positives lie at 0.3 to 0.4
    assert metrics.thresholds(counts).tolist() == [0.3]
    assert metrics.thresholds(np.ones((3, 3, 5))).tolist() == []


def test_noise_alone_moves_no_threshold() -> None:
    counts = np.zeros((200, 2, 10))
    counts[:, 0, :5], counts[:, 1, 5:] = 20, 20
    random = np.random.default_rng(1)
    found = metrics.thresholds(counts + random.normal(0, 15, counts.shape), 15.0, many=True)
    assert float((found != 0.5).mean()) < 0.1
    without = metrics.thresholds(counts + random.normal(0, 15, counts.shape), many=True)
    assert float((without != 0.5).mean()) > 0.15
