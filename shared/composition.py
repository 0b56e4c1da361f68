"""Privacy-loss distributions composed, with what was composed before kept for the next question.

A *group* is (sampling rate, noise multiplier, steps): equal steps of one Poisson-sampled Gaussian mechanism. A
history is a tuple of groups in the order in which they first appeared, so that a run that goes on changes the
last group or adds one. The composition of the groups before it is kept: one more round costs one
self-composition of a step, which is a power in Fourier space whatever the number of steps, and one convolution
for the groups before. A figure depends on the history alone, never on what happened to be kept.

Importing `dp_accounting` takes half a second or so, so it waits until the first composition.
"""

import math
import threading
from functools import lru_cache
from typing import Any

Group = tuple[float, float, int]
Groups = tuple[Group, ...]

_FINEST_SHARE = 8  # the interval is at most this part of a step's privacy-loss deviation: +0.13 % epsilon
_COARSEST = 2.0**-9  # ... and never above this, unless the noise is so low that the grid would not fit
_WIDEST = 16.0  # a grid this coarse only tells epsilons of 100,000 and more apart: call them inf
_STEP_POINTS, _TOTAL_POINTS = 2.0**15, 2.0**19  # about the most points of a step's grid, and of a run's
_KEPT = 8  # compositions; each is two arrays of at most about _TOTAL_POINTS


@lru_cache(maxsize=1024)
def pld_epsilon(groups: Groups, delta: float) -> float:
    """Epsilon at `delta` of the groups' composition, never below the true one; inf beyond the widest grid.

    Each convolution moves at most 1e-15 of probability to an infinite loss, and so does each
    self-composition: a thousand different groups lose 2e-12 of delta, always to the pessimistic side.
    """
    interval = _interval(groups)
    if interval > _WIDEST:
        return math.inf
    return float(_composition(groups, interval).get_epsilon_for_delta(delta))


_kept: dict[tuple[float, Groups], Any] = {}  # least recently used first
_lock = threading.Lock()


def _composition(groups: Groups, interval: float) -> Any:
    """Compose from the longest part of the history that is kept; keep the whole and all but its last group."""
    done, total = len(groups), None
    while done and (total := _recall((interval, groups[:done]))) is None:
        done -= 1
    for number in range(done, len(groups)):
        part = _steps(*groups[number], interval)
        total = part if total is None else total.compose(part)
        if number >= len(groups) - 2:
            _keep((interval, groups[: number + 1]), total)
    return total


def _recall(history: tuple[float, Groups]) -> Any:
    with _lock:
        if (found := _kept.pop(history, None)) is not None:
            _kept[history] = found
        return found


def _keep(history: tuple[float, Groups], composed: Any) -> None:
    with _lock:
        _kept[history] = composed
        while len(_kept) > _KEPT:
            del _kept[next(iter(_kept))]


@lru_cache(maxsize=_KEPT)
def _steps(rate: float, noise: float, steps: int, interval: float) -> Any:
    step = _one_step(rate, noise, interval)
    return step if steps == 1 else step.self_compose(steps)


@lru_cache(maxsize=16)
def _one_step(rate: float, noise: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as pld

    step = pld.from_gaussian_mechanism(noise, value_discretization_interval=interval, sampling_prob=rate)
    # Arrays from the start: short distributions come as dictionaries, which are convolved in plain Python.
    return pld.PrivacyLossDistribution(step._pmf_remove.to_dense_pmf(), step._pmf_add.to_dense_pmf())


def _interval(groups: Groups) -> float:
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
