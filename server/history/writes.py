"""What changes a history, each inside one transaction that `store` opened.

Who owns a run: its newest attempt, until that ends. A process that resumes a run starts a newer attempt,
and from then on everything the older process tries to commit is refused. Every writer takes the run's
lock first (the row on PostgreSQL, the whole file on SQLite), so that the check and the write are one.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, insert, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from server.history.models import (
    AttemptRow,
    CheckpointRow,
    EventRow,
    LedgerRow,
    MetricRow,
    ParticipationRow,
    ProgressRow,
    RoundRow,
    RunRow,
    SpendRow,
)
from server.history.records import Attempt, AttemptOutcome, Ledger, Round, RunStatus
from shared.errors import ConfigError, NotFoundError, RunFailedError


def create_run(session: Session, run_id: str, values: dict[str, Any]) -> None:
    """Enter a new run, pending."""
    session.add(RunRow(id=run_id, status="pending", created_at=datetime.now(UTC), **values))
    try:
        session.flush()
    except IntegrityError as error:
        raise ConfigError(f"The run id '{run_id}' is taken; resume that run or choose another id.") from error


def start_attempt(session: Session, run_id: str, engine: str) -> Attempt:
    """Open the next attempt, close what came before it, and set the run to running."""
    run = lock(session, run_id)
    if run.status == "completed":
        raise ConfigError(f"Run '{run_id}' is already completed; start a new run to train further.")
    if run.stop_requested_at is not None:
        raise ConfigError(f"Run '{run_id}' was asked to stop; submit it again to train further.")
    now = datetime.now(UTC)
    unended = select(AttemptRow).where(AttemptRow.run_id == run_id, AttemptRow.ended_at.is_(None))
    for row in session.scalars(unended):
        row.ended_at, row.outcome = now, "lost"
        _tell(session, run_id, "warning", "lost", f"Attempt {row.number} was lost: it ended without a word.")
    newest = _newest(session, run_id)
    number = newest.number + 1 if newest else 1
    run.status, run.finished_at = "running", None
    session.add(AttemptRow(run_id=run_id, number=number, engine=engine, started_at=now))
    session.flush()
    _tell(session, run_id, "info", "started", f"Attempt {number} started ({engine}).")
    return Attempt(run_id, number, engine, started_at=now, ended_at=None, outcome=None, error=None)


def end_attempt(session: Session, run_id: str, number: int, outcome: AttemptOutcome, error: str | None) -> None:
    """Close an attempt; one that is closed keeps its first outcome."""
    lock(session, run_id)
    row = session.get(AttemptRow, (run_id, number))
    if row is None:
        raise NotFoundError(f"Run '{run_id}' has no attempt {number}.")
    if row.ended_at is not None:
        return
    row.ended_at, row.outcome, row.error = datetime.now(UTC), outcome, error
    level = {"failed": "error", "lost": "warning"}.get(outcome, "info")
    _tell(session, run_id, level, outcome, f"Attempt {number} {outcome}" + (f": {error}" if error else "."))


def finish_run(session: Session, run_id: str, status: RunStatus, attempt: int | None) -> None:
    """Set a run's last status, unless the attempt that asks no longer owns the run."""
    if status not in {"completed", "failed", "stopped"}:
        raise ConfigError(f"status='{status}' does not finish a run; use completed, failed or stopped.")
    run = lock(session, run_id)
    newest = _newest(session, run_id)
    if attempt is not None and newest is not None and newest.number != attempt:
        raise RunFailedError(f"Attempt {attempt} of run '{run_id}' was superseded by attempt {newest.number}.")
    run.status, run.finished_at = status, datetime.now(UTC)


def commit_round(session: Session, round: Round) -> None:
    """Write a round and all its parts."""
    _own(session, round)
    done = session.scalar(select(func.max(RoundRow.number)).where(RoundRow.run_id == round.run)) or 0
    if round.number != done + 1:
        raise RunFailedError(
            f"Round {round.number} of run '{round.run}' cannot be committed: round {done + 1} is the next."
        )
    values = {"number": round.number, "attempt": round.attempt, "phase": round.phase}
    values |= {"run_id": round.run, "started_at": round.started_at, "seconds": round.seconds}
    values["simulated_seconds"] = round.simulated_seconds
    key = session.scalars(insert(RoundRow).values(values).returning(RoundRow.id)).one()
    session.execute(insert(CheckpointRow), [{"round_id": key, **vars(round.checkpoint)}])
    tables: dict[Any, Any] = {
        ParticipationRow: round.participations,
        MetricRow: round.metrics,
        SpendRow: round.spends,
    }
    for table, parts in tables.items():
        rows = [{"round_id": key, "position": i, **vars(part)} for i, part in enumerate(parts)]
        if rows:
            # The table, not the class: the class would leave None out and so miss `SiteOrAll`.
            session.execute(insert(table.__table__), rows)


def saw_ledgers(session: Session, ledgers: Sequence[Ledger]) -> None:
    """Remember how far ledgers are, and by whom they were seen so last; what was seen further on stays, whoever writes."""
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    rows = [
        {name: value for name, value in (vars(each) | {"run_id": each.run}).items() if name != "run"}
        for each in ledgers
    ]
    if rows:
        table: Any = LedgerRow.__table__
        new = dialect.insert(table)
        now = {name: new.excluded[name] for name in ("site", "dataset", "number", "run_id")}
        further = new.excluded.number >= table.c.number
        session.execute(new.on_conflict_do_update(index_elements=[table.c.id], set_=now, where=further), rows)


def add_event(session: Session, run_id: str, level: str, text: str) -> None:
    """Note an event, now."""
    session.add(EventRow(run_id=run_id, at=datetime.now(UTC), level=level, text=text))


def add_progress(
    session: Session, run_id: str, round: int, kind: str, sites: Sequence[str] | None, state: str, text: str | None
) -> None:
    """Tell the watchers of a run, of each of these sites or of no single one.

    The run's lock makes the ids grow in the order of the commits: PostgreSQL hands them out before, and a
    watcher that has seen the larger of two would never ask for the smaller.
    """
    lock(session, run_id)
    values = {"run_id": run_id, "at": datetime.now(UTC), "round": round, "kind": kind, "state": state, "text": text}
    rows = [values | {"site": site} for site in ([None] if sites is None else sites)]
    if rows:
        table: Any = ProgressRow.__table__  # and not the class, for the sake of `SiteOrAll`
        session.execute(insert(table), rows)


def lock(session: Session, run_id: str) -> RunRow:
    """Take the run's lock until the transaction ends, or raise NotFoundError."""
    run = session.scalar(select(RunRow).where(RunRow.id == run_id).with_for_update())
    if run is None:
        raise NotFoundError(f"There is no run '{run_id}' here; `moonflower history runs` lists them.")
    return run


def _newest(session: Session, run_id: str) -> AttemptRow | None:
    query = select(AttemptRow).where(AttemptRow.run_id == run_id).order_by(AttemptRow.number.desc()).limit(1)
    return session.scalar(query)


def _own(session: Session, round: Round) -> None:
    run = lock(session, round.run)
    newest = _newest(session, round.run)
    who = f"Attempt {round.attempt} of run '{round.run}'"
    lost = f"its round {round.number} was not committed"
    if newest is None or newest.number < round.attempt:
        raise RunFailedError(f"{who} was never started; {lost}.")
    if newest.number > round.attempt:
        raise RunFailedError(f"{who} was superseded by attempt {newest.number}; {lost}.")
    if newest.ended_at is not None or run.status != "running":
        raise RunFailedError(f"{who} has ended ({newest.outcome or run.status}); {lost}.")


def _tell(session: Session, run_id: str, level: str, state: str, text: str) -> None:
    """Note what became of an attempt, for the record and for whoever watches."""
    add_event(session, run_id, level, text)
    add_progress(session, run_id, 0, "run", None, state, text)
