"""A site's local pass: what it sums, what it divides by, how much noise it adds, and what it moves."""

import random
from collections.abc import Callable
from typing import Any

import kept
import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import chi2

from client import data
from client.privacy.noise import Continuous
from client.privacy.randomness import Keystream
from client.site import split_key
from shared import models

Desks = Callable[..., Any]
ONCE = {"rounds": 3, "sampling_rate": 1.0, "local_steps": 1}
OPEN = {"site": {"privacy": {"allow_non_private": True}}}


def system(_: str) -> Keystream:
    return Keystream.from_system()


class Spy(Keystream):
    """Remembers what was drawn."""

    def __init__(self, key: bytes = bytes(32)) -> None:
        super().__init__(key)
        self.samples: list[tuple[int, float, list[int]]] = []
        self.noise: list[npt.NDArray[np.float64]] = []

    def poisson_sample(self, n: int, rate: float) -> npt.NDArray[np.int64]:
        drawn = super().poisson_sample(n, rate)
        self.samples.append((n, rate, drawn.tolist()))
        return drawn

    def normal(self, n: int) -> npt.NDArray[np.float64]:
        drawn = super().normal(n)
        self.noise.append(drawn.copy())
        return drawn


def flat(update: dict[str, Any]) -> npt.NDArray[np.float64]:
    return np.concatenate([update[name].ravel() for name in sorted(update)]).astype(np.float64)


# -- the noise -----------------------------------------------------------------------------------------------


def agrees(values: npt.NDArray[np.float64], deviation: float) -> bool:
    """Whether a chi-squared test at 1e-6 accepts centred Gaussian values of this deviation."""
    statistic = float(np.square(values / deviation).sum())
    return bool(chi2.ppf(5e-7, values.size) < statistic < chi2.ppf(1 - 5e-7, values.size))


@pytest.mark.parametrize("rows", [20, 100])
def test_the_released_noise_is_sigma_times_the_norm_over_the_public_expected_batch(
    new_desk: Desks, new_rows: Callable[..., Any], rows: int
) -> None:
    """Two releases of the same sum: their difference is noise of 2**(1/2) the deviation, over 20,000 coordinates.

    The test's power against 2/3 and 3/2 of sigma is 1 to many digits: they are 60 deviations away.
    """
    config = {"model": {"trainable": "full"}, "training": ONCE | {"clipping_norm": 0.7}}
    desk = new_desk(config=config, rows=new_rows(rows), randomness=system)
    first, second = desk.train(run="first"), desk.train(run="second")
    apart = flat(first.update) - flat(second.update)
    assert apart.size > 15_000
    divisor = 1.0 * 80  # the declared 100 records less a fifth, however many rows the file holds
    deviation = 2**0.5 * first.noise_multiplier * 0.7 / divisor
    assert agrees(apart, deviation)
    assert not agrees(apart, deviation * 2 / 3)
    assert not agrees(apart, deviation * 3 / 2)


def test_an_empty_sample_releases_noise_and_nothing_else(new_desk: Desks) -> None:
    rate = {"sampling_rate": 2e-3, "rounds": 3, "local_steps": 1, "clipping_norm": 0.5}
    policy = {"privacy": {"min_noise_multiplier": 0.01}}
    desk = new_desk(config={"model": {"trainable": "full"}, "training": rate}, site=policy)
    spies: list[Spy] = []
    desk.randomness = lambda _: spies.append(Spy()) or spies[-1]
    reply = desk.train()
    assert spies[0].samples[0][1:] == (2e-3, [])
    assert agrees(flat(reply.update), reply.noise_multiplier * 0.5 / (2e-3 * 80))


def test_a_site_without_training_records_sends_noise_like_any_other(
    new_desk: Desks, new_rows: Callable[..., Any]
) -> None:
    desk = new_desk(config={"training": ONCE})
    key = split_key(desk.site)
    desk.write([row for row in new_rows(100) if data.is_validation(row["id"], key, 0.2)])
    reply = desk.train()
    assert float(np.abs(reply.update["head.weight"]).max()) > 0
    assert desk.spent() == 1


# -- sampling ------------------------------------------------------------------------------------------------


def test_each_step_is_drawn_and_noised_from_the_given_keystream_at_the_public_rate(new_desk: Desks) -> None:
    spies: list[Spy] = []
    desk = new_desk(randomness=lambda _: spies.append(Spy()) or spies[-1])
    reply = desk.train()
    (spy,) = spies
    records = len(desk.resident.parts(desk.site, desk.config).train)
    assert [(n, rate) for n, rate, _ in spy.samples] == [(records, 0.5)] * reply.steps
    assert spy.samples[0] != spy.samples[1]
    assert sum(drawn.size for drawn in spy.noise) == reply.steps * sum(a.size for a in reply.update.values())


def test_the_runs_seed_changes_nothing_in_sampling_and_noise(new_desk: Desks) -> None:
    spies: list[Spy] = []
    for seed in (0, 1):
        desk = new_desk(
            name=f"seed-{seed}", config={"seed": seed}, randomness=lambda _: spies.append(Spy()) or spies[-1]
        )
        desk.train()
    assert spies[0].samples == spies[1].samples
    assert all(np.array_equal(*pair) for pair in zip(spies[0].noise, spies[1].noise, strict=True))


def test_no_global_seed_reaches_sampling_or_noise(new_desk: Desks) -> None:
    desk = new_desk(randomness=system)
    updates = []
    for run in ("first", "second"):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - the global one is meant
        torch.manual_seed(0)
        updates.append(flat(desk.train(run=run).update))
    assert not np.isclose(updates[0], updates[1], rtol=1e-3).any() or np.abs(updates[0] - updates[1]).max() > 1e-3


# -- the sum -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [100, 200])
def test_without_noise_the_update_is_the_clipped_sum_over_the_declared_batch(new_desk: Desks, declared: int) -> None:
    """The head's gradient is known in closed form: (p - y) times the feature, and (p - y) for the bias."""
    config = {
        "model": {"trainable": "head"},
        "training": ONCE | {"clipping_norm": 0.8, "learning_rate": 0.5},
        "privacy": {"epsilon": float("inf")},
    }
    site = OPEN["site"] | {"dataset": {"records": declared}}
    desk = new_desk(config=config, site=site)
    update = desk.train().update
    model = models.load(desk.config)
    examples = desk.resident.parts(desk.site, desk.config).train
    total = {"head.weight": np.zeros((2, 32)), "head.bias": np.zeros(2)}
    norms = []
    for tokens, label in zip(kept.tokens(examples), kept.labels(examples), strict=True):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            feature = model.module.features(input_ids=ids, attention_mask=torch.ones_like(ids))
            gap = model.module.head(feature).softmax(1)[0].double().numpy() - np.eye(2)[label]
        gradient = {"head.weight": np.outer(gap, feature[0].double().numpy()), "head.bias": gap}
        norms.append(np.sqrt(sum(np.square(part).sum() for part in gradient.values())))
        for name, part in gradient.items():
            total[name] += part * min(1, 0.8 / 1.001 / norms[-1])
    assert min(norms) > 0.8 or max(norms) > 0.8  # some are clipped
    for name, value in total.items():
        assert np.allclose(update[name], -0.5 * value / (0.8 * declared), atol=1e-5)


@pytest.mark.parametrize("records_at_once", [5, 64])
def test_a_run_that_promises_nothing_may_leave_gradients_unclipped(new_desk: Desks, records_at_once: int) -> None:
    """The update is then that of plain gradient steps on the mean over the declared batch, however it is cut up."""
    config = {
        "model": {"trainable": "full"},
        "training": ONCE | {"local_steps": 2, "learning_rate": 0.1, "clipping_norm": 1e-3},
        "privacy": {"epsilon": float("inf"), "clipping": "none"},
        "hardware": {"micro_batch": records_at_once},
    }
    desk = new_desk(config=config, **OPEN)
    reply = desk.train()
    model, examples = models.load(desk.config), desk.resident.parts(desk.site, desk.config).train
    parameters = {name: value for name, value in model.module.named_parameters() if name in model.trainable}
    for _ in range(2):
        total = torch.zeros(())
        for tokens, label in zip(kept.tokens(examples), kept.labels(examples), strict=True):
            ids = torch.tensor([tokens])
            logits = model.module(input_ids=ids, attention_mask=torch.ones_like(ids))
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor([label]))
        found = torch.autograd.grad(total / 80, list(parameters.values()))
        with torch.no_grad():
            for value, gradient in zip(parameters.values(), found, strict=True):
                value -= 0.1 * gradient
    start = desk.start()
    moved = {name: value.detach().numpy() - start[name] for name, value in parameters.items()}
    assert max(float(np.abs(value).max()) for value in moved.values()) > 1e-3  # which is the clipping norm
    assert set(moved) == set(reply.update)
    assert all(np.allclose(reply.update[name], value, atol=2e-6) for name, value in moved.items())
    assert reply.gradients == "summed"


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_a_proximal_phase_is_fedprox_on_the_mean_gradient(new_desk: Desks, momentum: float) -> None:
    """Li et al. 2020, equation 2: gradient steps on the loss plus mu/2 times the squared distance from the start."""
    phase = {"local_steps": 3, "learning_rate": 0.2, "momentum": momentum, "proximal": 2.0, "clipping_norm": 1e-3}
    config = {
        "model": {"trainable": "full"},
        "training": ONCE | phase,
        "privacy": {"epsilon": float("inf"), "clipping": "none"},
    }
    desk = new_desk(config=config, **OPEN)
    reply = desk.train()
    model, examples = models.load(desk.config), desk.resident.parts(desk.site, desk.config).train
    parameters = {name: value for name, value in model.module.named_parameters() if name in model.trainable}
    began = {name: value.detach().clone() for name, value in parameters.items()}
    torchs = torch.optim.SGD(parameters.values(), lr=0.2, momentum=momentum)
    for _ in range(3):
        torchs.zero_grad()
        total = torch.zeros(())
        for tokens, label in zip(kept.tokens(examples), kept.labels(examples), strict=True):
            ids = torch.tensor([tokens])
            logits = model.module(input_ids=ids, attention_mask=torch.ones_like(ids))
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor([label]))
        away = sum((value - began[name]).square().sum() for name, value in parameters.items())
        (total / 80 + 2.0 / 2 * away).backward()
        torchs.step()
    for name, value in parameters.items():
        assert np.allclose(reply.update[name], (value - began[name]).detach().numpy(), atol=3e-6)


def test_a_proximal_phase_noises_and_charges_the_same_sums_of_clipped_records(
    new_desk: Desks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pull is tens of clipping norms long here, and none of it is in what the noise is made for."""
    phase = {"rounds": 3, "sampling_rate": 0.05, "local_steps": 4, "clipping_norm": 1e-3}
    sums: list[float] = []
    noised = Continuous.noised

    def seen(self: Continuous, total: torch.Tensor, multiplier: float) -> torch.Tensor:
        sums.append(float(total.square().sum()))
        return noised(self, total, multiplier)

    monkeypatch.setattr(Continuous, "noised", seen)
    told, spies, moved = [], [], []
    for proximal in (0.0, 0.9):
        sums.clear()
        config = {"model": {"trainable": "full"}, "training": phase | {"proximal": proximal}}
        desk = new_desk(
            name=f"proximal-{proximal}", config=config, randomness=lambda _: spies.append(Spy()) or spies[-1]
        )
        reply = desk.train()
        parts = len(reply.update)
        steps = np.sqrt(np.array(sums).reshape(reply.steps, parts).sum(axis=1))
        drawn = [len(sample) for _, _, sample in spies[-1].samples]
        assert max(drawn) > 0
        assert all(norm <= 1e-3 * count for norm, count in zip(steps, drawn, strict=True))
        told.append((reply.noise_multiplier, reply.sampling_rate, reply.steps, reply.epsilon, reply.mechanism))
        moved.append(float(np.linalg.norm(flat(reply.update))))
    assert told[0] == told[1]
    assert spies[0].samples == spies[1].samples
    assert all(np.array_equal(*pair) for pair in zip(spies[0].noise, spies[1].noise, strict=True))
    assert moved[1] < 0.7 * moved[0]  # and yet it pulls
    assert moved[0] > 10 * 1e-3


@pytest.mark.parametrize("trainable", ["lora", "full", "bias", "head"])
def test_the_trained_weights_move_and_the_others_stay(new_desk: Desks, trainable: str) -> None:
    config = {"model": {"trainable": trainable}, "privacy": {"epsilon": float("inf")}, "training": ONCE}
    desk = new_desk(config=config, **OPEN)
    update = desk.train().update
    fresh = models.load(desk.config)
    assert set(update) == set(fresh.trainable)
    still = {name for name, value in update.items() if not np.abs(value).max() > 0}
    assert still == set()
    moved = dict(desk.model.module.named_parameters())
    for name, value in fresh.module.named_parameters():
        if name not in fresh.trainable:
            assert torch.equal(value, moved[name]), name


def test_the_warm_start_trains_the_head_alone(new_desk: Desks) -> None:
    warm = {"rounds": 1, "sampling_rate": 0.5}
    desk = new_desk(config={"warm_start": warm, "refit": warm})
    assert set(desk.train(1).update) == {"head.weight", "head.bias"}
    assert any(".lora_B." in name for name in desk.train(2).update)
    assert set(desk.train(5).update) == {"head.weight", "head.bias"}


def test_momentum_carries_a_step_into_the_next_within_the_round(new_desk: Desks) -> None:
    slow = {"learning_rate": 1e-2, "local_steps": 2, "sampling_rate": 1.0}
    config = {"model": {"trainable": "head"}, "privacy": {"epsilon": float("inf")}}
    plain = new_desk(name="plain", config=config | {"training": slow}, **OPEN).train().update
    carried = new_desk(name="carried", config=config | {"training": slow | {"momentum": 0.5}}, **OPEN).train().update
    assert np.allclose(
        carried["head.weight"], 1.25 * plain["head.weight"], rtol=0.05, atol=1e-6
    )  # 1 + 1.5 steps for 1 + 1
