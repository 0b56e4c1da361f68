"""What is asked of a history: rows in, frozen values out, each inside a session that `store` opened."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session, load_only

from server.history.models import (
    AttemptRow,
    CheckpointRow,
    EventRow,
    LedgerRow,
    MetricRow,
    ParticipationRow,
    RoundRow,
    RunRow,
    SpendRow,
    TrialRow,
)
from server.history.records import Attempt, Checkpoint, Event, Ledger, Metric, Participation, Round, Run, Spend, Trial
from shared.errors import NotFoundError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    PartT = TypeVar("PartT", bound=DataclassInstance)

PartRow = type[ParticipationRow] | type[MetricRow] | type[SpendRow]
SHOWN = 5  # ids that an ambiguous prefix is answered with


def resolve(session: Session, run_id: str) -> str:
    """Give the id of the one run that has this id or begins with it, or raise NotFoundError."""
    nothing = not run_id or "\0" in run_id  # which PostgreSQL will not even look for
    if not nothing and session.get(RunRow, run_id, options=[load_only(RunRow.id)]) is not None:
        return run_id
    starts = RunRow.id.startswith(run_id, autoescape=True)  # SQLite's LIKE takes A for a, so look again
    ids = [] if nothing else list(session.scalars(select(RunRow.id).where(starts)))
    ids = [found for found in ids if found.startswith(run_id)]
    if not ids:
        raise NotFoundError(f"There is no run '{run_id}' here; `moonflower history runs` lists them.")
    if len(ids) > 1:
        shown = ", ".join(sorted(ids)[:SHOWN]) + (" ..." if len(ids) > SHOWN else "")
        raise NotFoundError(f"Several runs begin with '{run_id}' ({shown}); give more of the id.")
    return ids[0]


def runs(session: Session, run_id: str | None, limit: int | None, *where: ColumnElement[bool]) -> list[Run]:
    """Read the runs, newest first, or only the one with this id, or those that meet conditions."""
    done = select(func.max(RoundRow.number)).where(RoundRow.run_id == RunRow.id).scalar_subquery()
    query = select(RunRow, func.coalesce(done, 0), TrialRow).outerjoin(TrialRow, TrialRow.run_id == RunRow.id)
    query = query.order_by(RunRow.created_at.desc(), RunRow.id.desc())
    if run_id is not None:
        query = query.where(RunRow.id == run_id)
    query = query.where(*where)
    return [
        Run(
            id=row.id,
            name=row.name,
            status=row.status,  # written from the same literal
            config=row.config,
            config_digest=row.config_digest,
            rounds_planned=row.rounds_planned,
            rounds_done=count,
            private=row.private,
            created_at=row.created_at,
            finished_at=row.finished_at,
            version=row.version,
            origin=row.origin,
            submitted_by=row.submitted_by,
            stop_requested_at=row.stop_requested_at,
            trial=None if trial is None else Trial(trial.sweep_id, trial.cell, trial.seed),
        )
        for row, count, trial in session.execute(query.limit(limit))
    ]


def attempts(session: Session, run_id: str) -> list[Attempt]:
    """Read a run's attempts, first to last."""
    query = select(*columns(AttemptRow, Attempt)).where(AttemptRow.run_id == run_id)
    return [Attempt(*row) for row in session.execute(query.order_by(AttemptRow.number))]


def events(session: Session, run_id: str, limit: int | None) -> list[Event]:
    """Read a run's events as they happened; with a limit, the newest ones."""
    query = select(*columns(EventRow, Event)).where(EventRow.run_id == run_id)
    return [Event(*row) for row in _newest(session, query, [EventRow.id], limit)]


def rounds(session: Session, run_id: str, number: int | None, limit: int | None) -> list[Round]:
    """Read a run's rounds without their parts; with a limit, the newest ones."""
    query = select(
        *(RoundRow.run_id, RoundRow.number, RoundRow.attempt, RoundRow.phase),
        *(RoundRow.started_at, RoundRow.seconds, CheckpointRow.digest, CheckpointRow.bytes, RoundRow.simulated_seconds),
    )
    query = query.join(CheckpointRow, CheckpointRow.round_id == RoundRow.id).where(RoundRow.run_id == run_id)
    if number is not None:
        query = query.where(RoundRow.number == number)
    rows = _newest(session, query, [RoundRow.number], limit)
    return [
        Round(run, number, attempt, phase, started_at, seconds, Checkpoint(digest, size), simulated_seconds=simulated)
        for run, number, attempt, phase, started_at, seconds, digest, size, simulated in rows
    ]


def traffic(session: Session, run_id: str) -> dict[int, tuple[int, int]]:
    """Sum each round's bytes over its sites: from them, and to them."""
    sums = func.sum(ParticipationRow.bytes_up), func.sum(ParticipationRow.bytes_down)
    query = select(RoundRow.number, *sums).join(ParticipationRow, ParticipationRow.round_id == RoundRow.id)
    query = query.where(RoundRow.run_id == run_id).group_by(RoundRow.number)
    return {number: (int(up), int(down)) for number, up, down in session.execute(query)}  # PostgreSQL's are decimals


@dataclass(frozen=True)
class Where:
    """Which parts of a run's rounds are asked for; None leaves a filter or the limit out."""

    run_id: str
    site: str | None = None
    round_number: int | None = None
    limit: int | None = None


def parts(session: Session, table: PartRow, record: "type[PartT]", where: Where) -> "list[tuple[int, PartT]]":
    """Read one kind of a round's parts over a run, in order, each with its round's number."""
    query = select(RoundRow.number, *columns(table, record))
    query = query.join(table, table.round_id == RoundRow.id).where(RoundRow.run_id == where.run_id)
    if where.site is not None:
        query = query.where(table.site == where.site)
    if where.round_number is not None:
        query = query.where(RoundRow.number == where.round_number)
    rows = _newest(session, query, [RoundRow.number, table.position], where.limit)
    return [(row[0], record(*row[1:])) for row in rows]


def ledgers(session: Session, ids: Collection[str] | None) -> list[Ledger]:
    """Read how far ledgers were when they were last seen: these, or all."""
    query = select(*columns(LedgerRow, Ledger)).order_by(LedgerRow.id)
    if ids is not None:
        query = query.where(LedgerRow.id.in_(ids))
    return [Ledger(*row) for row in session.execute(query)]


def charged(session: Session, ledger_id: str, number: int) -> tuple[str, int, str] | None:
    """Find the committed spend that has this number in the ledger: its run, round and part."""
    query = select(RoundRow.run_id, RoundRow.number, SpendRow.part).join(SpendRow, SpendRow.round_id == RoundRow.id)
    row = session.execute(query.where(SpendRow.ledger_id == ledger_id, SpendRow.ledger_number == number)).first()
    return None if row is None else (row[0], row[1], row[2])


def last_round(session: Session, run_id: str) -> Round | None:
    """Read the last committed round with all its parts."""
    last = rounds(session, run_id, None, 1)
    if not last:
        return None
    where = Where(run_id, round_number=last[0].number)
    participations = parts(session, ParticipationRow, Participation, where)
    metrics = parts(session, MetricRow, Metric, where)
    spends = parts(session, SpendRow, Spend, where)
    return replace(
        last[0],
        participations=tuple(value for _, value in participations),
        metrics=tuple(value for _, value in metrics),
        spends=tuple(value for _, value in spends),
    )


def columns(table: Any, record: "type[DataclassInstance]") -> list[Any]:
    """Name the columns of a row that make a record, in its order."""
    names = (f.name for f in fields(record))
    return [table.run_id if name == "run" else getattr(table, name) for name in names]


def _newest(session: Session, query: Any, order: Sequence[Any], limit: int | None) -> list[Any]:
    if limit is None:
        return list(session.execute(query.order_by(*order)))
    return list(session.execute(query.order_by(*(key.desc() for key in order)).limit(limit)))[::-1]
