"""Epsilon once more, from the releases in the history: what a site reports is not taken on trust.

A site reports its epsilon and the releases behind it. The same composition,
done here, must not come to more than the site says. It can come to less: a site charges before it sends,
and an answer that was lost is in its ledger and not in the history.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from server.mechanisms import release
from server.report.sites import Account, Accounts, Release
from server.report.words import cut
from server.report.words import epsilon as rounded
from shared import accounting
from shared.errors import ConfigError

MOST = 16  # different compositions; one takes 10 to 100 ms
SLACK = 1.01  # another version's grid may differ by less than this

Key = tuple[tuple[Release, ...], float]  # releases, delta


@dataclass(frozen=True)
class Check:
    """How many accounts were composed again, of how many; the largest epsilon, and where reports fall short."""

    done: int
    of: int
    largest: float | None
    doubts: tuple[str, ...]


def check(held: Accounts) -> Check:
    """Compose accounts again: the one with the largest epsilon, then those that look cheapest for what they did."""
    composed: dict[Key, float | None] = {}
    found, doubts = [], []
    first = max(held, key=lambda key: _order(held[key].spend.epsilon), default=None)
    for (site, _, part), account in sorted(
        held.items(), key=lambda item: math.inf if item[0] == first else _strain(item[1]), reverse=True
    ):
        key = (account.releases, account.spend.delta)
        if key not in composed:
            if len(composed) >= MOST:
                continue
            composed[key] = _compose(account)
        value = composed[key]
        found.append(value)
        name, reported = cut(site, 80), rounded(account.spend.epsilon)
        if value is None:
            doubts.append(f"Site {name} reports releases of its {part} records that no mechanism can make.")
        elif value > account.spend.epsilon * SLACK:
            doubts.append(
                f"Site {name} reports ε = {reported} for its {part} records, but its releases come to {rounded(value)}."
            )
    return Check(len(found), len(held), _largest(found), tuple(doubts))


def _compose(account: Account) -> float | None:
    try:
        releases = [
            release(each.mechanism, each.sampling_rate, each.noise_multiplier, each.steps) for each in account.releases
        ]
        return accounting.epsilon(releases, account.spend.delta)
    except ConfigError:
        return None


def _largest(found: Iterable[float | None]) -> float | None:
    return max((value for value in found if value is not None), default=None)


def _strain(account: Account) -> float:
    """Return a rough cost of the releases, the sum of steps (rate / noise)^2, over the square of what is reported."""
    if any(not release.noise_multiplier > 0 for release in account.releases) or not account.spend.epsilon > 0:
        return math.inf
    cost = sum(each.steps * (each.sampling_rate / each.noise_multiplier) ** 2 for each in account.releases)
    return float(cost / account.spend.epsilon**2)


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value
