"""The robust rules: what a hostile site can move, in any order of arrival, and what is left on the disk."""

import errno
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.aggregation import Fold, UpdateError, chosen, robust, spill
from server.aggregation import rules as rules_module
from shared.errors import MachineError, RunFailedError
from shared.run_config import RunConfig

SITES = 9
UNIT = 0.05 * 1.0  # of the configurations below
RULES = {
    "median": {},
    "trimmed-mean": {"trimmed_share": 0.2},
    "multi-krum": {"presumed_bad": 2},
    "norm-bound": {"norm_bound": 0.5},
    "mean": {},
}
GATHERED = ("median", "trimmed-mean", "multi-krum")


def config(rule, **federation):
    return RunConfig.model_validate(
        {
            "model": {"name": "m"},
            "task": {"labels": ["a", "b"]},
            "training": {"rounds": 1, "sampling_rate": 0.1},
            "federation": {"aggregation": rule, "min_sites": SITES, **RULES[rule], **federation},
        }
    )


def result(rule, updates, folder, **federation):
    """What a rule makes of updates by their sites, which arrive in the mapping's order."""
    like = next(iter(updates.values()))
    with chosen(config(rule, **federation), 1, like, like, folder) as taken:
        for site, update in updates.items():
            taken.add(update, 1.0, site)
        return taken.mean(), taken.left_out


def honest(seed=0, spread=0.01, sites=SITES):
    """Updates of sites that agree: around a common direction of norm 0.3."""
    random = np.random.default_rng(seed)
    common = random.normal(0, 1, 53)
    common *= 0.3 / np.linalg.norm(common)
    values = (common + random.normal(0, spread, (sites, 53))).astype(np.float32)
    return {f"site-{n}": {"a": row[:50].reshape(5, 10), "b": row[50:]} for n, row in enumerate(values)}


def flat(update):
    return np.concatenate([array.ravel() for array in update.values()])


def matrix(updates):
    return np.stack([flat(update) for update in updates.values()])


# -- what they compute ---------------------------------------------------------------------------------------------


@given(count=st.integers(3, 12), seed=st.integers(0, 99))
def test_median_and_trimmed_mean_are_those_of_each_coordinate(count, seed):
    block = np.random.default_rng(seed).normal(0, 1, (count, 7)).astype(np.float32)
    np.testing.assert_allclose(robust.median(block), np.median(block.astype(np.float64), axis=0))
    for out in range((count + 1) // 2):
        expected = [np.mean(sorted(column)[out : count - out]) for column in block.T.astype(np.float64)]
        np.testing.assert_allclose(robust.trimmed_mean(block, out), expected)


@given(count=st.integers(5, 10), seed=st.integers(0, 99))
def test_multi_krum_takes_the_sites_that_a_plain_loop_takes(count, seed):
    block = np.random.default_rng(seed).normal(0, 1, (count, 6)).astype(np.float32)
    bad = (count - 3) // 2
    keep = count - bad - 2
    scores = []
    for one in range(count):
        gaps = [float(((block[one].astype(float) - block[other]) ** 2).sum()) for other in range(count) if other != one]
        scores.append(sum(sorted(gaps)[:keep]))
    expected = sorted(sorted(range(count), key=lambda n: scores[n])[:keep])
    assert robust.krum(robust.products([block[:, :4], block[:, 4:]]), bad) == expected


def test_of_equal_scores_multi_krum_takes_the_first_names():
    assert robust.krum(robust.products([np.ones((SITES, 3), np.float32)]), 2) == [0, 1, 2, 3, 4]


def test_norm_bound_shortens_what_is_longer_and_leaves_the_rest(tmp_path):
    updates = honest()
    lengths = {site: float(np.linalg.norm(flat(update))) for site, update in updates.items()}
    bound = sorted(lengths.values())[SITES // 2]
    mean, _ = result("norm-bound", updates, tmp_path, norm_bound=bound)
    expected = np.mean([flat(u).astype(np.float64) * min(1, bound / lengths[s]) for s, u in updates.items()], axis=0)
    np.testing.assert_allclose(flat(mean), expected, rtol=1e-6)
    assert robust.norm(updates["site-0"].values()) == pytest.approx(lengths["site-0"], rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_sites_that_agree_come_to_what_they_agree_on(tmp_path, rule):
    updates = {site: {"a": np.full((2, 3), 0.125, np.float32)} for site in honest()}
    np.testing.assert_array_equal(result(rule, updates, tmp_path)[0]["a"], np.full((2, 3), 0.125, np.float32))


# -- hostile sites --------------------------------------------------------------------------------------------------

ATTACKS = {
    "a huge update": lambda update: {name: np.full_like(array, 500.0) for name, array in update.items()},
    "the sign flipped, ten times as long": lambda update: {name: -10 * array for name, array in update.items()},
    "one huge value": lambda update: {**update, "b": np.array([0, -500, 0], np.float32)},
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("rule", RULES)
def test_two_hostile_sites_of_nine_move_the_mean_and_not_a_robust_rule(tmp_path, rule, attack):
    updates = honest()
    clean = matrix(updates)
    bad = ("site-3", "site-7")
    hostile = {site: attack(update) if site in bad else update for site, update in updates.items()}
    mean, left_out = result(rule, hostile, tmp_path, **({"trimmed_share": 0.25} if rule == "trimmed-mean" else {}))
    others = matrix({site: update for site, update in updates.items() if site not in bad})
    moved = float(np.linalg.norm(flat(mean) - clean.mean(axis=0)))
    if rule == "mean":
        assert moved > 0.5  # more than the update itself is long
    elif rule == "norm-bound":
        assert moved <= 2 * 2 * 0.5 / SITES + 1e-6  # each of two sites: from anywhere to anywhere in the ball
    elif rule == "multi-krum":
        assert set(bad) <= set(left_out)
        assert (
            np.linalg.norm(flat(mean) - others.mean(axis=0))
            < np.linalg.norm(others - others.mean(axis=0), axis=1).max()
        )
    else:
        assert (others.min(axis=0) <= flat(mean) + 1e-7).all()
        assert (flat(mean) - 1e-7 <= others.max(axis=0)).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -3e38])
def test_what_is_no_number_or_beyond_all_measure_is_refused_and_counts_for_nothing(tmp_path, rule, value):
    updates = honest(sites=SITES + 1)
    bad = {name: array.copy() for name, array in updates.pop("site-9").items()}
    bad["a"][3, 4] = value
    like = updates["site-0"]
    with chosen(config(rule), 1, like, like, tmp_path) as taken:
        taken.add(updates["site-0"], 1.0, "site-0")
        with pytest.raises(UpdateError, match="'a'"):
            taken.add(bad, 1.0, "site-9")
        with pytest.raises(UpdateError, match="not the ones"):
            taken.add({"a": like["a"]}, 1.0, "site-9")
        for site in list(updates)[1:]:
            taken.add(updates[site], 1.0, site)
        mean = taken.mean()
    assert flat(mean).tobytes() == flat(result(rule, updates, tmp_path)[0]).tobytes()


# -- order, memory, disk --------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(data=st.data(), rule=st.sampled_from(sorted(RULES)))
def test_the_order_of_arrival_changes_no_bit(tmp_path_factory, data, rule):
    values = st.floats(-10, 10, width=32) | st.sampled_from([0.0, -0.0, 1.0])
    count = data.draw(st.integers(SITES, SITES + 3))
    rows = data.draw(st.lists(st.lists(values, min_size=4, max_size=4), min_size=count, max_size=count))
    updates = {f"site-{n}": {"a": np.array(row, np.float32)} for n, row in enumerate(rows)}
    order = data.draw(st.permutations(list(updates)))
    folder = tmp_path_factory.mktemp("spilled")
    one, left_out = result(rule, updates, folder)
    other, also = result(rule, {site: updates[site] for site in order}, folder)
    assert one["a"].tobytes() == other["a"].tobytes()
    assert left_out == also


@pytest.mark.parametrize("rule", GATHERED)
def test_columns_read_back_in_pieces_are_the_same(tmp_path, monkeypatch, rule):
    whole, _ = result(rule, honest(), tmp_path)
    monkeypatch.setattr(rules_module, "MEMORY", rules_module.EACH * SITES * 7)  # seven columns at a time
    pieces, _ = result(rule, honest(), tmp_path)
    np.testing.assert_allclose(flat(whole), flat(pieces), rtol=1e-6)


@pytest.mark.parametrize("rule", GATHERED)
def test_updates_wait_on_the_disk_and_nothing_is_left_there(tmp_path, monkeypatch, rule):
    monkeypatch.setattr(rules_module, "MEMORY", 2**20)
    folder = tmp_path / "checkpoints"
    like = {"a": np.zeros(200_000, np.float32)}

    def peak(count):
        tracemalloc.start()
        with chosen(config(rule), 1, like, like, folder) as taken:
            for number in range(count):
                taken.add({"a": np.full(200_000, number * 1e-3, np.float32)}, 1.0, f"site-{number:03}")
                assert not list(folder.iterdir())  # it has no name, so that a crash leaves none either
            taken.mean()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(SITES)
    assert peak(60) < 1.3 * peak(12)
    assert not list(folder.iterdir())


def test_a_full_disk_is_the_machines_fault_in_one_line(tmp_path, monkeypatch):
    written = os.pwrite

    def full(descriptor, data, place):
        if place >= 3 * 212:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(descriptor, data[:100], place)  # and a disk may take less than it is given

    monkeypatch.setattr(spill.os, "pwrite", full)
    updates = honest()
    like = updates["site-0"]
    with chosen(config("median"), 1, like, like, tmp_path) as taken:
        for number in range(3):
            taken.add(updates[f"site-{number}"], 1.0, f"site-{number}")
        with pytest.raises(MachineError) as raised:
            taken.add(updates["site-3"], 1.0, "site-3")
        expected = np.median(matrix(updates)[:3], axis=0)
        np.testing.assert_array_equal(flat(taken.mean()), expected)  # of the three that were written, in pieces
    said = str(raised.value)
    assert "4 updates of 212 bytes each" in said
    assert "No space left on device; mend that, then resume the run." in said
    assert "\n" not in said


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    like = honest()["site-0"]
    with (
        pytest.raises(MachineError, match="cannot be kept in"),
        chosen(config("median"), 1, like, like, tmp_path / "file"),
    ):
        pass


@pytest.mark.parametrize("rule", GATHERED)
def test_too_few_updates_for_the_rules_promise_end_the_round(tmp_path, rule):
    few = dict(list(honest().items())[:2])
    with pytest.raises(RunFailedError, match=f"federation.aggregation='{rule}' needs . updates, and 2 are there"):
        result(rule, few, tmp_path)


def test_norm_bound_keeps_the_declared_weights_and_the_mean_is_the_fold(tmp_path):
    updates = honest(sites=3)
    like, weights = updates["site-0"], [1.0, 0.5, 0.25]
    fold = Fold(like, UNIT)
    with chosen(config("norm-bound", norm_bound=100.0, weighting="declared"), 1, like, like, tmp_path) as taken:
        for weight, (site, update) in zip(weights, updates.items(), strict=True):
            taken.add(update, weight, site)
            fold.add(update, weight)
        assert flat(taken.mean()).tobytes() == flat(fold.mean()).tobytes()
