"""The server's step against torch's optimisers, its schedule, its average, and its state through a checkpoint."""

import numpy as np
import pytest
import torch

from server import checkpoints, optimization
from server.optimization import ServerState, enter, schedule, start, step
from shared.run_config import Phase

NAMES = ("a", "b")


def phase(**settings):
    return Phase.model_validate({"rounds": 20, "sampling_rate": 0.5, **settings})


def arrays(seed, scale=1.0):
    random = np.random.default_rng(seed)
    return {
        "a": (random.normal(0, scale, (3, 4))).astype(np.float32),
        "b": random.normal(0, scale, 5).astype(np.float32),
    }


def entered():
    return enter(start(arrays(0)), "training", NAMES)


def same_bits(one: ServerState, other: ServerState) -> bool:
    sections = ("iterate", "published", "first", "second")
    return (one.steps, one.phase) == (other.steps, other.phase) and all(
        {n: (a.dtype, a.shape, a.tobytes()) for n, a in getattr(one, s).items()}
        == {n: (a.dtype, a.shape, a.tobytes()) for n, a in getattr(other, s).items()}
        for s in sections
    )


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_adam_is_torchs_adam_on_the_negated_update(scale):
    settings = phase(server_optimizer="adam", server_learning_rate=0.02, server_momentum=0.8)
    state = entered()
    parameters = {name: torch.nn.Parameter(torch.from_numpy(array.copy())) for name, array in arrays(0).items()}
    torchs = torch.optim.Adam(
        parameters.values(), lr=0.02, betas=(0.8, optimization.SECOND_MOMENT_DECAY), eps=settings.server_adaptivity
    )
    for number in range(12):
        update = arrays(number + 1, scale)
        state = step(state, settings, update)
        for name, parameter in parameters.items():
            parameter.grad = -torch.from_numpy(update[name])
        torchs.step()
        for name, parameter in parameters.items():
            np.testing.assert_allclose(state.iterate[name], parameter.detach().numpy(), rtol=2e-5, atol=2e-6)


def test_adagrad_is_torchs_adagrad_on_the_negated_update():
    settings = phase(server_optimizer="fedadagrad", server_learning_rate=0.1, server_adaptivity=1e-3)
    state = entered()
    parameter = torch.nn.Parameter(torch.from_numpy(arrays(0)["a"].copy()))
    torchs = torch.optim.Adagrad([parameter], lr=0.1, eps=1e-3)
    for number in range(12):
        update = arrays(number + 1)
        state = step(state, settings, update)
        parameter.grad = -torch.from_numpy(update["a"])
        torchs.step()
        np.testing.assert_allclose(state.iterate["a"], parameter.detach().numpy(), rtol=2e-5, atol=2e-6)


def test_yogi_is_its_papers_second_moment_with_adams_correction():
    """Zaheer et al. 2018, equation for v: it moves towards the square by a step of fixed size, up or down."""
    settings = phase(server_optimizer="fedyogi", server_learning_rate=0.1, server_momentum=0.8, server_adaptivity=1e-3)
    state = entered()
    x, m, v = arrays(0)["a"].astype(np.float64), 0.0, 0.0
    for number in range(1, 13):
        update = arrays(number, scale=10.0 if number < 4 else 0.1)  # the second moment must come down again
        state = step(state, settings, update)
        delta = update["a"].astype(np.float64)
        m = 0.8 * m + 0.2 * delta
        v = v + 0.01 * delta**2 * np.where(v < delta**2, 1.0, -1.0)
        x = x + 0.1 * (m / (1 - 0.8**number)) / (np.sqrt(v / (1 - 0.99**number)) + 1e-3)
        np.testing.assert_allclose(state.iterate["a"], x, rtol=1e-4, atol=1e-5)


def test_a_larger_adaptivity_damps_small_updates():
    moved = {
        tau: step(entered(), phase(server_adaptivity=tau, server_learning_rate=1.0), arrays(1, 1e-4)).iterate["a"]
        - arrays(0)["a"]
        for tau in (1e-8, 1e-2)
    }
    np.testing.assert_allclose(np.abs(moved[1e-8]), 1.0, rtol=0.05)
    assert np.abs(moved[1e-2]).max() < 0.1


def test_sgd_is_torchs_momentum_on_the_negated_update():
    settings = phase(server_optimizer="sgd", server_learning_rate=0.5, server_momentum=0.9)
    state = entered()
    parameter = torch.nn.Parameter(torch.from_numpy(arrays(0)["a"].copy()))
    torchs = torch.optim.SGD([parameter], lr=0.5, momentum=0.9)
    for number in range(8):
        update = arrays(number + 1)
        state = step(state, settings, update)
        parameter.grad = -torch.from_numpy(update["a"])
        torchs.step()
        np.testing.assert_allclose(state.iterate["a"], parameter.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_without_momentum_sgd_adds_the_mean_update():
    state = step(entered(), phase(server_optimizer="sgd", server_learning_rate=1.0, server_momentum=0.0), arrays(1))
    for name in NAMES:
        np.testing.assert_allclose(state.iterate[name], arrays(0)[name] + arrays(1)[name], rtol=1e-6)


def test_the_schedule_is_flat_for_half_of_the_phase_and_falls_to_a_tenth():
    decay, constant = phase(server_schedule="decay"), phase(server_schedule="constant")
    rates = [schedule(decay, done) for done in np.linspace(0, 1, 21)]
    assert rates[:11] == [1.0] * 11
    assert rates[-1] == pytest.approx(0.1)
    np.testing.assert_allclose(np.diff(rates[10:]), -0.09, atol=1e-9)
    assert [schedule(constant, done) for done in (0.0, 0.7, 1.0)] == [1.0] * 3
    moved = {
        done: step(entered(), phase(server_optimizer="sgd", server_schedule="decay"), arrays(1), done=done)
        for done in (0.0, 1.0)
    }
    small, large = (moved[done].iterate["a"] - arrays(0)["a"] for done in (1.0, 0.0))
    np.testing.assert_allclose(small, large / 10, rtol=1e-3, atol=1e-6)


def test_the_published_average_weighs_the_first_steps_equally_and_then_decays():
    settings = phase(server_optimizer="sgd", server_learning_rate=1.0, server_average=0.75)
    state, iterates, expected = entered(), [], None
    for number in range(1, 9):
        state = step(state, settings, arrays(number))
        iterates.append(state.iterate["a"].astype(np.float64))
        expected = np.mean(iterates, axis=0) if number <= 4 else 0.75 * expected + 0.25 * iterates[-1]
        np.testing.assert_allclose(state.published["a"], expected, rtol=1e-5, atol=1e-5)


def test_without_an_average_what_is_published_is_the_iterate():
    state = step(step(entered(), phase(), arrays(1)), phase(), arrays(2))
    assert {n: a.tobytes() for n, a in state.published.items()} == {n: a.tobytes() for n, a in state.iterate.items()}


def test_a_phase_begins_from_what_the_last_one_published_with_fresh_moments():
    settings = phase(server_average=0.9)
    state = step(step(entered(), settings, arrays(1)), settings, arrays(2))
    assert enter(state, "training", NAMES) is state
    refit = enter(state, "refit", ("b",))
    assert {n: a.tobytes() for n, a in refit.iterate.items()} == {n: a.tobytes() for n, a in state.published.items()}
    assert (refit.steps, refit.phase, set(refit.first), set(refit.second)) == (0, "refit", {"b"}, {"b"})
    assert not any(array.any() for array in (*refit.first.values(), *refit.second.values()))
    moved = step(refit, settings, {"b": arrays(3)["b"]})
    assert moved.iterate["a"].tobytes() == refit.iterate["a"].tobytes()


def test_a_step_leaves_the_state_that_it_started_from():
    before = entered()
    copy = enter(start(arrays(0)), "training", NAMES)
    step(before, phase(), arrays(1))
    assert same_bits(before, copy)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "yogi", "adagrad"])
def test_a_state_goes_through_a_checkpoint_to_the_bit_and_resuming_equals_not_stopping(tmp_path, optimizer):
    settings = phase(server_optimizer=optimizer, server_average=0.6)
    whole = resumed = entered()
    for number in range(1, 8):
        whole = step(whole, settings, arrays(number), done=number / 20)
        resumed = step(resumed, settings, arrays(number), done=number / 20)
        written = checkpoints.write(tmp_path, resumed)
        resumed = checkpoints.read(tmp_path, written.digest)
        assert same_bits(whole, resumed)
        assert enter(resumed, "training", NAMES) is resumed
