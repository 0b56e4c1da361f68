"""What each site did over a run, and what went wrong: the tables of a report."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from server.history.records import Kind, Metric, Outcome, Part, Spend
from server.report.facts import Facts

PARTS: tuple[Part, Part] = ("train", "validation")


@dataclass(frozen=True)
class Release:
    """Noised sums of one kind: `steps` of them at one sampling rate and noise multiplier."""

    sampling_rate: float
    noise_multiplier: float
    steps: int
    mechanism: str = "gaussian"


@dataclass(frozen=True)
class Account:
    """One part of one dataset: its largest spend, which is its last, and the releases behind it."""

    spend: Spend
    releases: tuple[Release, ...]


Accounts = Mapping[tuple[str, str, Part], Account]  # by site, dataset and part


@dataclass
class Site:
    """One site's row."""

    name: str
    datasets: dict[str, dict[Part, Account]] = field(default_factory=dict)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    score: Metric | None = None  # its most telling one, on its own validation records
    score_round: int = 0


@dataclass
class Trouble:
    """Participations that ended in the same way with the same words."""

    site: str
    kind: Kind
    outcome: Outcome
    error: str | None
    first: int
    last: int
    times: int


def sites(facts: Facts, held: Accounts) -> list[Site]:
    """Sum the run up for each site, by name."""
    found = {name: Site(name) for name in facts.sites}
    for (site, dataset, part), account in held.items():
        found[site].datasets.setdefault(dataset, {})[part] = account
    for _, answer in facts.participations:
        found[answer.site].outcomes[answer.outcome] += 1
    for number, metric in facts.metrics:
        if metric.site is not None and (metric.scope, metric.name) == ("validation", facts.validated):
            found[metric.site].score, found[metric.site].score_round = metric, number
    return list(found.values())


def accounts(spends: Sequence[tuple[int, Spend]]) -> Accounts:
    """Sum the spends up by site, dataset and part.

    An epsilon that is not a number counts as the largest: nothing is known of it.
    """
    largest: dict[tuple[str, str, Part], Spend] = {}
    steps: dict[tuple[str, str, Part], dict[tuple[float, float, str], int]] = defaultdict(dict)
    for _, spend in spends:
        key = (spend.site, spend.dataset, spend.part)
        if key not in largest or not spend.epsilon < largest[key].epsilon:
            largest[key] = spend
        kind = (spend.sampling_rate, spend.noise_multiplier, spend.mechanism)
        steps[key][kind] = steps[key].get(kind, 0) + spend.steps
    return {
        key: Account(spend, tuple(Release(rate, noise, total, how) for (rate, noise, how), total in steps[key].items()))
        for key, spend in largest.items()
    }


def troubles(facts: Facts) -> list[Trouble]:
    """Group what did not go well by site and words, the latest first."""
    found: dict[tuple[str, Kind, Outcome, str | None], Trouble] = {}
    for number, part in facts.participations:
        if part.outcome == "pending" or (part.outcome == "ok" and part.error is None):
            continue
        key = (part.site, part.kind, part.outcome, part.error)
        trouble = found.setdefault(key, Trouble(*key, first=number, last=number, times=0))
        trouble.last = number
        trouble.times += 1
    return sorted(found.values(), key=lambda trouble: -trouble.last)


@dataclass
class Traffic:
    """What one round moved, and how long its slowest site trained."""

    down: int = 0
    up: int = 0
    slowest: float = 0.0
    answered: int = 0  # participations that ended well
    asked: int = 0


def traffic(facts: Facts) -> dict[int, Traffic]:
    """Sum each round's participations up."""
    found = {each.number: Traffic() for each in facts.rounds}
    for number, part in facts.participations:
        if part.outcome == "pending":
            continue
        seen = found[number]
        seen.down += part.bytes_down
        seen.up += part.bytes_up
        seen.asked += 1
        seen.answered += part.outcome == "ok"
        if part.kind == "train" and part.outcome == "ok":
            seen.slowest = max(seen.slowest, part.seconds)
    return found
