"""What a run guarantees to each record, or person, derived from the releases that the history has recorded.

The unit is one record of a site's dataset, or one person with all their records, as the run's `privacy.unit` says: a site of
another unit does not join. Neighbours differ by one unit. An account is one part (train or validation) of one site's dataset: its epsilon is composed here from its recorded releases, and only compared with
what the site reported. A unit is in one part for ever, and sites are taken to share none, so accounts
compose in parallel: the run's epsilon is the largest account's, never a sum.

The history alone is read: no run's folder, no model, no training code.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TypeVar

from server import mechanisms
from server.history.records import Participation, Run, Spend
from server.history.store import History
from server.privacy import uncounted
from server.privacy.records import PARTS, Account, Place, Recorded, Statement, Sums, ranges
from shared.errors import MoonflowerError

Part = TypeVar("Part", Participation, Spend)
TOLERANCE = 1e-6  # relative, between a site's epsilon and the one composed here from the same releases


class StudyError(MoonflowerError):
    """The run is one of a study, which has no statement."""

    exit_code = 2


def check_no_study(history: History, run: Run) -> None:
    """Refuse a run of a sweep: whoever picks the best of several runs on the same data has used them all.

    Raises
    ------
    StudyError
        Naming the sweep.
    """
    if run.trial is not None:
        raise StudyError(
            f"Run {run.id} is a study, one of the {len(history.trials(run.trial.sweep))} of sweep {run.trial.sweep}, and has no "
            "privacy statement: choosing the best of several runs on the same data is not covered by the epsilon of one. What "
            f"each spent: `moonflower history spends {run.id}`."
        )


def read(history: History, run: Run) -> Recorded:
    """Read all that a statement rests on, as of the run's last committed round."""
    rounds = history.rounds(run.id)
    last = rounds[-1].number if rounds else 0  # a round committed while we read is left out whole
    return Recorded(
        run=history.run(run.id),
        attempts=history.attempts(run.id),
        rounds=rounds,
        participations=[_by_question(*pair) for pair in history.participations(run.id) if pair[0] <= last],
        spends=[_by_question(*pair) for pair in history.spends(run.id) if pair[0] <= last],
        ledgers=history.ledgers(),
    )


def _by_question(number: int, part: Part) -> tuple[int, Part]:
    """Give what counts in a round with the number of the round that it was asked in, which is the ledger's."""
    return part.asked or number, part


def make(recorded: Recorded, *, now: datetime) -> Statement:
    """State what the history shows; `server.privacy.verify` adds what the sites' ledgers say."""
    run = recorded.run
    private = run.private and planned(run, "epsilon") != math.inf
    accounts = tuple(_account(place, spends) for place, spends in sorted(by_place(recorded.spends).items()))
    doubts = [*noiseless(accounts), *_differences(accounts), *overspent(accounts), *_uncharged(recorded)]
    return Statement(
        run=run,
        private=private,
        so_far=run.status != "completed",
        rounds=len(recorded.rounds),
        accounts=accounts,
        doubts=tuple([*doubts, *_used_twice(recorded)] if private else ()),
        uncounted=tuple(uncounted.find(recorded) if private else ()),
        notes=(),
        simulated=any(attempt.engine == "in-process" for attempt in recorded.attempts),
        made_at=now,
    )


def by_place(spends: Iterable[tuple[int, Spend]]) -> dict[Place, list[tuple[int, Spend]]]:
    """Sort spends into accounts, each in the order of its rounds."""
    found: dict[Place, list[tuple[int, Spend]]] = defaultdict(list)
    for number, spend in sorted(spends, key=lambda pair: pair[0]):
        found[spend.site, spend.dataset, spend.part].append((number, spend))
    return dict(found)


def agree(one: float, other: float) -> bool:
    """Whether two epsilons of the same releases are the same but for rounding."""
    return one == other or math.isclose(one, other, rel_tol=TOLERANCE)


def planned(run: Run, name: str) -> float | None:
    """Read a number of the run's [privacy]; None where its configuration has none."""
    section = run.config.get("privacy")
    try:
        return float(section[name]) if isinstance(section, dict) else None
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
        epsilon=mechanisms.epsilon(
            ((each.mechanism, each.sampling_rate, each.noise_multiplier, each.steps) for _, each in spends), delta
        ),
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


def noiseless(accounts: Iterable[Account]) -> list[str]:
    """Name the accounts that nothing bounds."""
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
        if account.reported is not None and not agree(account.reported, account.epsilon)
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
