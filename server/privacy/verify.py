"""A run's statement held against the sites' exported ledgers: the same releases, in an unbroken chain.

An export is what `moonflower ledger export` writes at a site. Its chain is verified by digests, every release
in the history must be in it as the history has it, and epsilon is composed again from all that the ledger holds of
the run. The ledger may hold more, where a charged answer was lost on its way: that is counted. It must not hold
less.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from server import mechanisms
from server.history.records import Kind, Part, Spend
from server.privacy.export import Event, Export, lifetime, release
from server.privacy.records import (
    KINDS,
    PARTS,
    Account,
    Place,
    Recorded,
    Statement,
    Sums,
    Verification,
    ranges,
    unit_of,
)
from server.privacy.statement import agree, by_place, differences, noiseless, overspent, planned
from shared.errors import DataError

Key = tuple[int, Kind]  # round, kind


def verify(statement: Statement, recorded: Recorded, exports: Sequence[Export]) -> Statement:
    """Return the statement with each export's verdict; accounts whose ledger was given are composed from it too.

    Raises
    ------
    DataError
        Where an export has nothing of the run, or two are of one account.
    """
    names = [export.account for export in exports]
    if len(set(names)) != len(names):
        raise DataError("--verify: two of the ledgers are of one account; give each site's once.")
    accounts = {(each.site, each.dataset, each.part): each for each in statement.accounts}
    unexplained = differences(statement.accounts)
    explained: set[str] = set()
    verdicts = []
    for export in exports:
        found = _Comparison(export, recorded)
        composed = {place: found.compose(accounts.get(place) or found.opened(place)) for place in found.places}
        verdict = found.verdict()
        verdicts.append(verdict)
        for place, account in composed.items():
            accounts[place] = replace(account, verified=not verdict.faults)
            if not verdict.faults and place in unexplained:  # the ledger has the answers that the history lacks
                explained.add(unexplained[place])
    made = tuple(account for _, account in sorted(accounts.items()))
    without = [f"{each.site} ({each.part})" for each in made if each.verified is None]
    doubts = [doubt for doubt in statement.doubts if doubt not in explained]
    if statement.private:
        doubts += [doubt for doubt in (*noiseless(made), *overspent(made)) if doubt not in doubts]
    counted = _counted(recorded, [verdict for verdict in verdicts if not verdict.faults])
    return replace(
        statement,
        accounts=made,
        doubts=tuple(doubts),
        uncounted=tuple(each for each in statement.uncounted if each.site not in counted),
        notes=(*statement.notes, *([f"No ledger was given for {', '.join(without)}."] if without else ())),
        verifications=tuple(verdicts),
    )


def _counted(recorded: Recorded, sound: Sequence[Verification]) -> set[str]:
    """Name the sites all of whose accounts in the run have a ledger that agrees: whatever they charged is counted."""
    given = {each.account for each in sound}
    kept = [(spend.site, spend.ledger_id) for _, spend in recorded.spends if spend.ledger_id]
    kept += [(seen.site, seen.id) for seen in recorded.ledgers.values() if seen.run == recorded.run.id]
    lacking = {site for site, account in kept if account not in given}
    return {site for each in sound for site in each.sites} - lacking


class _Comparison:
    """One export beside what the history has of the same account."""

    def __init__(self, export: Export, recorded: Recorded) -> None:
        self.export, self.recorded = export, recorded
        self.faults = [] if export.fault is None else [export.fault]
        self.notes: list[str] = []
        self.spends = [(number, spend) for number, spend in recorded.spends if self._is_of(spend)]
        self.events: dict[Key, Event] = {}
        for event in export.events:
            key = (event["round"], event["kind"])
            if event["run"] != recorded.run.id:
                continue
            if self.events.setdefault(key, event) is not event:
                self.faults.append(f"dataset {export.dataset!r}: round {key[0]} ({key[1]}) was charged twice.")
            if PARTS.get(event["kind"]) != event["part"]:
                self.faults.append(
                    f"dataset {export.dataset!r}: round {key[0]} ({key[1]}) is charged to {event['part']!r}."
                )
        seen = recorded.ledgers.get(export.account)
        self.sites = sorted({spend.site for _, spend in self.spends} or ({seen.site} if seen else set()))
        self.places = self._places()
        self._check_account()
        self._check_newest()
        self._check_spends()
        self._check_rest()

    def verdict(self) -> Verification:
        export = self.export
        return Verification(
            source=export.source,
            dataset=export.dataset,
            account=export.account,
            sites=tuple(self.sites),
            events=len(export.events),
            of_this_run=len(self.events),
            lifetime_epsilon=lifetime(export),
            order=export.order,
            delta=export.delta,
            faults=tuple(self.faults),
            notes=tuple(self.notes),
        )

    def compose(self, account: Account) -> Account:
        """Compose an account of all that the ledger holds of it in this run, and check what the site reported on the way."""
        held = self._held(account.part)
        if account.reported is not None:
            last = account.events[1] if account.events else math.inf
            reported = _epsilon([event for event in held if event["number"] <= last], account.delta)
            if not agree(reported, account.reported):
                self.faults.append(
                    f"site {account.site}, {account.part} records: the site reported epsilon {account.reported:.6g}, and its "
                    f"ledger comes to {reported:.6g} up to that release."
                )
        return replace(account, epsilon=max(account.epsilon, _epsilon(held, account.delta)))

    def opened(self, place: Place) -> Account:
        """Give the account of a part of which the history has no release, from the ledger's events."""
        run, held = self.recorded.run, self._held(place[2])
        budget, delta = planned(run, "epsilon"), planned(run, "delta")
        alike: dict[tuple[str, float, float], list[Event]] = {}
        for event in held:
            alike.setdefault((event["mechanism"], event["sampling_rate"], event["noise_multiplier"]), []).append(event)
        return Account(
            *place,
            epsilon=0.0,
            reported=None,
            delta=self.export.delta if delta is None else delta,
            budget=math.inf if budget is None else budget,
            releases=tuple(
                Sums(
                    mechanism,
                    noise_source="",
                    gradients="",
                    sampling_rate=rate,
                    noise_multiplier=noise,
                    steps=sum(event["steps"] for event in events),
                    rounds=ranges(event["round"] for event in events),
                )
                for (mechanism, rate, noise), events in alike.items()
            ),
            ledger_id=self.export.account,
            events=(held[0]["number"], held[-1]["number"]),
        )

    def _held(self, part: Part) -> list[Event]:
        return sorted((each for each in self.events.values() if each["part"] == part), key=lambda each: each["number"])

    def _places(self) -> list[Place]:
        """Name the accounts that either side has a release of: the ledger may have the only one."""
        places = list(by_place(self.spends))
        for site in self.sites[-1:]:
            known = {part for _, _, part in places}
            places += [(site, self.export.dataset, part) for part in KINDS if part not in known and self._held(part)]
        return places

    def _is_of(self, spend: Spend) -> bool:
        if not spend.ledger_id:  # recorded before accounts were
            return spend.dataset == self.export.dataset
        return spend.ledger_id == self.export.account

    def _check_account(self) -> None:
        """Raise where the ledger is of another run altogether; note one that took the place of the run's own."""
        same = {spend.ledger_id[:8] for _, spend in self.recorded.spends if spend.dataset == self.export.dataset}
        others = same - {"", self.export.account[:8]}
        what = f"the ledger of dataset {self.export.dataset!r}, account {self.export.account[:8]},"
        if not self.spends and not self.events and not others:
            raise DataError(f"--verify {self.export.source}: {what} has nothing of run {self.recorded.run.id!r}.")
        if self.export.unit != (unit := unit_of(self.recorded.run)):
            self.faults.append(f"{what} is kept for {self.export.unit}s, and the run's promise is to {unit}s.")
        if others:
            self.faults.append(f"{what} is not the one that the run's releases are in: {', '.join(sorted(others))}.")
        elif not self.sites:
            rounds = ranges(number for number, _ in self.events)
            self.faults.append(f"{what} holds releases of this run (rounds {rounds}), and the history has none of it.")

    def _check_newest(self) -> None:
        seen = self.recorded.ledgers.get(self.export.account)
        if seen is not None and seen.number > len(self.export.events):
            self.faults.append(
                f"the ledger ends at event {len(self.export.events)}, and the coordinator has seen event {seen.number}: it is "
                "an older copy, or was put back from one."
            )

    def _check_spends(self) -> None:
        lacking: dict[tuple[str, Kind], list[int]] = {}
        for number, spend in self.spends:
            event = self.events.get((number, KINDS[spend.part]))
            if event is None:
                lacking.setdefault((spend.site, KINDS[spend.part]), []).append(number)
                continue
            for name, recorded, held in _pairs(spend, event):
                if recorded != held:
                    self.faults.append(
                        f"site {spend.site}, round {number} ({KINDS[spend.part]}): the history has {name} {recorded}, the ledger {held}."
                    )
        for (site, kind), rounds in lacking.items():
            self.faults.append(
                f"site {site}: {kind} of rounds {ranges(rounds)} is in the history and not in the ledger, which ends at "
                f"event {len(self.export.events)}."
            )

    def _check_rest(self) -> None:
        """Look at what only the ledger has: a lost answer was charged and is counted, anything else is a fault."""
        recorded = {(number, KINDS[spend.part]) for number, spend in self.spends}
        for number, kind in sorted(self.events.keys() - recorded):
            said = f"round {number} ({kind}) is in the ledger of {', '.join(self.sites) or self.export.dataset}"
            if self._may_be_lost(number, kind):
                self.notes.append(f"{said} and not in the history: its answer was lost. It is counted.")
            else:
                self.faults.append(f"{said}, and the history knows of no such request.")

    def _may_be_lost(self, number: int, kind: Kind) -> bool:
        """Whether a request was made whose answer no round has: it failed, timed out, or its attempt was lost."""
        attempt = next((each.attempt for each in self.recorded.rounds if each.number == number), None)
        if attempt is None or attempt > 1:  # never committed, or by a later attempt than the first
            return kind in PARTS
        return any(
            (at, part.kind) == (number, kind) and part.site in self.sites and part.outcome != "ok"
            for at, part in self.recorded.participations
        )


def _pairs(spend: Spend, event: Event) -> list[tuple[str, object, object]]:
    names = ["part", "sampling_rate", "noise_multiplier", "steps"]
    if spend.mechanism != "none":  # the ledger names the mechanism that had no noise
        names.append("mechanism")
    pairs = [(name, getattr(spend, name), event[name]) for name in names]
    if spend.ledger_number:
        pairs += [("event", spend.ledger_number, event["number"]), ("digest", spend.ledger_head, event["previous"])]
    return pairs


def _epsilon(events: Sequence[Event], delta: float) -> float:
    return mechanisms.epsilon(map(release, events), delta)
