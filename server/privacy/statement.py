"""What a run guarantees to each record, derived from the releases that the history has recorded.

The unit is one record of a site's dataset, under add-or-remove-one neighbours. An account is one part (train or
validation) of one site's dataset: its epsilon is composed here from its recorded releases, and only compared with
what the site reported. A record is in one part for ever, and sites are taken to share no record, so accounts
compose in parallel: the run's epsilon is the largest account's, never a sum.

The history alone is read: no run's folder, no model, no training code.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from server.history.records import Attempt, Kind, Ledger, Part, Participation, Round, Run, Spend
from server.history.store import History
from server.mechanisms import release
from shared import accounting
from shared.errors import ConfigError

PARTS: dict[Kind, Part] = {"train": "train", "evaluate": "validation"}  # which part a request is charged to
KINDS: dict[Part, Kind] = {"train": "train", "validation": "evaluate"}
TOLERANCE = 1e-6  # relative, between a site's epsilon and the one composed here from the same releases

Place = tuple[str, str, Part]  # site, dataset, part


@dataclass(frozen=True)
class Recorded:
    """What the history says about a run's privacy."""

    run: Run
    attempts: Sequence[Attempt]
    rounds: Sequence[Round]  # without their parts
    participations: Sequence[tuple[int, Participation]]
    spends: Sequence[tuple[int, Spend]]
    ledgers: dict[str, Ledger]  # the newest that any run has seen, by account


@dataclass(frozen=True)
class Sums:
    """Equal noised sums: how many, how they were noised and drawn, and in which rounds."""

    mechanism: str
    noise_source: str
    gradients: str
    sampling_rate: float
    noise_multiplier: float
    steps: int
    rounds: str


@dataclass(frozen=True)
class Account:
    """One part of one site's dataset in this run.

    Attributes
    ----------
    epsilon
        Composed from the recorded releases and, where the site's ledger was given, from all that the ledger
        holds of this run; inf where a release had no noise.
    reported
        What the site said after its last release, from its own ledger.
    events
        First and last number of the releases in the site's ledger; None where they were not recorded.
    verified
        Whether the ledger confirms the history; None where no ledger was given.
    """

    site: str
    dataset: str
    part: Part
    epsilon: float
    reported: float
    delta: float
    budget: float
    releases: tuple[Sums, ...]
    ledger_id: str
    events: tuple[int, int] | None
    verified: bool | None = None


@dataclass(frozen=True)
class Verification:
    """What an exported ledger says of the history, and what in either cannot be."""

    source: str
    dataset: str
    account: str
    sites: tuple[str, ...]
    events: int
    of_this_run: int
    lifetime_epsilon: float  # of the dataset's larger part, over all runs, as the ledger's Rényi filter bounds it
    order: int
    delta: float
    faults: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Statement:
    """A run's statement: the claim, what it rests on, and what stands against it.

    `doubts` contradict the claim, so that it is not made; `notes` are what a reader should know besides.
    """

    run: Run
    private: bool
    so_far: bool
    rounds: int
    accounts: tuple[Account, ...]
    doubts: tuple[str, ...]
    notes: tuple[str, ...]
    simulated: bool
    made_at: datetime
    verifications: tuple[Verification, ...] = field(default=())

    @property
    def largest(self) -> Account | None:
        """The account with the largest epsilon, which bounds the run's where sites share no record."""
        return max(self.accounts, key=lambda account: account.epsilon, default=None)

    @property
    def delta(self) -> float | None:
        """The largest delta of any account."""
        return max((account.delta for account in self.accounts), default=None)


def read(history: History, run: Run) -> Recorded:
    """Read all that a statement rests on, as of the run's last committed round."""
    rounds = history.rounds(run.id)
    last = rounds[-1].number if rounds else 0  # a round committed while we read is left out whole
    return Recorded(
        run=history.run(run.id),
        attempts=history.attempts(run.id),
        rounds=rounds,
        participations=[pair for pair in history.participations(run.id) if pair[0] <= last],
        spends=[pair for pair in history.spends(run.id) if pair[0] <= last],
        ledgers=history.ledgers(),
    )


def make(recorded: Recorded, *, now: datetime) -> Statement:
    """State what the history shows; `server.privacy.verify` adds what the sites' ledgers say."""
    run = recorded.run
    private = run.private and _planned(run) != math.inf
    accounts = tuple(_account(place, spends) for place, spends in sorted(by_place(recorded.spends).items()))
    doubts = [*_noiseless(accounts), *_differences(accounts), *overspent(accounts), *_uncharged(recorded)]
    return Statement(
        run=run,
        private=private,
        so_far=run.status != "completed",
        rounds=len(recorded.rounds),
        accounts=accounts,
        doubts=tuple([*doubts, *_used_twice(recorded)] if private else ()),
        notes=tuple(_unseen(recorded)) if private else (),
        simulated=any(attempt.engine == "in-process" for attempt in recorded.attempts),
        made_at=now,
    )


def by_place(spends: Iterable[tuple[int, Spend]]) -> dict[Place, list[tuple[int, Spend]]]:
    """Sort spends into accounts, each in the order of its rounds."""
    found: dict[Place, list[tuple[int, Spend]]] = defaultdict(list)
    for number, spend in sorted(spends, key=lambda pair: pair[0]):
        found[spend.site, spend.dataset, spend.part].append((number, spend))
    return dict(found)


def _compose(spends: Iterable[Spend], delta: float) -> float:
    """Epsilon of recorded releases, in the order in which they were charged; inf where no mechanism made them."""
    try:
        return accounting.epsilon(
            [release(spend.mechanism, spend.sampling_rate, spend.noise_multiplier, spend.steps) for spend in spends],
            delta,
        )
    except ConfigError:
        return math.inf


def agree(one: float, other: float) -> bool:
    """Whether two epsilons of the same releases are the same but for rounding."""
    return one == other or math.isclose(one, other, rel_tol=TOLERANCE)


def ranges(numbers: Iterable[int]) -> str:
    """Write round numbers shortly: 1-4, 7."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _planned(run: Run) -> float | None:
    section = run.config.get("privacy")
    try:
        return float(section["epsilon"]) if isinstance(section, dict) else None
    except (KeyError, TypeError, ValueError):
        return None


def _account(place: Place, spends: Sequence[tuple[int, Spend]]) -> Account:
    last = spends[-1][1]
    delta = max(spend.delta for _, spend in spends)
    alike: dict[tuple[str, str, str, float, float], list[tuple[int, int]]] = defaultdict(list)
    for number, spend in spends:
        how = (spend.mechanism, spend.noise_source, spend.gradients, spend.sampling_rate, spend.noise_multiplier)
        alike[how].append((number, spend.steps))
    events = [spend.ledger_number for _, spend in spends]
    return Account(
        *place,
        epsilon=_compose((spend for _, spend in spends), delta),
        reported=last.epsilon,
        delta=delta,
        budget=last.budget,
        releases=tuple(
            Sums(*how, steps=sum(steps for _, steps in done), rounds=ranges(number for number, _ in done))
            for how, done in alike.items()
        ),
        ledger_id=last.ledger_id,
        events=(min(events), max(events)) if all(events) else None,
    )


def _name(account: Account) -> str:
    return f"site {account.site}, {account.part} records"


def _noiseless(accounts: Sequence[Account]) -> list[str]:
    return [
        f"{_name(account)}: a sum was released without noise, or by no mechanism that is accounted for; nothing bounds it."
        for account in accounts
        if math.isinf(account.epsilon)
    ]


def differences(accounts: Iterable[Account]) -> dict[Place, str]:
    """Name the accounts whose site reports another epsilon than its recorded releases come to."""
    return {
        (account.site, account.dataset, account.part): (
            f"{_name(account)}: the site reports epsilon {account.reported:.6g}, and its recorded releases come to "
            f"{account.epsilon:.6g}"
            + (
                ": it has charged answers that never arrived; its ledger (--verify) says which."
                if account.reported > account.epsilon
                else ": its ledger lacks some of them, or the history was changed."
            )
        )
        for account in accounts
        if not agree(account.reported, account.epsilon)
    }


def _differences(accounts: Sequence[Account]) -> list[str]:
    return list(differences(accounts).values())


def overspent(accounts: Iterable[Account]) -> list[str]:
    """Name the accounts that spent more than the run's budget."""
    return [
        f"{_name(account)}: epsilon {account.epsilon:.6g} is above the run's {account.budget:g}."
        for account in accounts
        if math.isfinite(account.epsilon) and account.epsilon > account.budget * (1 + TOLERANCE)
    ]


def _uncharged(recorded: Recorded) -> list[str]:
    charged = {(number, spend.site, spend.part) for number, spend in recorded.spends}
    return [
        f"site {part.site} answered in round {number} ({part.kind}), and no spend is recorded for it."
        for number, part in recorded.participations
        if part.outcome == "ok" and part.kind in PARTS and (number, part.site, PARTS[part.kind]) not in charged
    ]


def _used_twice(recorded: Recorded) -> list[str]:
    """Find numbers of a ledger that two releases have: it went back, and what was spent between is forgotten there."""
    held: dict[tuple[str, int], list[tuple[int, Spend]]] = defaultdict(list)
    for number, spend in recorded.spends:
        if spend.ledger_number:
            held[spend.ledger_id, spend.ledger_number].append((number, spend))
    return [
        f"site {spends[0][1].site}: its ledger has given the number {event} to {len(spends)} releases (rounds "
        f"{ranges(number for number, _ in spends)}): it was put back from an older copy."
        for (_, event), spends in held.items()
        if len(spends) > 1
    ]


def _unseen(recorded: Recorded) -> list[str]:
    """Note answers that a lost attempt has seen and no round has committed: their sites have charged them."""
    newest: dict[str, Spend] = {}
    for _, spend in recorded.spends:
        held = newest.get(spend.ledger_id)
        if spend.ledger_number and (held is None or spend.ledger_number > held.ledger_number):
            newest[spend.ledger_id] = spend
    lines = []
    for spend in newest.values():
        seen = recorded.ledgers.get(spend.ledger_id)
        if seen is not None and seen.run == recorded.run.id and seen.number > spend.ledger_number:
            lines.append(
                f"site {spend.site}: its ledger was seen at event {seen.number}, and the last committed release is its event "
                f"{spend.ledger_number}. What it may have answered to a round that was not committed is not in these "
                "numbers; its ledger (--verify) has it."
            )
    if recorded.run.status != "completed":
        lines.append("A round under way may have been charged at the sites, and is not in these numbers.")
    return lines
