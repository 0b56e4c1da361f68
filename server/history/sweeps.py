"""Studies: the same scenario under many settings and seeds, a run each.

Reads and writes, each inside a transaction that `store` opened.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from server.history import reads
from server.history.models import SweepRow, TrialRow
from server.history.records import Run, Sweep, Trial
from shared.errors import ConfigError, NotFoundError


def create(session: Session, sweep_id: str, values: dict[str, Any]) -> None:
    """Enter a sweep; one that is there stays as it is, whoever entered it."""
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    new = dialect.insert(SweepRow).values(id=sweep_id, created_at=datetime.now(UTC), **values)
    session.execute(new.on_conflict_do_nothing(index_elements=[SweepRow.id]))


def enter(session: Session, run_id: str, trial: Trial) -> None:
    """Give a run its place; raise ConfigError where another run has it."""
    session.add(TrialRow(run_id=run_id, sweep_id=trial.sweep, cell=trial.cell, seed=trial.seed))
    try:
        session.flush()
    except IntegrityError as error:
        raise ConfigError(
            f"Sweep '{trial.sweep}' has a run of cell {trial.cell}, seed {trial.seed} already, or is not here; resume that sweep."
        ) from error


def find(session: Session, sweep_id: str) -> Sweep:
    """Read the one sweep that has this id or begins with it, or raise NotFoundError."""
    found = [each for each in read(session, None) if each.id.startswith(sweep_id)] if sweep_id else []
    exact = [each for each in found if each.id == sweep_id] or found
    if not exact:
        raise NotFoundError(f"There is no sweep '{sweep_id}' here; `moonflower history sweeps` lists them.")
    if len(exact) > 1:
        shown = ", ".join(sorted(each.id for each in exact)[: reads.SHOWN])
        raise NotFoundError(f"Several sweeps begin with '{sweep_id}' ({shown}); give more of the id.")
    return exact[0]


def read(session: Session, limit: int | None) -> list[Sweep]:
    """Read the sweeps, newest first."""
    query = select(*reads.columns(SweepRow, Sweep)).order_by(SweepRow.created_at.desc(), SweepRow.id.desc())
    return [Sweep(*row) for row in session.execute(query.limit(limit))]


def runs(session: Session, sweep_id: str, limit: int | None) -> list[Run]:
    """Read a sweep's runs, newest first."""
    return reads.runs(session, None, limit, TrialRow.sweep_id == sweep_id)
