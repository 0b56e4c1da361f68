"""The mean of adapters whose two factors are trained: the mean of their products, split anew, the same in any order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import checkpoints, optimization
from server.aggregation import UpdateError, chosen, product
from shared.run_config import RunConfig

OUT, IN, RANK = 12, 9, 3
A, B = "encoder.q.lora_A.default.weight", "encoder.q.lora_B.default.weight"
PRODUCT = "encoder.q.default.weight"
CONFIG = RunConfig.model_validate(
    {
        "model": {"name": "m", "lora": {"train_a": True, "rank": RANK}},
        "task": {"labels": ["a", "b"]},
        "training": {"rounds": 9, "sampling_rate": 0.1, "clipping_norm": 1.0, "server_optimizer": "fedavg"},
        "warm_start": {"rounds": 1, "sampling_rate": 0.1},
    }
)


def start(seed=0, zero=False):
    random = np.random.default_rng(seed)
    b = np.zeros((OUT, RANK)) if zero else random.normal(0, 1, (OUT, RANK))
    return {
        A: random.normal(0, 1, (RANK, IN)).astype(np.float32),
        B: b.astype(np.float32),
        "head.weight": random.normal(0, 1, (2, 4)).astype(np.float32),
    }


def updates(count, seed=1, size=0.5):
    random = np.random.default_rng(seed)
    shapes = {A: (RANK, IN), B: (OUT, RANK), "head.weight": (2, 4)}
    return [
        {name: random.normal(0, size, shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(count)
    ]


def wide(array):
    return array.astype(np.float64)


def of_rank(matrix, rank=RANK):
    """The best approximation of that rank (Eckart and Young 1936)."""
    left, sizes, right = np.linalg.svd(matrix)
    return (left[:, :rank] * sizes[:rank]) @ right[:rank]


def stepped(began, sent, weights=None, number=2, config=CONFIG):
    """A round's step of the server."""
    names = tuple(began)
    state = optimization.enter(optimization.start(began), "training", names)
    with chosen(config, number, state.iterate, state.first, None) as rule:
        for update, weight in zip(sent, weights or [1.0] * len(sent), strict=True):
            rule.add(update, weight, "site")
        return optimization.step(state, config.training, rule.mean(), pairs=rule.pairs)


@pytest.mark.parametrize("zero", [True, False])
def test_the_step_is_to_the_best_of_its_rank_of_the_mean_product(zero):
    began, sent, weights = start(zero=zero), updates(5), [1.0, 0.5, 0.25, 1.0, 0.75]
    moved = stepped(began, sent, weights).iterate
    products = [(wide(began[B]) + wide(u[B])) @ (wide(began[A]) + wide(u[A])) for u in sent]
    exact = np.average(products, axis=0, weights=weights)
    got = wide(moved[B]) @ wide(moved[A])
    np.testing.assert_allclose(got, of_rank(exact), atol=2e-5)
    heads = [wide(began["head.weight"]) + wide(u["head.weight"]) for u in sent]
    np.testing.assert_allclose(moved["head.weight"], np.average(heads, axis=0, weights=weights), rtol=1e-5, atol=1e-6)


def test_to_average_the_factors_apart_is_another_matrix_and_further_from_the_mean_product():
    began, sent = start(), updates(5)
    moved = stepped(began, sent).iterate
    exact = np.mean([(wide(began[B]) + wide(u[B])) @ (wide(began[A]) + wide(u[A])) for u in sent], axis=0)
    apart = np.mean([wide(began[B]) + u[B] for u in sent], axis=0) @ np.mean(
        [wide(began[A]) + u[A] for u in sent], axis=0
    )
    ours, theirs, best = (
        float(np.linalg.norm(matrix - exact)) for matrix in (wide(moved[B]) @ wide(moved[A]), apart, of_rank(exact))
    )
    assert ours == pytest.approx(best, rel=1e-5)
    assert theirs > 1.2 * ours


def test_where_a_is_the_same_everywhere_the_product_is_exact_and_that_of_b_averaged_alone():
    began, sent = start(), [{**u, A: np.zeros((RANK, IN), np.float32)} for u in updates(4)]
    moved = stepped(began, sent).iterate
    mean_b = np.mean([wide(began[B]) + u[B] for u in sent], axis=0)
    np.testing.assert_allclose(wide(moved[B]) @ wide(moved[A]), mean_b @ wide(began[A]), atol=2e-5)


@given(order=st.permutations(range(7)))
def test_the_order_of_arrival_changes_no_bit(order):
    began, sent = start(), updates(7)
    weights = [1.0, 0.3, 0.7, 1.0, 0.1, 0.9, 0.2]
    one = stepped(began, sent, weights).iterate
    other = stepped(began, [sent[n] for n in order], [weights[n] for n in order]).iterate
    assert {n: a.tobytes() for n, a in one.items()} == {n: a.tobytes() for n, a in other.items()}


@given(seed=st.integers(0, 200), turn=st.integers(0, 200))
def test_the_same_product_has_the_same_factors_however_it_came_about(seed, turn):
    """Signs and rotations of the factors it was made of do not show."""
    random = np.random.default_rng(seed)
    b, a = random.normal(0, 1, (OUT, RANK)), random.normal(0, 1, (RANK, IN))
    rotation = np.linalg.qr(np.random.default_rng(turn).normal(0, 1, (RANK, RANK))).Q
    before = start()[A].astype(np.float64)
    one, other = product.split(b @ a, before), product.split((b @ rotation) @ (rotation.T @ a), before)
    if np.diff(np.linalg.svd(b @ a).S[: RANK + 1]).max() < -1e-2:  # equal sizes have no order
        for x, y in zip(one, other, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)
    np.testing.assert_allclose(one[0] @ one[1], b @ a, atol=1e-9)


@pytest.mark.parametrize("rank_of_product", [0, 1, 2, 3])
def test_rows_of_a_stay_orthogonal_and_as_long_as_they_were_though_the_product_lacks_directions(rank_of_product):
    random = np.random.default_rng(3)
    matrix = random.normal(0, 1, (OUT, rank_of_product)) @ random.normal(0, 1, (rank_of_product, IN))
    before = start()[A].astype(np.float64)
    b, a = product.split(matrix, before)
    np.testing.assert_allclose(a @ a.T, np.eye(RANK) * np.mean(np.sum(before**2, axis=1)), atol=1e-9)
    np.testing.assert_allclose(b @ a, matrix, atol=1e-9)
    assert [bool(column.any()) for column in b.T] == [True] * rank_of_product + [False] * (RANK - rank_of_product)
    again_b, again_a = product.split(b @ a, a)
    np.testing.assert_allclose(np.abs(again_a), np.abs(a), atol=1e-6)
    np.testing.assert_allclose(again_b @ again_a, matrix, atol=1e-9)


def test_the_servers_learning_rate_is_of_the_product():
    began, sent = start(), updates(3)
    half = CONFIG.model_copy(update={"training": CONFIG.training.model_copy(update={"server_learning_rate": 0.5})})
    moved = stepped(began, sent, config=half).iterate
    products = [(wide(began[B]) + u[B]) @ (wide(began[A]) + u[A]) for u in sent]
    expected = of_rank(0.5 * wide(began[B]) @ wide(began[A]) + 0.5 * np.mean(products, axis=0))
    np.testing.assert_allclose(wide(moved[B]) @ wide(moved[A]), expected, atol=2e-5)


BAD = {
    "not finite": {A: np.full((RANK, IN), np.nan, np.float32)},
    "huge": {B: np.full((OUT, RANK), 3e38, np.float32)},
    "another shape": {B: np.zeros((OUT, RANK + 1), np.float32)},
    "another head": {"head.weight": np.zeros((2, 5), np.float32)},
    "one more": {"x": np.zeros(1, np.float32)},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_update_is_refused_and_nothing_of_it_is_in_the_mean(bad):
    began, sent = start(), updates(3)
    with chosen(CONFIG, 2, began, began, None) as rule:
        rule.add(sent[0], 1.0, "one")
        with pytest.raises(UpdateError):
            rule.add({**sent[1], **bad}, 1.0, "two")
        rule.add(sent[2], 1.0, "three")
        mean = rule.mean()
    with chosen(CONFIG, 2, began, began, None) as rule:
        rule.add(sent[0], 1.0, "one")
        rule.add(sent[2], 1.0, "three")
        assert all(mean[name].tobytes() == array.tobytes() for name, array in rule.mean().items())


def test_a_phase_of_the_head_alone_folds_plainly():
    began = start()
    like = {"head.weight": began["head.weight"]}
    with chosen(CONFIG, 1, began, like, None) as rule:
        rule.add(like, 1.0, "one")
        assert rule.pairs == {}
        np.testing.assert_allclose(rule.mean()["head.weight"], began["head.weight"], rtol=1e-6)


def test_a_convolutions_factors_are_a_product_too():
    """A is (r, channels, height, width), B (channels, r, 1, 1)."""
    random = np.random.default_rng(0)
    began = {
        "e.lora_A.default.weight": random.normal(0, 1, (2, 3, 2, 2)).astype(np.float32),
        "e.lora_B.default.weight": random.normal(0, 1, (5, 2, 1, 1)).astype(np.float32),
    }
    sent = [{n: random.normal(0, 0.3, a.shape).astype(np.float32) for n, a in began.items()} for _ in range(3)]
    state = optimization.enter(optimization.start(began), "training", tuple(began))
    with chosen(CONFIG, 2, began, state.first, None) as rule:
        for update in sent:
            rule.add(update, 1.0, "site")
        moved = optimization.step(state, CONFIG.training, rule.mean(), pairs=rule.pairs).iterate
    assert {n: a.shape for n, a in moved.items()} == {n: a.shape for n, a in began.items()}

    def joined(a, b):
        return wide(b).reshape(5, 2) @ wide(a).reshape(2, 12)

    (a, b) = began
    exact = np.mean([joined(began[a] + u[a], began[b] + u[b]) for u in sent], axis=0)
    np.testing.assert_allclose(joined(moved[a], moved[b]), of_rank(exact, 2), atol=2e-5)


def test_rounds_with_a_restart_at_each_come_to_the_same_bits(tmp_path):
    names = tuple(start())
    whole = resumed = optimization.enter(optimization.start(start(zero=True)), "training", names)
    for number in range(2, 6):
        for state in ("whole", "resumed"):
            held = whole if state == "whole" else resumed
            with chosen(CONFIG, number, held.iterate, held.first, None) as rule:
                for update in updates(4, seed=number)[:: 1 if state == "whole" else -1]:
                    rule.add(update, 1.0, "site")
                moved = optimization.step(held, CONFIG.training, rule.mean(), pairs=rule.pairs)
            if state == "whole":
                whole = moved
            else:
                resumed = checkpoints.read(tmp_path, checkpoints.write(tmp_path, moved).digest)
        for section in ("iterate", "published", "first", "second"):
            held, other = getattr(whole, section), getattr(resumed, section)
            assert {n: a.tobytes() for n, a in held.items()} == {n: a.tobytes() for n, a in other.items()}
