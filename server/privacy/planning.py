"""What a run will cost in privacy, and what a smaller epsilon would cost in noise, before anything is run.

Every number is `shared.plan`'s and `shared.accounting`'s: those that the sites compute for themselves from
the same public values, so that what is planned here is what a site will do, and refuse.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from server.privacy.plan_request import PlanRequest
from shared import accounting, plan
from shared.accounting import Release
from shared.plan import DatasetCard, Part, SitePlan
from shared.run_config import RunConfig

SHARES = (0.5, 1.0, 2.0)  # of the target epsilon, to compare
TABLE = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)  # rounds of a table


@dataclass(frozen=True)
class SiteNoise:
    """A site's part in one phase.

    `noise` is the multiplier: the deviation of the noise over the clipping norm. `noise_per_coordinate` is what
    it leaves in each coordinate of a step's averaged gradient, still over the clipping norm: the multiplier over
    the expected batch. The averaged gradient itself is at most 1 long, so that the noise's share of it is this
    times the square root of the number of trained parameters.
    """

    site: str
    records: int
    phase: str
    sampling_rate: float
    batch: float  # records a step, expected
    steps: int
    noise: float
    noise_per_coordinate: float


@dataclass(frozen=True)
class Reached:
    """What a record's promise amounts to after `round` rounds, by the part that the record is in."""

    round: int
    epsilon_train: float
    epsilon_validation: float


@dataclass(frozen=True)
class Trade:
    """The noise that another epsilon takes; `times` is over the target's, in whatever phase."""

    epsilon: float
    noise: float
    noise_per_coordinate: float
    validation_noise: float  # of each count of an evaluation's histogram
    times: float


@dataclass(frozen=True)
class Lifetime:
    """What the run takes of a dataset's lifetime limit, by the Rényi filter that its ledger keeps.

    `share` is of the larger part, train or validation; `runs` is how many such runs the limit lets through.
    """

    site: str
    max_epsilon: float
    delta: float
    order: int
    share: float
    runs: int


@dataclass(frozen=True)
class Planned:
    """A planned run. `reached` and `trades` are those of `site`, whose averaged gradient is the noisiest in `phase`."""

    epsilon: float
    delta: float
    rounds: int
    sites: list[SiteNoise]
    site: str
    phase: str  # training, where the run has it
    reached: list[Reached]
    trades: list[Trade]
    lifetime: list[Lifetime]
    remarks: list[str]


def make(request: PlanRequest) -> Planned:
    """Plan the run at every site; it takes about a tenth of a second for each different size.

    Raises
    ------
    ConfigError
        Where a site would refuse the plan: delta above 1/(10 x records), a batch above the data, or an
        epsilon that no noise reaches.
    """
    config = request.config
    plans = {card.dataset: _plan(config, card, config.privacy.epsilon) for card in request.cards}
    sites = [row for card in request.cards for row in _rows(config, card, plans[card.dataset])]
    main = "training" if "training" in config.phases else next(iter(config.phases))
    worst = max((row for row in sites if row.phase == main), key=lambda row: row.noise_per_coordinate)
    card = next(card for card in request.cards if card.dataset == worst.site)
    return Planned(
        epsilon=config.privacy.epsilon,
        delta=config.privacy.delta,
        rounds=config.rounds,
        sites=sites,
        site=worst.site,
        phase=worst.phase,
        reached=[_reached(config, plans[worst.site], number) for number in _rounds(config, TABLE)],
        trades=[_trade(config, card, worst, share) for share in SHARES],
        lifetime=_lifetimes(request, plans),
        remarks=_remarks(config, sites),
    )


def curve(request: PlanRequest, site: str, points: int = 16) -> list[Reached]:
    """Return epsilon at about that many rounds, evenly spread, at one site."""
    card = next(card for card in request.cards if card.dataset == site)
    planned, rounds = _plan(request.config, card, request.config.privacy.epsilon), request.config.rounds
    spread = {max(1, round(rounds * share / points)) for share in range(points + 1)}
    return [_reached(request.config, planned, number) for number in _rounds(request.config, spread)]


def as_json(planned: Planned) -> str:
    """Return the plan as strict JSON; an infinite number is the text "Infinity"."""
    return json.dumps(_plain(asdict(planned)), indent=1, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(held) for name, held in value.items()}
    if isinstance(value, list):
        return [_plain(held) for held in value]
    return "Infinity" if isinstance(value, float) and math.isinf(value) else value


def _plan(config: RunConfig, card: DatasetCard, epsilon: float) -> SitePlan:
    """Return the site's plan at another epsilon, whatever `max_noise_multiplier` says of it."""
    privacy = config.privacy.model_copy(update={"epsilon": epsilon, "max_noise_multiplier": math.inf})
    return plan.make(config.model_copy(update={"privacy": privacy}), card)


def _rows(config: RunConfig, card: DatasetCard, planned: SitePlan) -> list[SiteNoise]:
    return [
        SiteNoise(
            site=card.dataset,
            records=card.records,
            phase=name,
            sampling_rate=phase.sampling_rate,
            batch=phase.divisor,
            steps=config.phases[name].steps,
            noise=phase.noise_multiplier,
            noise_per_coordinate=_per_coordinate(config, phase.noise_multiplier, phase.divisor),
        )
        for name, phase in planned.phases.items()
    ]


def _per_coordinate(config: RunConfig, noise: float, batch: float) -> float:
    """Return the noise of an averaged coordinate over the clipping norm; rounding to a grid adds to the sensitivity."""
    rounding = config.privacy.grid / 2 if config.privacy.noise == "discrete" else 0.0
    return noise * (1 + rounding) / batch


def _rounds(config: RunConfig, points: Iterable[int]) -> list[int]:
    """Return the rounds to compose at, in order: the points, the phases' ends and the last."""
    ends, done = set(), 0
    for phase in config.phases.values():
        done += phase.rounds
        ends.add(done)
    return sorted(ends | {number for number in points if 1 <= number <= config.rounds})


def releases(config: RunConfig, planned: SitePlan, part: Part, rounds: int) -> list[Release]:
    """Return what the site has released from the part after that many rounds."""
    every = planned.releases(part)
    if part == "validation":
        steps = [sum(config.evaluated(number) for number in range(1, rounds + 1))]
    else:
        steps, left = [], rounds
        for phase in config.phases.values():
            steps.append(phase.local_steps * min(left, phase.rounds))
            left -= min(left, phase.rounds)
    return [replace(release, steps=count) for release, count in zip(every, steps, strict=True) if count]


def _reached(config: RunConfig, planned: SitePlan, rounds: int) -> Reached:
    train, validation = (
        accounting.epsilon(releases(config, planned, part, rounds), config.privacy.delta)
        for part in ("train", "validation")
    )
    return Reached(rounds, train, validation)


def _trade(config: RunConfig, card: DatasetCard, target: SiteNoise, share: float) -> Trade:
    epsilon = share * config.privacy.epsilon
    planned = _plan(config, card, epsilon)
    noise = planned.phases[target.phase].noise_multiplier
    per_coordinate = _per_coordinate(config, noise, target.batch)
    return Trade(epsilon, noise, per_coordinate, planned.evaluation_noise, noise / target.noise)


def _lifetimes(request: PlanRequest, plans: dict[str, SitePlan]) -> list[Lifetime]:
    limit, delta = request.max_epsilon, request.delta
    if limit is None:
        return []
    order = accounting.best_order(limit, delta)
    budget = accounting.rdp_budget(limit, delta, order)
    result = []
    for site, planned in plans.items():
        parts: tuple[Part, Part] = ("train", "validation")
        price = max(math.fsum(accounting.rdp(release, order) for release in planned.releases(part)) for part in parts)
        result.append(Lifetime(site, limit, delta, order, price / budget, math.floor(budget / price)))
    return result


def _remarks(config: RunConfig, sites: list[SiteNoise]) -> list[str]:
    highest = max(row.noise for row in sites)
    if highest <= config.privacy.max_noise_multiplier:
        return []
    return [
        f"A noise multiplier of {highest:.2f} is above privacy.max_noise_multiplier="
        f"{config.privacy.max_noise_multiplier:g}: raise that setting, or the run is refused."
    ]
