import math
import time

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from shared.accounting import (
    PlannedSteps,
    Release,
    best_order,
    calibrate,
    epsilon,
    rdp,
    rdp_budget,
    rdp_to_epsilon,
)
from shared.errors import ConfigError

DELTA = 1e-5
PLANS = [
    ([PlannedSteps(0.032, 1600)], 8.0, 1e-5),
    ([PlannedSteps(0.2, 60), PlannedSteps(1.0, 10, noise_ratio=5.0)], 4.0, 1e-5),
    ([PlannedSteps(0.01, 1000)], 1.0, 1e-6),
    ([PlannedSteps(1.0, 1)], 0.5, 1e-6),
    ([PlannedSteps(1.0, 3)], 20.0, 1e-5),
]


def independent_rdp_epsilon(release: Release, delta: float) -> float:
    accountant = RdpAccountant()
    step = PoissonSampledDpEvent(release.sampling_rate, GaussianDpEvent(release.noise_multiplier))
    return float(accountant.compose(SelfComposedDpEvent(step, release.steps)).get_epsilon(delta))


def analytic_gaussian_epsilon(noise: float, delta: float) -> float:
    """Balle and Wang 2018, "Improving the Gaussian Mechanism", theorem 8."""

    def excess(eps: float) -> float:
        upper = norm.cdf(0.5 / noise - eps * noise)
        return float(upper - math.exp(eps) * norm.cdf(-0.5 / noise - eps * noise)) - delta

    return float(brentq(excess, 0.0, 500.0, xtol=1e-12))


@pytest.mark.parametrize(
    "release",
    [
        Release(0.032, 1.0, 32),
        Release(0.032, 1.0, 1600),
        Release(0.01, 0.8, 1000),
        Release(0.2, 2.0, 60),
        Release(0.005, 1.0, 10_000),
        Release(1e-3, 10.0, 10_000),
        Release(1.0, 4.0, 5),
    ],
)
def test_epsilon_is_below_an_independent_rdp_accountant_but_not_far(release: Release) -> None:
    bound = independent_rdp_epsilon(release, DELTA)
    assert 0.7 * bound <= epsilon([release], DELTA) <= bound


@pytest.mark.parametrize("noise", [0.3, 0.7, 1.0, 4.0, 40.0])
@pytest.mark.parametrize("steps", [1, 30])
def test_full_batch_releases_match_the_closed_form_of_the_gaussian(noise: float, steps: int) -> None:
    exact = analytic_gaussian_epsilon(noise / math.sqrt(steps), DELTA)
    assert exact - 1e-9 <= epsilon([Release(1.0, noise, steps)], DELTA) <= exact * 1.005


def test_fifty_rounds_of_a_site_of_2000_records_cost_8_4_not_77() -> None:
    rate, steps = 64 / 2000, 31  # one local epoch, without the last partial batch
    assert epsilon([Release(rate, 1.0, steps)], DELTA) == pytest.approx(1.54, abs=0.02)
    assert epsilon([Release(rate, 1.0, steps)] * 50, DELTA) == pytest.approx(8.4, abs=0.05)


def test_the_interval_is_fine_enough_where_steps_are_many_and_leak_little() -> None:
    # At dp-accounting's own interval of 1e-4 this is 0.0298, at 1e-5 0.02736, at 1e-3 0.0857.
    assert epsilon([Release(1e-3, 10.0, 10_000)], DELTA) == pytest.approx(0.02736, rel=0.01)


def test_no_release_costs_nothing_and_a_release_without_noise_costs_everything() -> None:
    assert epsilon([], DELTA) == 0.0
    assert epsilon([Release(0.1, 1.0, 5), Release(0.1, 0.0, 1)], DELTA) == math.inf
    assert rdp(Release(0.1, 0.0, 1), 4) == math.inf
    assert epsilon([Release(0.5, 1e-300, 1)], DELTA) == rdp(Release(0.5, 1e-300, 1), 4) == math.inf


@pytest.mark.parametrize("rate", [1e-3, 0.5, 1.0])
@pytest.mark.parametrize("noise", [1e-5, 1e-3, 0.02, 0.1])
def test_very_little_noise_is_reported_as_large_without_warning_or_delay(rate: float, noise: float) -> None:
    start = time.perf_counter()
    assert epsilon([Release(rate, noise, 1000)], DELTA) > 20
    assert time.perf_counter() - start < 5


def test_equal_releases_are_merged_whatever_their_order() -> None:
    first, second, scores = Release(0.05, 1.1, 20), Release(0.05, 1.3, 20), Release(1.0, 9.0, 1)
    mixed = epsilon([first, scores, second, first, scores], DELTA)
    turned = epsilon([Release(1.0, 9.0, 2), second, Release(0.05, 1.1, 40)], DELTA)
    assert mixed == pytest.approx(turned, rel=1e-9)
    assert mixed > epsilon([first, first, second], DELTA)


def test_reporting_epsilon_after_every_round_is_cheap() -> None:
    epsilon([Release(0.0317, 1.0, 32), Release(1.0, 8.0, 1)], DELTA)
    start = time.perf_counter()
    for rounds in range(2, 62):
        epsilon([Release(0.0317, 1.0, 32), Release(1.0, 8.0, 1)] * rounds, DELTA)
    assert (time.perf_counter() - start) / 60 < 0.2


@pytest.mark.parametrize(("plan", "target", "delta"), PLANS)
def test_calibration_spends_the_budget_and_no_more(plan: list[PlannedSteps], target: float, delta: float) -> None:
    noise = calibrate(plan, target, delta)

    def spent(common: float) -> float:
        return epsilon([Release(s.sampling_rate, common * s.noise_ratio, s.steps) for s in plan], delta)

    assert 0.99 * target <= spent(noise) <= target
    assert spent(noise * 2 / 3) > 1.2 * target
    assert noise == float(f"{noise:.4e}")
    # An accountant that shares no code with ours accepts the noise with 40 % to spare and refuses less.
    if len(plan) == 1:
        step = plan[0]
        assert independent_rdp_epsilon(Release(step.sampling_rate, noise, step.steps), delta) < 1.4 * target
        assert independent_rdp_epsilon(Release(step.sampling_rate, noise / 1.5, step.steps), delta) > 1.4 * target


def test_calibration_without_a_budget_asks_for_no_noise() -> None:
    assert calibrate([PlannedSteps(0.1, 10)], math.inf, DELTA) == 0.0


def test_calibration_is_fast_and_remembered() -> None:
    plan = [PlannedSteps(1.1e-3, 10_000)]
    start = time.perf_counter()
    first = calibrate(plan, 2.0, 1e-6)
    took = time.perf_counter() - start
    assert took < 5  # 1.2 s where it was measured
    start = time.perf_counter()
    assert calibrate(plan, 2.0, 1e-6) == first
    assert time.perf_counter() - start < 0.01


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_an_epsilon_that_is_no_budget_is_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        calibrate([PlannedSteps(0.1, 10)], bad, DELTA)
    with pytest.raises(ConfigError, match="max_epsilon"):
        best_order(bad, DELTA)


@pytest.mark.parametrize("bad", [0.0, 1.0, -1e-5, math.nan, 2.0])
def test_a_delta_outside_zero_and_one_is_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="delta"):
        calibrate([PlannedSteps(0.1, 10)], 1.0, bad)
    with pytest.raises(ConfigError, match="delta"):
        epsilon([], bad)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
def test_a_rate_outside_zero_and_one_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="sampling_rate"):
        PlannedSteps(rate, 10)
    with pytest.raises(ConfigError, match="sampling_rate"):
        Release(rate, 1.0, 10)


def test_steps_noise_and_plans_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="steps=0"):
        PlannedSteps(0.1, 0)
    with pytest.raises(ConfigError, match="steps=-1"):
        Release(0.1, 1.0, -1)
    for noise in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="noise_multiplier"):
            Release(0.1, noise, 1)
        with pytest.raises(ConfigError, match="noise_ratio"):
            PlannedSteps(0.1, 1, noise)
    with pytest.raises(ConfigError, match="without steps"):
        calibrate([], 1.0, DELTA)
    with pytest.raises(ConfigError, match="order"):
        rdp(Release(0.1, 1.0, 1), 1)
    with pytest.raises(ConfigError, match="cannot be reached"):
        calibrate([PlannedSteps(0.5, 1000)], 1.0, 1e-20)


@pytest.mark.parametrize("order", [2, 3, 8, 32, 256])
@pytest.mark.parametrize(
    "release", [Release(0.032, 1.0, 7), Release(0.5, 0.4, 1), Release(1.0, 2.0, 3), Release(1e-3, 3.0, 1)]
)
def test_rdp_agrees_with_an_independent_accountant(release: Release, order: int) -> None:
    accountant = RdpAccountant(orders=[order])
    step = PoissonSampledDpEvent(release.sampling_rate, GaussianDpEvent(release.noise_multiplier))
    accountant.compose(SelfComposedDpEvent(step, release.steps))
    tiny = 1e-250  # so that the conversion never clips, and can be undone
    expected = accountant.get_epsilon(tiny) + rdp_budget(0.0, tiny, order)
    assert rdp(release, order) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_rdp_of_a_tiny_rate_keeps_its_digits() -> None:
    # To first order: rate² (e^(1/sigma²) - 1) * order / 2. Summing from k = 0 loses all digits here.
    expected = 1e-14 * math.expm1(1 / 900) * 2
    assert rdp(Release(1e-7, 30.0, 1), 4) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("total", [0.5, 1.2, 4.0])
@pytest.mark.parametrize("order", [2, 4, 18])
def test_the_filters_budget_and_its_epsilon_are_inverse(total: float, order: int) -> None:
    eps = rdp_to_epsilon(total, order, DELTA)
    assert rdp_budget(eps, DELTA, order) == pytest.approx(total)
    assert rdp_to_epsilon(0.0, order, DELTA) == 0.0
    assert rdp_to_epsilon(math.inf, order, DELTA) == math.inf


@pytest.mark.parametrize("delta", [1e-5, 1e-6])
@pytest.mark.parametrize("limit", [1.0, 2.0, 4.0, 8.0, 12.0, 20.0])
def test_the_default_order_lets_most_of_a_well_noised_lifetime_in(limit: float, delta: float) -> None:
    order = best_order(limit, delta)
    for step in (Release(0.032, 4.0, 1), Release(0.1, 4.0, 1), Release(1.0, 20.0, 1)):
        fits = int(rdp_budget(limit, delta, order) / rdp(step, order))
        planned = epsilon([Release(step.sampling_rate, step.noise_multiplier, fits)], delta)
        assert 0.75 * limit < planned <= limit


def test_the_default_order_is_15_at_epsilon_1_4_at_8_and_2_at_20() -> None:
    assert [best_order(limit, DELTA) for limit in (1.0, 8.0, 20.0, math.inf)] == [15, 4, 2, 4]


RATES = st.sampled_from([0.001, 0.01, 0.1, 0.5, 1.0])
NOISES = st.floats(0.5, 20.0)


@settings(max_examples=40, deadline=None)
@given(rate=RATES, noise=NOISES, steps=st.integers(1, 300), more=st.integers(1, 300))
def test_more_steps_never_cost_less(rate: float, noise: float, steps: int, more: int) -> None:
    fewer, all_steps = Release(rate, noise, steps), Release(rate, noise, steps + more)
    assert epsilon([fewer], DELTA) <= epsilon([all_steps], DELTA) + 1e-9
    assert rdp(fewer, 8) < rdp(all_steps, 8)


@settings(max_examples=40, deadline=None)
@given(rate=RATES, noise=NOISES, factor=st.floats(1.01, 3.0), steps=st.integers(1, 300))
def test_more_noise_never_costs_more(rate: float, noise: float, factor: float, steps: int) -> None:
    less, more = Release(rate, noise, steps), Release(rate, noise * factor, steps)
    assert epsilon([more], DELTA) <= epsilon([less], DELTA) * 1.003 + 1e-6  # two grids may differ
    assert rdp(more, 8) < rdp(less, 8)


@settings(max_examples=30, deadline=None)
@given(rate=st.floats(0.001, 0.4), factor=st.floats(1.01, 2.5), noise=NOISES, steps=st.integers(1, 300))
def test_sampling_more_records_never_costs_less(rate: float, factor: float, noise: float, steps: int) -> None:
    less, more = Release(rate, noise, steps), Release(rate * factor, noise, steps)
    assert epsilon([less], DELTA) <= epsilon([more], DELTA) * 1.003 + 1e-6
    assert rdp(less, 8) < rdp(more, 8)
