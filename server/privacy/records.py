"""The frozen values of a statement: what it is made from, and what it says."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from server.history.records import Attempt, Kind, Ledger, Part, Participation, Round, Run, Spend
from shared.run_config import PrivacyUnit

PARTS: dict[Kind, Part] = {"train": "train", "evaluate": "validation"}  # which part a request is charged to
KINDS: dict[Part, Kind] = {"train": "train", "validation": "evaluate"}

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
        What the site said after its last release, from its own ledger; None where only the ledger has releases.
    releases
        As the history has them; as the ledger has them where the history has none.
    events
        First and last number of these in the site's ledger; None where they were not recorded.
    verified
        Whether the ledger confirms the history; None where no ledger was given.
    """

    site: str
    dataset: str
    part: Part
    epsilon: float
    reported: float | None
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
class Uncounted:
    """What a site may have charged and the history does not have; `site` is empty where it may be any."""

    site: str
    text: str


@dataclass(frozen=True)
class Statement:
    """A run's statement: the claim, what it rests on, and what stands against it.

    `doubts` contradict the claim, so that it is not made. What is `uncounted` contradicts nothing and may have been
    spent: the claim is then of the recorded releases only. `notes` are what a reader should know besides.
    """

    run: Run
    private: bool
    so_far: bool
    rounds: int
    accounts: tuple[Account, ...]
    doubts: tuple[str, ...]
    uncounted: tuple[Uncounted, ...]
    notes: tuple[str, ...]
    simulated: bool
    made_at: datetime
    verifications: tuple[Verification, ...] = field(default=())

    @property
    def study(self) -> str | None:
        """The sweep that the run is one of; no epsilon is claimed for it."""
        return self.run.trial.sweep if self.run.trial else None

    @property
    def unit(self) -> PrivacyUnit:
        """Who the promise is made to, at every site: a site of another unit does not join."""
        return unit_of(self.run)

    @property
    def records_per_person(self) -> int | None:
        """The most records of one person that a training step took; None where the unit is the record."""
        held = _privacy(self.run, "records_per_person")
        return held if self.unit == "person" and isinstance(held, int) else None

    @property
    def largest(self) -> Account | None:
        """The account with the largest epsilon, which bounds the run's where sites share no record."""
        return max(self.accounts, key=lambda account: account.epsilon, default=None)

    @property
    def delta(self) -> float | None:
        """The largest delta of any account."""
        return max((account.delta for account in self.accounts), default=None)


def unit_of(run: Run) -> PrivacyUnit:
    """Who a run's promise is made to."""
    return "person" if _privacy(run, "unit") == "person" else "record"


def _privacy(run: Run, name: str) -> Any:
    section = run.config.get("privacy")
    return section.get(name) if isinstance(section, dict) else None


def ranges(numbers: Iterable[int]) -> str:
    """Write round numbers shortly: 1-4, 7."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
