"""A history that outlives its database: a call that the database does not answer is made again, for some minutes.

Each call here may be made twice. A round whose commit was cut off is looked for before it is committed again.
"""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TypeVar

from server.history.records import (
    Attempt,
    AttemptOutcome,
    EventLevel,
    Ledger,
    Round,
    Run,
    RunStatus,
    SiteKey,
)
from server.history.store import History
from shared.errors import DatabaseAwayError

log = logging.getLogger("moonflower.run")
T = TypeVar("T")

PATIENCE = 600.0  # seconds without the database, or without room on the disk, before an attempt is given up
FIRST, MOST = 0.5, 10.0  # seconds between tries: the first, doubled up to the most


def insist(call: Callable[[], T], *kinds: type[Exception], patience: float = PATIENCE) -> T:
    """Return what the call returns, making it again while it raises one of `kinds`, for at most `patience` seconds."""
    until, delay, away = time.monotonic() + patience, FIRST, False
    while True:
        try:
            answer = call()
        except kinds as error:
            if time.monotonic() + delay > until:
                raise
            if not away:
                log.warning("%s Trying again for %g s.", error, patience)
            away = True
            time.sleep(delay)
            delay = min(2 * delay, MOST)
        else:
            if away:
                log.info("it works again")
            return answer


class PatientHistory(History):
    """The calls that a run makes, each patient; all others are as they were."""

    def start_attempt(self, run_id: str, *, engine: str) -> Attempt:
        """Take the run over; an attempt whose start was cut off is a lost one."""
        return _patient(partial(super().start_attempt, run_id, engine=engine))

    def end_attempt(self, run_id: str, number: int, outcome: AttemptOutcome, error: str | None = None) -> None:
        """Close an attempt."""
        _patient(partial(super().end_attempt, run_id, number, outcome, error))

    def finish_run(self, run_id: str, status: RunStatus, *, attempt: int | None = None) -> None:
        """Set the run to completed, failed or stopped."""
        _patient(partial(super().finish_run, run_id, status, attempt=attempt))

    def commit_round(self, round: Round) -> None:
        """Write a round, unless a commit that was cut off has written it."""
        commit, last_round, tried = super().commit_round, super().last_round, False

        def once() -> None:
            nonlocal tried
            last = last_round(round.run) if tried else None
            tried = True
            mine = round.number, round.attempt, round.checkpoint
            if last is None or (last.number, last.attempt, last.checkpoint) != mine:
                commit(round)

        _patient(once)

    def add_event(self, run_id: str, level: EventLevel, text: str) -> None:
        """Note something; it may be noted twice."""
        _patient(partial(super().add_event, run_id, level, text))

    def run(self, run_id: str) -> Run:
        """Give one run."""
        return _patient(partial(super().run, run_id))

    def last_round(self, run_id: str) -> Round | None:
        """Give the last committed round."""
        return _patient(partial(super().last_round, run_id))

    def rounds(self, run_id: str, *, round_number: int | None = None, limit: int | None = None) -> list[Round]:
        """Give a run's rounds."""
        return _patient(partial(super().rounds, run_id, round_number=round_number, limit=limit))

    def saw_ledgers(self, ledgers: Sequence[Ledger]) -> None:
        """Remember how far sites' ledgers are."""
        _patient(partial(super().saw_ledgers, ledgers))

    def ledgers(self, ids: Collection[str] | None = None) -> dict[str, Ledger]:
        """Give the newest that was seen of ledgers."""
        return _patient(partial(super().ledgers, ids))

    def charged(self, ledger_id: str, number: int) -> tuple[str, int, str] | None:
        """Give the committed spend that has this number in a ledger."""
        return _patient(partial(super().charged, ledger_id, number))

    def site_keys(self) -> list[SiteKey]:
        """Give all keys that were ever enrolled."""
        return _patient(super().site_keys)


def _patient(call: Callable[[], T]) -> T:
    return insist(call, DatabaseAwayError)
