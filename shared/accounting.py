"""What noised sums cost in privacy: epsilon of a planned run, its calibration, and a Rényi filter.

The unit is one record under add-or-remove-one neighbours. Every mechanism here is a sum of vectors, each
clipped to a public norm, over a Poisson sample at a public rate (empty samples included), with Gaussian
or discrete Gaussian noise of `noise_multiplier` times that norm. Two accounts are kept, for two questions:

- *A run*, whose rates, noise and most steps are fixed before its first step, is composed by
  privacy-loss distributions (`epsilon`, `calibrate`): nearly exact, never below the truth. With discrete
  noise it is composed by Rényi divergences instead: never below the truth, and most often 8 to 20 % above it.
- *A dataset's life*, whose later runs are chosen after seeing earlier ones, is bounded by a Rényi filter
  at one order fixed beforehand (`rdp`, `rdp_budget`, `best_order`). The PLD figure is not a bound there.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln, logsumexp

from shared.composition import Groups, pld_epsilon
from shared.errors import ConfigError

_SMALLEST_NOISE, _LARGEST_NOISE = 2.0**-6, 2.0**20  # where calibration looks
_NO_NOISE = 1e-6  # an epsilon beyond 10**11; smaller multipliers would overflow
_SLACK = 1e-3  # calibration stops when this part of epsilon, at most, is left unspent
_ORDERS: tuple[int, ...] = (*range(2, 65), *(1 << k for k in range(7, 15)))  # integers: positive sums
_FINE_ORDERS: tuple[int, ...] = (*range(2, 65), *(round(64 * 1.1**k) for k in range(1, 44)))

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

    *Gaussian noise.* Privacy-loss distributions on a grid, rounded pessimistically by "connect the dots" (Doroshenko et al.
    2022, "Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions"), so that the
    result is never below the true epsilon but for the rounding of floating point, about 1e-12 in delta. The
    grid's interval is the largest power of two below 1/8 of the root-mean-square privacy loss of a step,
    and 2**-9 at most, which keeps the excess of many steps near 0.1 %; where a grid would pass 2**15 points
    for a step or 2**19 for the whole (a noise multiplier below about 0.1), it is coarser, still an upper
    bound, until epsilons of several hundred thousand are called inf. A longer history is composed from the
    shorter one that was asked before (`shared.composition`).

    *Discrete Gaussian noise*, in any of the releases: the smallest epsilon over integer Rényi orders
    (`rdp`, which says why it holds). No pair of one-dimensional distributions is known to dominate the
    Poisson-sampled discrete Gaussian of many coordinates, so a PLD would be no proof.

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
    merged: dict[tuple[float, float], int] = {}  # in order of first appearance: `shared.composition` builds on it
    precision = 0.0  # of the one Gaussian that all full-batch releases amount to: the sum of steps / sigma²
    discrete = False
    for release in releases:
        if release.noise_multiplier < _NO_NOISE:
            return math.inf
        discrete |= release.mechanism == "discrete-gaussian"
        if release.sampling_rate == 1:
            precision += release.steps / release.noise_multiplier**2
        else:
            key = (release.sampling_rate, release.noise_multiplier)
            merged[key] = merged.get(key, 0) + release.steps
    if precision:
        merged[1.0, precision**-0.5] = 1
    groups = tuple((rate, noise, steps) for (rate, noise), steps in merged.items())
    if not groups:
        return 0.0
    return _renyi_epsilon(groups, delta) if discrete else pld_epsilon(groups, delta)


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


@lru_cache(maxsize=4096)
def rdp(release: Release, order: int) -> float:
    """Rényi divergence of integer `order` between the releases on neighbouring data; inf without noise.

    Mironov, Talwar and Zhang 2019, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", section
    3.3, whose sum over k is taken as (e^x - 1) from k = 2: every term is positive, so nothing cancels
    when the rate is tiny. Theorem 5 there: adding a record never costs more than this removal does.

    It is the same for the discrete Gaussian, whose sums and noise are whole numbers in any dimension
    (Canonne, Kamath and Steinke 2020, "The Discrete Gaussian for Differential Privacy"). Let f be the noise's
    probability on the integer lattice, m the record's vector, a lattice point of norm at most
    1 / sigma in units of the noise's deviation, and r(x) = f(x - m) / f(x) = exp(<x, m> - |m|²/2).

    - *Removal*: the order-a moment of 1 - q + q r under f is the binomial sum over k of the moments of r, and
      the k-th is exp((k² - k) |m|²/2) times the sum of f over the lattice shifted by k m: the same lattice,
      so that the sum is 1, and each term is the real-valued Gaussian's. For this m must be on the lattice and
      the order whole.
    - *Addition*: the reflection x -> m - x maps the lattice to itself and exchanges f(x) and f(x - m). Pairing
      x with its image, it is enough that u^a - u^(1-a) >= r (w^(1-a) - w^a) for all r >= 1, where
      u = 1 - q + q r and w = 1 - q + q / r. At a = 1 both sides are q (r - 1). With c = a - 1/2 they are
      2 sqrt(u) sinh(c ln u) and 2 r sqrt(w) sinh(c ln(1/w)); as u w >= 1, the first grows at least as fast.
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
def _renyi_epsilon(groups: Groups, delta: float) -> float:
    total = sum(steps * _step_divergences(rate, noise) for rate, noise, steps in groups)
    return max(0.0, float(np.min(total - _conversions(delta))))


@lru_cache(maxsize=1024)
def _step_divergences(rate: float, noise: float) -> npt.NDArray[np.float64]:
    return np.array([rdp(Release(rate, noise, 1), order) for order in _FINE_ORDERS])


@lru_cache(maxsize=64)
def _conversions(delta: float) -> npt.NDArray[np.float64]:
    return np.array([_conversion(order, delta) for order in _FINE_ORDERS])


@lru_cache(maxsize=4096)  # a number each; thousands of sites may share some hundred plans
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
