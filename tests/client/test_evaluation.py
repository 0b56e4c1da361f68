"""A site's histogram: one record moves one count by one, and the noise is what the plan says."""

from collections.abc import Callable
from typing import Any

import kept
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from client import data, evaluation
from client.privacy.randomness import Keystream
from client.site import split_key
from shared import metrics

Desks = Callable[..., Any]
OPEN = {"site": {"privacy": {"allow_non_private": True}}, "config": {"privacy": {"epsilon": float("inf")}}}


def system(_: str) -> Keystream:
    return Keystream.from_system()


@given(
    st.lists(
        st.tuples(st.lists(st.floats(0, 1) | st.just(float("nan")), min_size=3, max_size=3), st.integers(0, 2)),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 20),
)
def test_one_record_changes_the_counts_by_one_in_one_cell(records: list[tuple[list[float], int]], bins: int) -> None:
    def count(held: list[tuple[list[float], int]]) -> Any:
        probabilities = np.array([p for p, _ in held]).reshape(-1, 3)
        return metrics.count(probabilities, np.array([label for _, label in held], dtype=int), bins)

    whole, rest = count(records), count(records[1:])
    assert whole.shape == (3, 3, bins)
    assert whole.sum() == len(records)
    assert np.linalg.norm((whole - rest).ravel()) == 1.0
    assert np.abs(whole - rest).sum() == 1.0


def test_without_noise_the_histogram_counts_the_validation_records_by_label(new_desk: Desks) -> None:
    desk = new_desk(**OPEN)
    counts = desk.evaluate().histogram["counts"]
    labels = kept.labels(desk.resident.parts(desk.site, desk.config).validation)
    assert counts.shape == (2, 2, 10)
    assert counts.sum((1, 2)).tolist() == [labels.count(0), labels.count(1)]


def test_one_validation_record_more_moves_one_cell_by_one(new_desk: Desks) -> None:
    desk = new_desk(**OPEN)
    before = desk.evaluate(run="before").histogram["counts"]
    rows, key = desk.rows(), split_key(desk.site)
    gone = next(number for number, row in enumerate(rows) if data.is_validation(row["id"], key, 0.2))
    desk.write(rows[:gone] + rows[gone + 1 :])
    after = desk.evaluate(run="after").histogram["counts"]
    assert sorted((before - after).ravel().tolist(), key=abs)[-2:] == [0.0, 1.0]
    train = next(number for number, row in enumerate(rows) if not data.is_validation(row["id"], key, 0.2))
    desk.write(rows[:train] + rows[train + 1 :])
    assert np.array_equal(desk.evaluate(run="train").histogram["counts"], before)


def agrees(values: Any, deviation: float) -> bool:
    statistic = float(np.square(values / deviation).sum())
    return bool(chi2.ppf(5e-7, values.size) < statistic < chi2.ppf(1 - 5e-7, values.size))


@pytest.mark.parametrize("kind", ["gaussian", "discrete"])
@pytest.mark.parametrize("rows", ["some", "none"])
def test_every_cell_carries_the_planned_noise_with_or_without_validation_records(
    new_desk: Desks, new_rows: Callable[..., Any], rows: str, kind: str
) -> None:
    """4,000 cells a test: 2/3 and 3/2 of sigma are 30 deviations of the estimate away."""
    config = {
        "evaluation": {"confidence_bins": 100},
        "training": {"rounds": 20},
        "privacy": {"noise": kind, "max_noise_multiplier": 100.0},
    }
    desk = new_desk(config=config, randomness=system, site={"privacy": {"max_epsilon": 200.0}})
    key = split_key(desk.site)
    if rows == "none":
        desk.write([row for row in new_rows(100) if not data.is_validation(row["id"], key, 0.2)])
    arrays = desk.start()
    replies = [desk.evaluate(number, arrays) for number in range(1, 11)]
    noise = replies[0].noise_multiplier
    truth = np.zeros((2, 2, 100))
    if rows == "some":
        free = new_desk(name="free", **(OPEN | {"config": config | OPEN["config"]}))
        truth = free.evaluate(arrays=arrays).histogram["counts"]
        assert truth.sum() > 10
    values = np.concatenate([(reply.histogram["counts"] - truth).ravel() for reply in replies])
    steps = values * evaluation.STEPS
    assert np.array_equal(steps, steps.round()) == (kind == "discrete")
    assert values.size == 4000
    assert agrees(values, noise)
    assert not agrees(values, noise * 2 / 3)
    assert not agrees(values, noise * 3 / 2)
    empty = values[np.tile((truth == 0).ravel(), 10)]
    assert agrees(empty, noise)
