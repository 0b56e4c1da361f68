"""The rows of the history, one class a table. Only `server.history` sees them.

A round's parts hang on its `round_id` and keep their order in `position`, so that a round reads back
equal to the one committed. Their unique keys begin with (round_id, site): a read of one site over all
rounds of a run is one probe a round.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Double, ForeignKey, ForeignKeyConstraint, Index, Integer, MetaData, text
from sqlalchemy import UniqueConstraint as Unique
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from server.history.columns import FreeText, Json, NodeId, Score, SiteOrAll, Utc

NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


CLUSTERED = {"sqlite_with_rowid": False}  # the rows of a round lie side by side, in order


class Base(DeclarativeBase):
    """The tables' registry; every key has a name, so that a migration can find it."""

    metadata = MetaData(naming_convention=NAMES)
    type_annotation_map = {datetime: Utc, float: Double, dict[str, Any]: Json}  # noqa: RUF012


class RunRow(Base):
    """A run. How many rounds it has done is counted from its rounds, never kept beside them."""

    __tablename__ = "runs"
    __table_args__ = (Index(None, "created_at"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    status: Mapped[str]
    config: Mapped[dict[str, Any]]
    config_digest: Mapped[str]
    rounds_planned: Mapped[int]
    private: Mapped[bool]
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    version: Mapped[str]
    origin: Mapped[str]
    submitted_by: Mapped[str | None]
    stop_requested_at: Mapped[datetime | None]


class SweepRow(Base):
    """A study: the same scenario under many settings and seeds, a run each."""

    __tablename__ = "sweeps"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    plan: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    version: Mapped[str]


class TrialRow(Base):
    """A run's place in a sweep. A place has one run, whoever enters it first."""

    __tablename__ = "trials"
    __table_args__ = (Unique("sweep_id", "cell", "seed"),)

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    sweep_id: Mapped[str] = mapped_column(ForeignKey("sweeps.id"))
    cell: Mapped[int]
    seed: Mapped[int]


class AttemptRow(Base):
    """One process's try at a run. The newest one that has not ended owns the run."""

    __tablename__ = "attempts"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    engine: Mapped[str]
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None]
    error: Mapped[str | None] = mapped_column(FreeText)


class RoundRow(Base):
    """A committed round."""

    __tablename__ = "rounds"
    __table_args__ = (
        Unique("run_id", "number"),
        ForeignKeyConstraint(["run_id", "attempt"], ["attempts.run_id", "attempts.number"]),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str]
    number: Mapped[int]
    attempt: Mapped[int]
    phase: Mapped[str]
    started_at: Mapped[datetime]
    seconds: Mapped[float]
    simulated_seconds: Mapped[float | None]


class CheckpointRow(Base):
    """A round's checkpoint file. Two rounds may name the same file, if nothing changed between them."""

    __tablename__ = "checkpoints"
    __table_args__ = (Index(None, "digest"),)

    round_id: Mapped[int] = mapped_column(ForeignKey("rounds.id"), primary_key=True, autoincrement=False)
    digest: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)


class ParticipationRow(Base):
    """What one site did in one round."""

    __tablename__ = "participations"
    __table_args__ = (Unique("round_id", "site", "kind"), CLUSTERED)

    round_id: Mapped[int] = mapped_column(ForeignKey("rounds.id"), primary_key=True, autoincrement=False)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    site: Mapped[str]
    kind: Mapped[str]
    outcome: Mapped[str]
    seconds: Mapped[float]
    bytes_down: Mapped[int] = mapped_column(BigInteger)
    bytes_up: Mapped[int] = mapped_column(BigInteger)
    error: Mapped[str | None] = mapped_column(FreeText)
    asked: Mapped[int | None]


class MetricRow(Base):
    """One score after a round."""

    __tablename__ = "metrics"
    __table_args__ = (Unique("round_id", "site", "scope", "name"), CLUSTERED)

    round_id: Mapped[int] = mapped_column(ForeignKey("rounds.id"), primary_key=True, autoincrement=False)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    scope: Mapped[str]
    site: Mapped[str | None] = mapped_column(SiteOrAll, nullable=False)
    name: Mapped[str]
    value: Mapped[float] = mapped_column(Score, nullable=True)
    low: Mapped[float | None]
    high: Mapped[float | None]


class SpendRow(Base):
    """A site's privacy after a round, as it reports it."""

    __tablename__ = "spends"
    __table_args__ = (Unique("round_id", "site", "dataset", "part"), CLUSTERED)

    round_id: Mapped[int] = mapped_column(ForeignKey("rounds.id"), primary_key=True, autoincrement=False)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    site: Mapped[str]
    dataset: Mapped[str]
    part: Mapped[str]
    epsilon: Mapped[float]
    delta: Mapped[float]
    noise_multiplier: Mapped[float]
    sampling_rate: Mapped[float]
    steps: Mapped[int]
    budget: Mapped[float]
    mechanism: Mapped[str]
    noise_source: Mapped[str]
    gradients: Mapped[str]
    ledger_id: Mapped[str]
    ledger_number: Mapped[int]
    ledger_head: Mapped[str]
    asked: Mapped[int | None]


class LedgerRow(Base):
    """How far a site's ledger was when it was last seen. It belongs to no round: a lost attempt's sights count."""

    __tablename__ = "ledgers"

    id: Mapped[str] = mapped_column(primary_key=True)
    site: Mapped[str]
    dataset: Mapped[str]
    number: Mapped[int]
    simulated: Mapped[bool]
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"))


class EventRow(Base):
    """Something a person may want to know about a run."""

    __tablename__ = "events"
    __table_args__ = (Index(None, "run_id", "id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"))
    at: Mapped[datetime]
    level: Mapped[str]
    text: Mapped[str] = mapped_column(FreeText)


class SiteKeyRow(Base):
    """A key that a site's node was enrolled with. It stays for good: a revoked key is never enrolled again."""

    __tablename__ = "site_keys"
    __table_args__ = (
        Index(
            "uq_site_keys_live",
            "site",
            unique=True,
            sqlite_where=text("revoked_at IS NULL"),
            postgresql_where=text("revoked_at IS NULL"),
        ),
    )

    public_key: Mapped[str] = mapped_column(primary_key=True)
    site: Mapped[str]
    enrolled_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    node_id: Mapped[int | None] = mapped_column(NodeId)


class ProgressRow(Base):
    """Something that a watcher of a run is told. Within a run the ids grow in the order of the commits."""

    __tablename__ = "progress"
    __table_args__ = (Index(None, "run_id", "id"),)

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer(), "sqlite"), primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"))
    at: Mapped[datetime]
    round: Mapped[int]
    kind: Mapped[str]
    site: Mapped[str | None] = mapped_column(SiteOrAll, nullable=False)
    state: Mapped[str]
    text: Mapped[str | None] = mapped_column(FreeText)
