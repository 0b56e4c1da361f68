"""The fold: the sites' weighted mean, exact in any order, and nothing of a bad update in it."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.aggregation import Fold, UpdateError

UNITS = [1.0, 0.05, 5.0, 1e-6, 3e-9]


def folded(updates, weights, unit, like=None):
    fold = Fold(like or updates[0], unit)
    for update, weight in zip(updates, weights, strict=True):
        fold.add(update, weight)
    return fold.mean()


@given(data=st.data(), unit=st.sampled_from(UNITS))
def test_the_order_of_arrival_changes_no_bit(data, unit):
    count = data.draw(st.integers(1, 8))
    values = st.floats(-100, 100, width=32) | st.floats(-(2**-20), 2**-20, width=32) | st.just(0.0)
    arrays = [np.array(data.draw(st.lists(values, min_size=5, max_size=5)), np.float32) for _ in range(count)]
    updates = [{"a": array * np.float32(unit), "b": array[:2].reshape(2, 1) * np.float32(unit)} for array in arrays]
    weights = data.draw(st.lists(st.floats(0.001, 1), min_size=count, max_size=count))
    order = data.draw(st.permutations(range(count)))
    one = folded(updates, weights, unit)
    other = folded([updates[i] for i in order], [weights[i] for i in order], unit)
    assert {name: array.tobytes() for name, array in one.items()} == {n: a.tobytes() for n, a in other.items()}


def test_the_order_changes_no_bit_where_updates_cancel_and_only_roundings_would_be_left():
    random = np.random.default_rng(5)
    updates = [random.normal(0, 1, 20_000).astype(np.float32) for _ in range(6)]
    updates += [-update for update in updates]
    weights = [*random.uniform(0.1, 1, 6)] * 2
    order = random.permutation(12)
    one = folded([{"a": update} for update in updates], weights, 1.0)["a"]
    other = folded([{"a": updates[i]} for i in order], [weights[i] for i in order], 1.0)["a"]
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
def test_the_mean_is_that_of_float64_to_a_millionth(unit, size):
    random = np.random.default_rng(3)
    updates = [{"a": (random.normal(5, 1, (40, 3)) * size * unit).astype(np.float32)} for _ in range(7)]
    weights = random.uniform(0.1, 1, 7)
    exact = np.average([u["a"].astype(np.float64) for u in updates], axis=0, weights=weights)
    np.testing.assert_allclose(folded(updates, weights, unit)["a"], exact, rtol=1e-6)


def test_one_update_comes_back_as_it_is_whatever_its_weight():
    update = {"a": np.random.default_rng(0).normal(0, 1, 1000).astype(np.float32)}
    for weight in (1.0, 0.3, 0.01):
        np.testing.assert_allclose(folded([update], [weight], 1.0)["a"], update["a"], rtol=1e-6, atol=1e-9)


BAD = {
    "nan": {"a": np.array([1, np.nan], np.float32), "b": np.ones(1, np.float32)},
    "inf in the second": {"a": np.ones(2, np.float32), "b": np.array([np.inf], np.float32)},
    "largest float": {"a": np.ones(2, np.float32), "b": np.array([3.4e38], np.float32)},
    "huge": {"a": np.ones(2, np.float32), "b": np.array([-1e5], np.float32)},
    "another shape": {"a": np.ones(3, np.float32), "b": np.ones(1, np.float32)},
    "a shape that would broadcast": {"a": np.ones(1, np.float32), "b": np.ones(1, np.float32)},
    "one missing": {"a": np.ones(2, np.float32)},
    "one more": {"a": np.ones(2, np.float32), "b": np.ones(1, np.float32), "c": np.ones(1, np.float32)},
    "another name": {"a": np.ones(2, np.float32), "c": np.ones(1, np.float32)},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_update_is_refused_and_nothing_of_it_is_added(bad):
    good = {"a": np.array([0.5, -2], np.float32), "b": np.array([3], np.float32)}
    fold = Fold(good)
    fold.add(good)
    with pytest.raises(UpdateError):
        fold.add(bad)
    for name, array in fold.mean().items():
        np.testing.assert_array_equal(array, good[name])


def test_a_sum_that_would_lose_bits_is_refused_although_each_update_is_small():
    fold = Fold({"a": np.zeros(1)})
    update = {"a": np.array([9000], np.float32)}
    fold.add(update)
    with pytest.raises(UpdateError, match="above 16384"):
        fold.add(update)
    assert fold.mean()["a"] == 9000


def test_memory_does_not_grow_with_the_number_of_updates():
    like = {"a": np.zeros(200_000, np.float32)}

    def peak(count):
        fold = Fold(like)
        tracemalloc.start()
        for number in range(count):
            fold.add({"a": np.full(200_000, number, np.float32)})
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1)
    assert peak(12) < 1.2 * peak(2)
