"""What a coordinator's daemon keeps beside its runs: the queue, requests to stop, the sites' keys, and progress.

Reads and writes, each inside a transaction that `store` opened.
"""

import re
from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from server.history import reads, writes
from server.history.models import ProgressRow, RunRow, SiteKeyRow
from server.history.records import Progress, Run, SiteKey
from shared.errors import ConfigError, NotFoundError
from shared.run_config import NAME_PATTERN


def queue(session: Session) -> list[Run]:
    """Read the daemon's runs that are not finished, oldest first."""
    unfinished = RunRow.origin == "daemon", RunRow.status.in_(["pending", "running"])
    return reads.runs(session, None, None, *unfinished)[::-1]


def request_stop(session: Session, run_id: str, by: str | None) -> None:
    """Note that a run shall stop; one that never started is stopped at once, as nobody plays it."""
    run = writes.lock(session, run_id)
    if run.origin != "daemon":
        raise ConfigError(f"Run '{run_id}' was not submitted to a coordinator; stop it where it runs.")
    if run.status not in {"pending", "running"}:
        raise ConfigError(f"Run '{run_id}' is {run.status} already; there is nothing to stop.")
    if run.stop_requested_at is not None:
        return
    run.stop_requested_at = datetime.now(UTC)
    writes.add_event(session, run_id, "info", f"A stop was requested{f' by {by}' if by else ''}.")
    if run.status == "pending":
        run.status, run.finished_at = "stopped", run.stop_requested_at
    writes.add_progress(session, run_id, 0, "run", None, "stopping" if run.finished_at is None else "stopped", None)


def progress(session: Session, run_id: str, after: int, limit: int | None) -> list[Progress]:
    """Read what a run's watchers were told after this id, the oldest first, up to a limit."""
    query = select(*reads.columns(ProgressRow, Progress)).where(ProgressRow.run_id == run_id, ProgressRow.id > after)
    return [Progress(*row) for row in session.execute(query.order_by(ProgressRow.id).limit(limit))]


def enrol(session: Session, site: str, public_key: str, *, renew: bool) -> None:
    """Enter a site's key; with `renew`, in place of the one that lives."""
    if not re.fullmatch(NAME_PATTERN, site):
        raise ConfigError(f"site={site!r} must match {NAME_PATTERN}.")
    key = " ".join(public_key.split()[:2])  # without the comment
    known = session.scalar(select(SiteKeyRow).where(SiteKeyRow.public_key == key).with_for_update())
    if known is not None and known.revoked_at is not None:
        raise ConfigError(
            f"The key of site '{site}' was revoked on {known.revoked_at:%Y-%m-%d}, which is final; make a new key."
        )
    if known is not None and known.site != site:
        raise ConfigError(f"The key is enrolled for site '{known.site}'; each site has a key of its own.")
    if known is not None:
        return
    now = datetime.now(UTC)
    live = _live(session, site)
    if live is not None and not renew:
        raise ConfigError(f"Site '{site}' has a key already; renew it, or revoke it first.")
    if live is not None:
        live.revoked_at = now
        session.flush()  # before the new one: a site has one that lives
    session.add(SiteKeyRow(public_key=key, site=site, enrolled_at=now))
    try:
        session.flush()
    except IntegrityError as error:
        raise ConfigError(f"Site '{site}' was enrolled by somebody else at the same time; look again.") from error


def revoke(session: Session, site: str) -> None:
    """Revoke a site's key for good."""
    ever = select(SiteKeyRow.site).where(SiteKeyRow.site == site).limit(1)
    if not re.fullmatch(NAME_PATTERN, site) or session.scalar(ever) is None:
        raise NotFoundError(f"There is no site '{site}' here; `moonflower site list` lists them.")
    live = _live(session, site)
    if live is not None:
        live.revoked_at = datetime.now(UTC)


def forbid(session: Session, site: str, public_key: str) -> None:
    """Revoke this key of a site for good, even one that was never enrolled."""
    key = " ".join(public_key.split()[:2])
    row = session.get(SiteKeyRow, key, with_for_update=True)
    now = datetime.now(UTC)
    if row is None:
        session.add(SiteKeyRow(public_key=key, site=site, enrolled_at=now, revoked_at=now))
    elif row.revoked_at is None:
        row.revoked_at = now


def set_node(session: Session, public_key: str, node_id: int | None) -> None:
    """Note what Flower calls the node that has this key."""
    row = session.get(SiteKeyRow, public_key, with_for_update=True)
    if row is None:
        raise NotFoundError(f"The key {public_key[:60]!r} was never enrolled.")
    row.node_id = node_id


def site_keys(session: Session) -> list[SiteKey]:
    """Read all keys, by site, oldest first."""
    query = select(*reads.columns(SiteKeyRow, SiteKey))
    return [SiteKey(*row) for row in session.execute(query.order_by(SiteKeyRow.site, SiteKeyRow.enrolled_at))]


def _live(session: Session, site: str) -> SiteKeyRow | None:
    query = select(SiteKeyRow).where(SiteKeyRow.site == site, SiteKeyRow.revoked_at.is_(None))
    return session.scalar(query.with_for_update())
