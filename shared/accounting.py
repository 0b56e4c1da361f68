"""What noised sums cost in privacy: epsilon of a planned run, its calibration, and a Rényi filter.

The unit is one record under add-or-remove-one neighbours. Every mechanism here is a sum of vectors, each
clipped to a public norm, over a Poisson sample at a public rate (empty samples included), with Gaussian
noise of `noise_multiplier` times that norm. Two accounts are kept, for two questions:

- *A run*, whose rates, noise and most steps are fixed before its first step, is composed by
  privacy-loss distributions (`epsilon`, `calibrate`): nearly exact, never below the truth.
- *A dataset's life*, whose later runs are chosen after seeing earlier ones, is bounded by a Rényi filter
  at one order fixed beforehand (`rdp`, `rdp_budget`, `best_order`). The PLD figure is not a bound there.

Importing `dp_accounting` takes about a second, so it waits until the first composition.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from scipy.special import gammaln, logsumexp

from shared.errors import ConfigError

_FINEST_SHARE = 8  # the interval is at most this part of a step's privacy-loss deviation: +0.13 % epsilon
_COARSEST = 2.0**-9  # ... and never above this, unless the noise is so low that the grid would not fit
_WIDEST = 16.0  # a grid this coarse only tells epsilons of 100,000 and more apart: call them inf
_STEP_POINTS, _TOTAL_POINTS = 2.0**15, 2.0**19  # about the most points of a step's grid, and of a run's
_SMALLEST_NOISE, _LARGEST_NOISE = 2.0**-6, 2.0**20  # where calibration looks
_NO_NOISE = 1e-6  # an epsilon beyond 10**11; smaller multipliers would overflow
_SLACK = 1e-3  # calibration stops when this part of epsilon, at most, is left unspent
_ORDERS: tuple[int, ...] = (*range(2, 65), *(1 << k for k in range(7, 15)))  # integers: positive sums

Mechanism = Literal["gaussian", "discrete-gaussian"]


@dataclass(frozen=True)
class Release:
    """`steps` noised sums, each over its own Poisson sample of the records.

    Attributes
    ----------
    sampling_rate
        The public probability with which each record enters a step's sample, in (0, 1]. 1 is every record:
        the plain Gaussian mechanism, as in an evaluation histogram.
    noise_multiplier
        The noise's standard deviation over the clipping norm. 0 is no noise, hence no privacy.
    steps
        How many sums were released, at least 1.
    mechanism
        Which noise: "gaussian", on real numbers, or "discrete-gaussian", on whole ones.

    Raises
    ------
    ConfigError
        If a value is outside its range.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int
    mechanism: Mechanism = "gaussian"

    def __post_init__(self) -> None:
        _check_rate(self.sampling_rate)
        _check_steps(self.steps)
        _check_mechanism(self.mechanism)
        if not 0 <= self.noise_multiplier < math.inf:
            raise ConfigError(f"noise_multiplier={self.noise_multiplier} must be finite and at least 0.")


@dataclass(frozen=True)
class PlannedSteps:
    """Steps whose noise is still to be chosen: `noise_ratio` times the plan's common multiplier."""

    sampling_rate: float
    steps: int
    noise_ratio: float = 1.0
    mechanism: Mechanism = "gaussian"

    def __post_init__(self) -> None:
        _check_rate(self.sampling_rate)
        _check_steps(self.steps)
        _check_mechanism(self.mechanism)
        if not 0 < self.noise_ratio < math.inf:
            raise ConfigError(f"noise_ratio={self.noise_ratio} must be finite and above 0.")


def epsilon(releases: Iterable[Release], delta: float) -> float:
    """Epsilon at `delta` of releases that were all planned before the first of them.

    Privacy-loss distributions on a grid, rounded pessimistically by "connect the dots" (Doroshenko et al.
    2022, "Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions"), so that the
    result is never below the true epsilon but for the rounding of floating point, about 1e-12 in delta. The
    grid's interval is the largest power of two below 1/8 of the root-mean-square privacy loss of a step,
    and 2**-9 at most, which keeps the excess of many steps near 0.1 %; where a grid would pass 2**15 points
    for a step or 2**19 for the whole (a noise multiplier below about 0.1), it is coarser, still an upper
    bound, until epsilons of several hundred thousand are called inf.

    Parameters
    ----------
    releases
        In any order; equal mechanisms are merged, and all full-batch ones become one Gaussian.
    delta
        In (0, 1). Below about 1e-12 the truncated tails weigh more than delta, and the result is inf.

    Returns
    -------
    float
        0.0 without releases; inf if any of them has no noise.
    """
    _check_delta(delta)
    merged: dict[tuple[float, float], int] = defaultdict(int)
    precision = 0.0  # of the one Gaussian that all full-batch releases amount to: the sum of steps / sigma²
    for release in releases:
        if release.noise_multiplier < _NO_NOISE:
            return math.inf
        if release.sampling_rate == 1:
            precision += release.steps / release.noise_multiplier**2
        else:
            merged[release.sampling_rate, release.noise_multiplier] += release.steps
    if precision:
        merged[1.0, precision**-0.5] = 1
    groups = tuple((rate, noise, steps) for (rate, noise), steps in sorted(merged.items()))
    return _composed_epsilon(groups, delta) if groups else 0.0


def calibrate(steps: Sequence[PlannedSteps], epsilon: float, delta: float) -> float:
    """Smallest common noise multiplier under which the planned steps spend at most `epsilon` at `delta`.

    The plan's PLD epsilon at the answer is at most `epsilon`, and within 0.1 % of it wherever epsilon moves
    smoothly with the noise (not where delta is about the sum of the sampling rates: any noise will do
    there, and epsilon jumps). The search tries numbers of five significant digits only, so that the
    rounding errors in which machines differ do not show. No plan gets less than 1/64, where one full-batch
    step costs an epsilon above 2,000.

    Parameters
    ----------
    steps
        The whole plan, training and evaluation that fall on the same records; each group may have its own
        `noise_ratio` to the common multiplier.
    epsilon
        Above 0; inf asks for no privacy and gives 0.0.
    delta
        In (0, 1).

    Raises
    ------
    ConfigError
        If a value is outside its range, the plan is empty, or no noise up to 2**20 is enough.
    """
    if math.isnan(epsilon) or epsilon <= 0:
        raise ConfigError(f"privacy.epsilon={epsilon} must be above 0 ('inf' trains without privacy).")
    _check_delta(delta)
    if not steps:
        raise ConfigError("A plan without steps has no noise to calibrate.")
    return 0.0 if math.isinf(epsilon) else _calibrated(tuple(steps), epsilon, delta)


def rdp(release: Release, order: int) -> float:
    """Rényi divergence of integer `order` between the releases on neighbouring data; inf without noise.

    Mironov, Talwar and Zhang 2019, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", section
    3.3, whose sum over k is taken as (e^x - 1) from k = 2: every term is positive, so nothing cancels
    when the rate is tiny. Theorem 5 there: adding a record never costs more than this removal does.
    """
    _check_order(order)
    sigma, rate = release.noise_multiplier, release.sampling_rate
    if sigma < _NO_NOISE:
        return math.inf
    if rate == 1:
        return release.steps * order / (2 * sigma**2)
    k = np.arange(2, order + 1, dtype=np.float64)
    binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    exponent = (k * k - k) / (2 * sigma**2)
    log_expm1 = exponent + np.log(-np.expm1(-exponent))
    log_excess = float(logsumexp(binomial + k * math.log(rate) + (order - k) * math.log1p(-rate) + log_expm1))
    return release.steps * float(np.logaddexp(0.0, log_excess)) / (order - 1)


def rdp_to_epsilon(rdp_total: float, order: int, delta: float) -> float:
    """Epsilon at `delta` that a Rényi divergence of `rdp_total` at `order` implies; 0.0 for none.

    Canonne, Kamath and Steinke 2020, "The Discrete Gaussian for Differential Privacy", proposition 12 (and
    Balle et al. 2020, "Hypothesis Testing Interpretations and Rényi Differential Privacy").
    """
    _check_order(order)
    _check_delta(delta)
    return max(0.0, rdp_total - _conversion(order, delta)) if rdp_total > 0 else 0.0


def rdp_budget(epsilon: float, delta: float, order: int) -> float:
    """Rényi divergence at `order` that (epsilon, delta) allows: the inverse of `rdp_to_epsilon`.

    A Rényi filter stops before the sum of the divergences passes it, and the whole is then (epsilon,
    delta)-private however each release was chosen from those before it (Feldman and Zrnic 2021,
    "Individual Privacy Accounting via a Rényi Filter"). At most 0 where the order is too low for so small
    an epsilon: nothing fits then.
    """
    _check_order(order)
    _check_delta(delta)
    return epsilon + _conversion(order, delta)


def best_order(epsilon: float, delta: float, typical: Release | None = None) -> int:
    """Order for a Rényi filter that lets much of what is typical into (epsilon, delta).

    Orders are weighed by how often the `typical` release fits, `rdp_budget` over `rdp`; the smallest one
    within 5 % of the best is taken. By default the typical release is a full-batch Gaussian: the shape
    that a long sum of well-noised steps takes, and its best order depends on epsilon and delta only. The
    step down is for the others: a sampled Gaussian's divergence follows the same line in the order up to a
    point, then explodes, the earlier the less its noise, so too high an order lets almost nothing in.
    At delta 1e-5 the default is 15 at epsilon 1, 4 at 8 and 2 at 20. A ledger keeps its order for ever:
    choosing it after seeing results would break the filter.
    """
    _check_delta(delta)
    if math.isnan(epsilon) or epsilon <= 0:
        raise ConfigError(f"max_epsilon={epsilon} must be above 0.")
    if math.isinf(epsilon):
        epsilon = 8.0  # any order will do; this one serves if a limit is set later
    typical = typical or Release(sampling_rate=1.0, noise_multiplier=1.0, steps=1)
    fits = {order: rdp_budget(epsilon, delta, order) / rdp(typical, order) for order in _ORDERS}
    most = max(fits.values())
    if most <= 0:
        raise ConfigError(f"max_epsilon={epsilon} is too small for any release at delta={delta}.")
    return next(order for order, fit in fits.items() if fit >= 0.95 * most)


def _conversion(order: int, delta: float) -> float:
    return (math.log(delta) + math.log(order)) / (order - 1) - math.log1p(-1 / order)


@lru_cache(maxsize=1024)
def _composed_epsilon(groups: tuple[tuple[float, float, int], ...], delta: float) -> float:
    interval = _interval(groups)
    if interval > _WIDEST:
        return math.inf
    total: Any = None
    for rate, noise, steps in groups:
        part = _one_step(rate, noise, interval)
        part = part if steps == 1 else part.self_compose(steps)
        total = part if total is None else total.compose(part)
    return float(total.get_epsilon_for_delta(delta))


@lru_cache(maxsize=16)
def _one_step(rate: float, noise: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise, value_discretization_interval=interval, sampling_prob=rate
    )


def _interval(groups: tuple[tuple[float, float, int], ...]) -> float:
    """Grid interval, a power of two: fine beside a step's loss, but of a bounded number of points."""
    variance = step_range = total_range = 0.0
    for rate, noise, steps in groups:
        full = 1 / (2 * noise**2) + 10 / noise  # the largest loss of a full-batch step, tails of 10 sigma
        variance += steps * rate**2 * math.expm1(min(noise**-2, 50.0))
        step_range = max(step_range, math.log1p(rate * math.expm1(full)) if full < 50 else full)
        drawn = min(steps, steps * rate + 10 * math.sqrt(steps * rate) + 10)  # how often a record is sampled
        total_range += drawn / (2 * noise**2) + 10 * math.sqrt(drawn) / noise
    deviation = math.sqrt(variance / sum(steps for _, _, steps in groups))
    interval = min(deviation / _FINEST_SHARE, _COARSEST)
    interval = max(interval, step_range / _STEP_POINTS, total_range / _TOTAL_POINTS)
    return float(2.0 ** math.floor(math.log2(interval)))


@lru_cache(maxsize=128)
def _calibrated(steps: tuple[PlannedSteps, ...], target: float, delta: float) -> float:
    def excess(noise: float) -> float:  # log of spent over allowed: falls as the noise grows
        plan = [Release(s.sampling_rate, noise * s.noise_ratio, s.steps, s.mechanism) for s in steps]
        return math.log(max(epsilon(plan, delta), target * 1e-3) / target)

    low = high = 1.0
    below = above = excess(1.0)
    while above > 0:
        low, below, high = high, above, high * 2
        if high > _LARGEST_NOISE:
            raise ConfigError(
                f"privacy.epsilon={target} at delta={delta} cannot be reached: a noise multiplier of "
                f"{_LARGEST_NOISE:.0f} still spends more. Raise epsilon or delta, or plan fewer steps."
            )
        above = excess(high)
    while below <= 0:
        high, above, low = low, below, low / 2
        if low < _SMALLEST_NOISE:
            return _SMALLEST_NOISE
        below = excess(low)
    # False position in log-log, on numbers of five digits; an end that stays twice pulls half (Illinois).
    pull_low, pull_high, moved = below, above, ""
    while above < -_SLACK:
        middle = _five_digits(low * (high / low) ** (pull_low / (pull_low - pull_high)))
        digit = 10.0 ** (math.floor(math.log10(low)) - 4)
        middle = max(min(middle, _five_digits(high - digit)), _five_digits(low + digit))
        if not low < middle < high:
            break
        if (value := excess(middle)) > 0:
            low, pull_low, pull_high = middle, value, pull_high / (2 if moved == "low" else 1)
            moved = "low"
        else:
            high, above, pull_high, pull_low = middle, value, value, pull_low / (2 if moved == "high" else 1)
            moved = "high"
    return high


def _five_digits(noise: float) -> float:
    return float(f"{noise:.4e}")


def _check_rate(rate: float) -> None:
    if not 0 < rate <= 1:
        raise ConfigError(f"sampling_rate={rate} must be above 0 and at most 1.")


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ConfigError(f"steps={steps} must be at least 1.")


def _check_mechanism(mechanism: str) -> None:
    if mechanism not in get_args(Mechanism):
        raise ConfigError(f"mechanism={mechanism!r} must be one of {', '.join(get_args(Mechanism))}.")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(f"privacy.delta={delta} must lie between 0 and 1, both excluded.")


def _check_order(order: int) -> None:
    if order != int(order) or order < 2:
        raise ConfigError(f"A Rényi filter's order={order} must be a whole number of at least 2.")
