"""The history: every round, metric and unit of privacy spent, in SQLite or PostgreSQL.

`History` holds the only sessions. What it takes and gives are the frozen values of `records`; what the
database says goes in `reads` and `writes`. A round is in here whole, or it did not happen.
"""

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from server.history import federation, reads, schema, sweeps, writes
from server.history.engine import WRITES, connect, explain, is_memory, parse_url
from server.history.models import MetricRow, ParticipationRow, SpendRow
from server.history.records import (
    Attempt,
    AttemptOutcome,
    Event,
    EventLevel,
    Ledger,
    Metric,
    Origin,
    Participation,
    Progress,
    ProgressKind,
    Round,
    Run,
    RunStatus,
    SiteKey,
    Spend,
    Sweep,
    Trial,
)


class History:
    """An open history; a context manager. Threads may share it, processes open their own.

    Reads take a run's id or a prefix of it that fits no other run, and raise NotFoundError when no run
    fits; writes take the whole id. Any method raises DatabaseError when the database fails. `limit`
    keeps the newest values, which still come in the order in which they happened; None keeps all.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writer = engine.execution_options(**WRITES)
        self._turn = threading.Lock() if is_memory(engine.url) else None

    @classmethod
    def open(cls, url: str, *, upgrade: bool = False, create: bool = True) -> Self:
        """Open the history at `url`.

        Parameters
        ----------
        url : str
            ``sqlite:///PATH``, ``sqlite://`` (in memory) or ``postgresql://USER:PASSWORD@HOST/NAME``.
        upgrade : bool
            Bring an older schema up to this version's instead of refusing it.
        create : bool
            Make a missing or empty database; without it, that is an error.

        Raises
        ------
        DatabaseError
            It cannot be reached or read, its schema is another version's, or its folder is missing.
        """
        engine = connect(parse_url(url))
        try:
            schema.prepare(engine, upgrade=upgrade, create=create)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine)

    @property
    def url(self) -> str:
        """Where it is, for a process of one's own to open: with its password, so not for messages."""
        return self._engine.url.render_as_string(hide_password=False)

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _session(self, *, writing: bool = False) -> Iterator[Session]:
        """Open a transaction; commit at the end, roll back on any error, and explain the database's own."""
        if self._turn:  # the database in memory is one connection, which threads take in turn
            self._turn.acquire()
        try:
            with Session(self._writer if writing else self._engine) as session, session.begin():
                yield session
        except SQLAlchemyError as error:
            raise explain(error, self._engine.url) from error
        finally:
            if self._turn:
                self._turn.release()

    def create_run(
        self,
        run_id: str,
        *,
        name: str,
        config: dict[str, Any],
        config_digest: str,
        rounds_planned: int,
        private: bool,
        version: str,
        origin: Origin = "simulate",
        submitted_by: str | None = None,
        trial: Trial | None = None,
    ) -> Run:
        """Enter a new run, pending; raise ConfigError if its id is taken. A daemon's runs wait in its `queue`.

        A sweep's run takes its place there in the same transaction; ConfigError where that is taken.
        """
        values: dict[str, Any] = {"name": name, "config": config, "config_digest": config_digest}
        values |= {"rounds_planned": rounds_planned, "private": private, "version": version}
        values |= {"origin": origin, "submitted_by": submitted_by}
        with self._session(writing=True) as session:
            writes.create_run(session, run_id, values)
            if trial is not None:
                sweeps.enter(session, run_id, trial)
            return reads.runs(session, run_id, None)[0]

    def start_attempt(self, run_id: str, *, engine: str) -> Attempt:
        """Take the run over: older attempts that never ended are lost and can commit nothing more.

        Raises ConfigError if the run is completed, NotFoundError if there is none.
        """
        with self._session(writing=True) as session:
            return writes.start_attempt(session, run_id, engine)

    def end_attempt(self, run_id: str, number: int, outcome: AttemptOutcome, error: str | None = None) -> None:
        """Close an attempt. One that is closed already (lost, superseded) stays as it is."""
        with self._session(writing=True) as session:
            writes.end_attempt(session, run_id, number, outcome, error)

    def finish_run(self, run_id: str, status: RunStatus, *, attempt: int | None = None) -> None:
        """Set the run to completed, failed or stopped.

        With `attempt`, only if that is still the run's newest: RunFailedError otherwise, so that a process
        that was superseded cannot end the run for the one that goes on.
        """
        with self._session(writing=True) as session:
            writes.finish_run(session, run_id, status, attempt)

    def commit_round(self, round: Round) -> None:
        """Write a round, its participations, metrics, spends and checkpoint in one transaction.

        After a DatabaseError, ask `last_round` before trying again: the connection may have broken after
        the commit was done.

        Raises
        ------
        RunFailedError
            The round is not the run's next, or its attempt has ended or was superseded. Nothing was
            written.
        """
        with self._session(writing=True) as session:
            writes.commit_round(session, round)

    def add_event(self, run_id: str, level: EventLevel, text: str) -> None:
        """Note something that a person may want to know."""
        with self._session(writing=True) as session:
            writes.add_event(session, reads.resolve(session, run_id), level, text)

    def run(self, run_id: str) -> Run:
        """Give one run."""
        with self._session() as session:
            return reads.runs(session, reads.resolve(session, run_id), None)[0]

    def runs(self, *, limit: int | None = None) -> list[Run]:
        """Give the runs, newest first."""
        with self._session() as session:
            return reads.runs(session, None, limit)

    def create_sweep(self, sweep_id: str, *, name: str, plan: dict[str, Any], version: str) -> Sweep:
        """Enter a sweep, and give it; one that has the id already is given as it is."""
        with self._session(writing=True) as session:
            sweeps.create(session, sweep_id, {"name": name, "plan": plan, "version": version})
            return sweeps.find(session, sweep_id)

    def sweep(self, sweep_id: str) -> Sweep:
        """Give one sweep, by its id or a prefix that fits no other; NotFoundError where there is none."""
        with self._session() as session:
            return sweeps.find(session, sweep_id)

    def sweeps(self, *, limit: int | None = None) -> list[Sweep]:
        """Give the sweeps, newest first."""
        with self._session() as session:
            return sweeps.read(session, limit)

    def trials(self, sweep_id: str, *, limit: int | None = None) -> list[Run]:
        """Give a sweep's runs, newest first."""
        with self._session() as session:
            return sweeps.runs(session, sweeps.find(session, sweep_id).id, limit)

    def attempts(self, run_id: str) -> list[Attempt]:
        """Give a run's attempts."""
        with self._session() as session:
            return reads.attempts(session, reads.resolve(session, run_id))

    def last_round(self, run_id: str) -> Round | None:
        """Give the last committed round with all its parts; None before the first."""
        with self._session() as session:
            return reads.last_round(session, reads.resolve(session, run_id))

    def rounds(self, run_id: str, *, round_number: int | None = None, limit: int | None = None) -> list[Round]:
        """Give a run's rounds, without participations, metrics and spends (see their own readers)."""
        with self._session() as session:
            return reads.rounds(session, reads.resolve(session, run_id), round_number, limit)

    def traffic(self, run_id: str) -> dict[int, tuple[int, int]]:
        """Give the bytes of each round that anybody took part in, by its number: from the sites, and to them."""
        with self._session() as session:
            return reads.traffic(session, reads.resolve(session, run_id))

    def participations(
        self,
        run_id: str,
        *,
        site: str | None = None,
        round_number: int | None = None,
        limit: int | None = None,
    ) -> list[tuple[int, Participation]]:
        """Give (round number, participation) pairs."""
        with self._session() as session:
            key = reads.resolve(session, run_id)
            where = reads.Where(key, site, round_number, limit)
            return reads.parts(session, ParticipationRow, Participation, where)

    def metrics(
        self,
        run_id: str,
        *,
        site: str | None = None,
        round_number: int | None = None,
        limit: int | None = None,
    ) -> list[tuple[int, Metric]]:
        """Give (round number, metric) pairs."""
        with self._session() as session:
            key = reads.resolve(session, run_id)
            where = reads.Where(key, site, round_number, limit)
            return reads.parts(session, MetricRow, Metric, where)

    def spends(
        self,
        run_id: str,
        *,
        site: str | None = None,
        round_number: int | None = None,
        limit: int | None = None,
    ) -> list[tuple[int, Spend]]:
        """Give (round number, spend) pairs."""
        with self._session() as session:
            key = reads.resolve(session, run_id)
            where = reads.Where(key, site, round_number, limit)
            return reads.parts(session, SpendRow, Spend, where)

    def saw_ledgers(self, ledgers: Sequence[Ledger]) -> None:
        """Remember how far sites' ledgers are, at once: not with the round, which may never be committed."""
        with self._session(writing=True) as session:
            writes.saw_ledgers(session, ledgers)

    def ledgers(self, ids: Collection[str] | None = None) -> dict[str, Ledger]:
        """Give the newest that was seen of these ledgers, or of all, over all runs, by its id."""
        with self._session() as session:
            return {ledger.id: ledger for ledger in reads.ledgers(session, ids)}

    def charged(self, ledger_id: str, number: int) -> tuple[str, int, str] | None:
        """Give (run, round, part) of the committed spend that has this number in a ledger; None where none has."""
        with self._session() as session:
            return reads.charged(session, ledger_id, number)

    def events(self, run_id: str, *, limit: int | None = None) -> list[Event]:
        """Give a run's events."""
        with self._session() as session:
            return reads.events(session, reads.resolve(session, run_id), limit)

    def queue(self) -> list[Run]:
        """Give the runs that were submitted to the daemon and are pending or running, oldest first.

        One that was asked to stop is among them until it is finished.
        """
        with self._session() as session:
            return federation.queue(session)

    def request_stop(self, run_id: str, *, by: str | None = None) -> Run:
        """Ask whoever plays the run to stop it: no further attempt may start. A pending run is stopped at once.

        Raises ConfigError if it has finished.
        """
        with self._session(writing=True) as session:
            key = reads.resolve(session, run_id)
            federation.request_stop(session, key, by)
            session.flush()
            return reads.runs(session, key, None)[0]

    def enrol(self, site: str, public_key: str, *, renew: bool = False) -> None:
        """Enter the key that a site's node proves itself with: OpenSSH, in one line.

        A key that the site has already changes nothing. Raises ConfigError for a key that was revoked or is
        another site's, and for a second one of the site unless it is to `renew` (which revokes the first).
        """
        with self._session(writing=True) as session:
            federation.enrol(session, site, public_key, renew=renew)

    def revoke(self, site: str) -> None:
        """Revoke the site's key for good, if one lives; raise NotFoundError if the site never had any."""
        with self._session(writing=True) as session:
            federation.revoke(session, site)

    def forbid(self, site: str, public_key: str) -> None:
        """Revoke a key for good, whether or not it was ever enrolled: from now on `enrol` refuses it."""
        with self._session(writing=True) as session:
            federation.forbid(session, site, public_key)

    def set_node(self, public_key: str, node_id: int | None) -> None:
        """Note Flower's id of the node that has this key."""
        with self._session(writing=True) as session:
            federation.set_node(session, public_key, node_id)

    def site_keys(self) -> list[SiteKey]:
        """Give all keys that were ever enrolled, by site, oldest first."""
        with self._session() as session:
            return federation.site_keys(session)

    def add_progress(
        self,
        run_id: str,
        round: int,
        kind: ProgressKind,
        site: str | Sequence[str] | None,
        state: str,
        text: str | None = None,
    ) -> None:
        """Tell the watchers of a run what happens: of one site, of several at once, or of none (None)."""
        with self._session(writing=True) as session:
            sites = [site] if isinstance(site, str) else site
            writes.add_progress(session, run_id, round, kind, sites, state, text)

    def progress(self, run_id: str, *, after: int = 0, limit: int | None = None) -> list[Progress]:
        """Give what a run's watchers were told after this id; with `limit`, the oldest of it, as one reads on."""
        with self._session() as session:
            return federation.progress(session, reads.resolve(session, run_id), after, limit)

    @staticmethod
    def upgrade(url: str) -> None:
        """Bring the database at `url` to this version's schema, making it if it is missing."""
        schema.upgrade(url)

    @staticmethod
    def current_revision(url: str) -> str | None:
        """Give the schema revision of the database at `url`; None where there is no history."""
        return schema.status(url).revision
