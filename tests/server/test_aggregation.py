"""The fold: the sites' weighted mean, exact in any order, and nothing of a bad update in it."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.aggregation import Fold, UpdateError
from server.aggregation import fold as fold_module

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


@pytest.mark.parametrize("weighted", [True, False])
def test_the_order_changes_no_bit_where_updates_cancel_and_only_roundings_would_be_left(weighted):
    random = np.random.default_rng(5)
    updates = [
        (random.normal(0, 1, 20_000) * 2.0 ** random.uniform(-40, 10, 20_000)).astype(np.float32) for _ in range(6)
    ]
    updates += [-update for update in updates]
    weights = [*random.uniform(0.1, 1, 6)] * 2 if weighted else [1.0] * 12
    order = random.permutation(12)
    one = folded([{"a": update} for update in updates], weights, 1.0)["a"]
    other = folded([{"a": updates[i]} for i in order], [weights[i] for i in order], 1.0)["a"]
    assert one.tobytes() == other.tobytes()
    assert not one.any()


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


def test_sums_beyond_what_float64_keeps_lose_no_bit_in_any_order():
    """300 sites with the most that a value may be, as many with its opposite, and one that is tiny."""
    huge, tiny = np.array([2.0**14, 2.0**14], np.float32), np.array([2.0**-38, -3 * 2.0**-20], np.float32)
    updates = [{"a": huge}] * 300 + [{"a": tiny}] + [{"a": -huge}] * 300
    fold = Fold({"a": huge})
    for update in updates:
        fold.add(update)
    np.testing.assert_array_equal(fold.mean()["a"], (tiny.astype(np.float64) / 601).astype(np.float32))
    for order in (updates[::-1], updates[::2] + updates[1::2]):
        assert folded(order, [1.0] * 601, 1.0)["a"].tobytes() == fold.mean()["a"].tobytes()


def test_what_is_refused_rests_on_the_update_alone_and_not_on_those_before_it():
    most = {"a": np.array([2.0**14], np.float32)}
    fold = Fold(most)
    for _ in range(50):
        fold.add(most)
    with pytest.raises(UpdateError, match="above 16384"):
        fold.add({"a": np.array([16385], np.float32)})
    assert fold.mean()["a"] == 2.0**14


def large(seed):
    """Two arrays of more than a block each, as they lie in a message: one after the other, not to be written to."""
    flat = np.random.default_rng(seed).normal(0, 1, 300_000).astype(np.float32)
    flat.flags.writeable = False
    return {"a": flat[:170_000].reshape(1000, 170), "b": flat[170_000:]}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_and_machine_code_change_no_bit_and_a_bad_value_anywhere_leaves_nothing_behind(
    monkeypatch, threads, compiled
):
    one = Fold(large(0), threads=1)
    monkeypatch.setattr(fold_module, "WORTH", 1)
    if not compiled:
        monkeypatch.setattr(fold_module.kernel, "compiled", lambda: None)
    several = Fold(large(0), threads=threads)
    assert one._kernel is None
    assert (several._kernel is None) == (not compiled)
    assert len(several._shares) == threads
    for seed, weight in ((0, 1.0), (1, 0.3), (2, 1.0)):
        one.add(large(seed), weight)
        several.add(large(seed), weight)
        for place in (0, 70_000, 169_999):
            bad = {name: array.copy() for name, array in large(seed).items()}
            bad["a"].ravel()[place] = np.nan
            bad["b"][place % 130_000] = 1e9
            with pytest.raises(UpdateError, match="'a' is not finite"):
                several.add(bad)
    for name in ("a", "b"):
        assert one.mean()[name].tobytes() == several.mean()[name].tobytes()


def test_an_update_is_folded_in_without_a_copy_of_it():
    update = {"a": np.ones(5_000_000, np.float32)}
    fold = Fold(update, threads=1)
    fold.add(update)
    tracemalloc.start()
    fold.add(update)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 0.1 * update["a"].nbytes


@given(data=st.data())
def test_weights_of_any_size_are_summed_exactly(data):
    weights = data.draw(st.lists(st.floats(1e-9, 1), min_size=2, max_size=30))
    order = data.draw(st.permutations(weights))
    updates = [{"a": np.array([weight], np.float32)} for weight in weights]
    one = folded(updates, weights, 1.0)["a"]
    other = folded([{"a": np.array([weight], np.float32)} for weight in order], order, 1.0)["a"]
    assert one.tobytes() == other.tobytes()


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
