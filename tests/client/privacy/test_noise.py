"""Noise on a sum: its deviation, the grid's sensitivity, and whose random numbers it takes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

from client.privacy import noise
from client.privacy.engine import SLACK, Clipping
from client.privacy.noise import Continuous, Discrete, Grid, Noise, OnDevice
from client.privacy.randomness import Keystream
from shared.errors import ConfigError
from shared.run_config import Privacy

CPU = torch.device("cpu")


def stream() -> Keystream:
    return Keystream(bytes(range(32)))


def clipped(samples: Tensor, clipping: Clipping) -> Tensor:
    """Scale of each record, as the engine has it, over one parameter."""
    norms = samples.flatten(1).norm(dim=1)
    return clipping.factors(torch.where(torch.isfinite(norms), norms, math.nan))


@st.composite
def batches(draw: st.DrawFn) -> Tensor:
    """Records of up to 300 values: of any size, all values alike, one large, or not finite."""
    records, values = draw(st.integers(1, 5)), draw(st.integers(1, 300))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    samples = torch.randn(records, values, generator=seed)
    if draw(st.booleans()):
        samples = samples.sign()  # where rounding adds up most
    samples *= 10.0 ** torch.randint(-8, 9, (records, 1), generator=seed)
    if draw(st.booleans()):
        samples[0, -1] = draw(st.sampled_from([math.inf, math.nan, 1e30]))
    return samples


@settings(max_examples=300, deadline=None)
@given(
    samples=batches(),
    norm=st.floats(1e-4, 1e4),
    share=st.floats(1e-4, 1.0),
    mode=st.sampled_from(["flat", "normalise"]),
)
def test_one_record_moves_the_whole_number_sum_by_no_more_than_the_sensitivity(
    samples: Tensor, norm: float, share: float, mode: str
) -> None:
    clipping = Clipping(norm, mode)  # type: ignore[arg-type]
    grid = Grid.of(norm, samples.shape[1], share)
    factors = clipped(samples, clipping)
    whole, rest = grid.rounded_sum(samples, factors), grid.rounded_sum(samples[1:], factors[1:])
    assert float((whole - rest).double().norm()) <= grid.sensitivity


@pytest.mark.parametrize("parameters", [10, 1000])
def test_a_record_that_rounds_up_everywhere_passes_the_clipping_norm_and_not_the_sensitivity(parameters: int) -> None:
    # Clipped to 10.51 steps in each coordinate, all rounded to 11: without gamma sqrt(d) / 2 it would be too much.
    share = 1 / (10.51 * (1 + SLACK))
    samples = torch.ones(1, parameters)
    grid = Grid.of(3.0, parameters, share)
    moved = float(grid.rounded_sum(samples, clipped(samples, Clipping(3.0))).double().norm())
    assert moved == pytest.approx(11 * math.sqrt(parameters))
    assert moved > 3.0 / grid.step
    assert moved <= grid.sensitivity


@pytest.mark.parametrize("parameters", [100, 100_000, 22_000_000])
def test_the_grid_costs_half_its_share_in_any_dimension(parameters: int) -> None:
    grid = Grid.of(0.05, parameters, Privacy().grid)
    assert grid.sensitivity * grid.step == pytest.approx(0.05 + grid.step * math.sqrt(parameters) / 2)
    assert grid.sensitivity * grid.step == pytest.approx(1.005 * 0.05)


def test_the_sum_is_of_records_rounded_one_by_one_whatever_the_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = torch.randn(9, 4, 6, generator=torch.Generator().manual_seed(1))
    factors = clipped(samples, Clipping(1.0))
    grid = Grid.of(1.0, 24, 0.5)
    whole = grid.rounded_sum(samples, factors)
    alone = [grid.rounded_sum(samples[n : n + 1], factors[n : n + 1]) for n in range(9)]
    assert whole.dtype == torch.int64
    assert torch.equal(whole, torch.stack(alone).sum(0))
    assert torch.equal(whole, torch.stack(alone[::-1]).sum(0))
    by_hand = (samples.double() * factors.double().view(-1, 1, 1) / grid.step).round().long().sum(0)
    assert torch.equal(whole, by_hand)
    monkeypatch.setattr(noise, "_IN_CACHE", 50)
    assert torch.equal(whole, grid.rounded_sum(samples, factors))
    assert not grid.rounded_sum(samples[:0], factors[:0]).any()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_record_that_is_not_finite_counts_as_zero_alone(bad: float) -> None:
    samples = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    grid = Grid.of(1.0, 5, 0.01)
    expected = grid.rounded_sum(samples[1:], clipped(samples[1:], Clipping(1.0)))
    samples[0, 2] = bad
    assert torch.equal(grid.rounded_sum(samples, clipped(samples, Clipping(1.0))), expected)


def agrees(values: Tensor, deviation: float) -> bool:
    """Chi-square of the variance at 1e-6: at 100,000 values a deviation 2 % off is rejected."""
    statistic = float((values.double() / deviation).square().sum())
    return bool(chi2.ppf(5e-7, values.numel()) < statistic < chi2.ppf(1 - 5e-7, values.numel()))


@pytest.mark.parametrize(
    ("kind", "sensitivity"),
    [
        (Continuous(0.05, stream()), 0.05),
        (Discrete(Grid.of(0.05, 100_000, 0.01), stream()), 0.05 * 1.005),
        (Discrete(Grid.of(0.05, 100_000, 1.0), stream()), 0.05 * 1.5),  # without gamma sqrt(d) / 2: 2/3 of it
        (Discrete(Grid(1.0, 1.0), stream()), 1.0),
    ],
)
def test_the_noise_is_the_multiplier_times_the_sensitivity_and_not_two_thirds_or_three_halves_of_it(
    kind: Noise, sensitivity: float
) -> None:
    total = torch.arange(100_000).view(10, -1)
    if isinstance(kind, Discrete):
        before = total * kind.grid.step
    else:
        total = before = total * 1e-4
    noised = kind.noised(total, 1.7)
    assert noised.dtype == torch.float32
    assert noised.shape == total.shape
    values = noised.double() - before.double()
    assert agrees(values, 1.7 * sensitivity)
    assert not agrees(values, 1.7 * sensitivity * 2 / 3)
    assert not agrees(values, 1.7 * sensitivity * 3 / 2)
    assert not agrees(values, 1.7 * sensitivity * 1.02)
    assert abs(float(values.mean())) < 5 * 1.7 * sensitivity / math.sqrt(values.numel())


def test_discrete_noise_is_no_rounded_continuous_noise() -> None:
    """Of 100,000 draws of deviation 1/2 78.7 % are 0, and 68.3 % of rounded ones: 70 deviations of the count away."""
    noised = Discrete(Grid(1.0, 1.0), stream()).noised(torch.zeros(100_000, dtype=torch.int64), 0.5)
    weights = np.exp(-2.0 * np.arange(-20, 21) ** 2)
    expected = 100_000 * weights.max() / weights.sum()
    assert abs(int((noised == 0).sum()) - expected) < 5 * math.sqrt(expected * (1 - expected / 100_000))


def test_discrete_noise_leaves_multiples_of_the_grids_step() -> None:
    grid = Grid(0.25, 40.0)  # a step that float32 holds exactly
    noised = Discrete(grid, stream()).noised(torch.zeros(10_000, dtype=torch.int64), 1.0)
    assert torch.equal(noised / 0.25, (noised / 0.25).round())
    assert len(torch.unique(noised)) > 100


def test_without_noise_the_sum_comes_out_as_it_is() -> None:
    total = torch.tensor([1, -2, 3])
    assert Discrete(Grid(0.5, 9.0), stream()).noised(total, 0.0).tolist() == [0.5, -1.0, 1.5]
    assert Continuous(1.0, stream()).noised(total.float(), 0.0).tolist() == [1.0, -2.0, 3.0]


def test_discrete_noise_goes_on_whole_numbers_that_cannot_overflow() -> None:
    kind = Discrete(Grid(1.0, 1.0), stream())
    with pytest.raises(TypeError, match="whole numbers"):
        kind.noised(torch.zeros(3), 1.0)
    for sum_of_steps in (2**62, -(2**63)):
        with pytest.raises(OverflowError, match="2\\*\\*62"):
            kind.noised(torch.tensor([0, sum_of_steps]), 1.0)
    kind.noised(torch.tensor([2**62 - 1, 1 - 2**62]), 1.0)
    with pytest.raises(ConfigError, match=r"privacy\.grid"):
        kind.noised(torch.zeros(3, dtype=torch.int64), 2.0**41)
    with pytest.raises(ConfigError, match=r"privacy\.grid=1e-09 makes 4.69e\+12 steps .* raise it to 4e-06"):
        Grid.of(1.0, 22_000_000, 1e-9)
    Grid.of(1.0, 22_000_000, 4e-6)


def test_no_noise_comes_from_the_generator_of_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"device 'cpu'.*allow_device_noise"):
        OnDevice(1.0, CPU)
    kind = noise.choose(Privacy(), 0.5, 10, stream(), CPU, allow_device_noise=True)
    assert (kind.mechanism, kind.source) == ("gaussian", "aes-256-ctr")


def test_the_kind_is_the_runs_and_the_source_is_the_sites() -> None:
    usual = noise.choose(Privacy(), 0.5, 100, stream(), CPU)
    assert isinstance(usual, Continuous)
    assert usual.sensitivity == 0.5
    whole = noise.choose(
        Privacy(noise="discrete", grid=0.1), 0.5, 100, stream(), torch.device("cuda"), allow_device_noise=True
    )
    assert isinstance(whole, Discrete)
    assert (whole.mechanism, whole.source) == ("discrete-gaussian", "aes-256-ctr")
    assert whole.grid == Grid.of(0.5, 100, 0.1)
    assert noise.of_counts(Privacy(noise="discrete"), stream()).mechanism == "discrete-gaussian"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_noise_from_an_accelerator_has_its_deviation_and_never_repeats() -> None:
    kind = noise.choose(Privacy(), 0.5, 10, stream(), torch.device("cuda"), allow_device_noise=True)
    assert (kind.mechanism, kind.source) == ("gaussian", "device")
    total = torch.zeros(100_000, device="cuda")
    values = kind.noised(total, 1.7)
    assert values.device.type == "cuda"
    assert agrees(values.cpu(), 1.7 * 0.5)
    assert not agrees(values.cpu(), 1.7 * 0.5 * 2 / 3)
    assert not agrees(values.cpu(), 1.7 * 0.5 * 3 / 2)
    assert not torch.equal(values, kind.noised(total, 1.7))
    assert not torch.equal(values, OnDevice(0.5, torch.device("cuda")).noised(total, 1.7))


def test_a_key_repeats_its_noise() -> None:
    first = Discrete(Grid.of(1.0, 9, 0.1), stream()).noised(torch.zeros(9, dtype=torch.int64), 1.0)
    second = Discrete(Grid.of(1.0, 9, 0.1), stream()).noised(torch.zeros(9, dtype=torch.int64), 1.0)
    assert np.array_equal(first.numpy(), second.numpy())
