"""How the history reaches its database: the URL, the connection's settings, and errors a person can read.

SQLite and PostgreSQL are made to agree here: foreign keys hold, a commit is on disk when it returns, and
a transaction that will write takes its lock before it reads, so that check-then-write is one step.
"""

import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, ExceptionContext, StaticPool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, InterfaceError, OperationalError, SQLAlchemyError

from shared.errors import DatabaseAwayError, DatabaseError

BUSY_SECONDS = 30
FORMS = "use sqlite:///PATH or postgresql://USER@HOST/NAME"
WRITES = {"moonflower_writes": True}  # execution option of a transaction that will write

REMEDIES = {
    "file is not a database": "the file is not a SQLite database; name another file",
    "malformed": "the file is damaged; restore it from a backup",
    "unable to open": "it cannot be opened; check the path and its permissions",
    "readonly": "it is read-only for this user; check the permissions of the file and its folder",
    "locked": f"another process has held it for {BUSY_SECONDS} s; end that process or try again",
    "disk is full": "the disk is full; make room and resume the run",
    "password": "the server refused the user or the password; check both in the URL",
    "does not exist": "the server knows no such database, user or table; check the URL",
    "resolve host": "the host's name is not known; check the URL",
    "connection": "the server does not answer; check that it runs and that the host and port are right",
}


def parse_url(text: str) -> URL:
    """Read a database URL, mapping ``postgresql://`` to psycopg.

    Raises
    ------
    DatabaseError
        The text is no URL (it is not repeated, as it may hold a password), or names another database.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise DatabaseError(f"The database URL cannot be read; {FORMS}.") from error
    name = {"postgres": "postgresql", "sqlite+pysqlite": "sqlite"}.get(url.drivername, url.drivername)
    if name not in {"sqlite", "postgresql", "postgresql+psycopg"}:
        raise DatabaseError(f"The database '{url.drivername}' is not supported; {FORMS}.")
    return url.set(drivername="sqlite" if name == "sqlite" else "postgresql+psycopg")


def masked(url: URL) -> str:
    """Give the URL as text fit for a screen or a log: without its password."""
    if "password" in url.query:
        url = url.update_query_dict({"password": "***"})
    return url.render_as_string(hide_password=True).replace("postgresql+psycopg://", "postgresql://")


def is_memory(url: URL) -> bool:
    """Tell whether the URL is SQLite's database in memory."""
    return url.get_backend_name() == "sqlite" and url.database in {None, "", ":memory:"}


def file_of(url: URL) -> Path | None:
    """Give the file of a SQLite URL; None for memory and for PostgreSQL."""
    if url.get_backend_name() != "sqlite" or is_memory(url):
        return None
    return Path(str(url.database))


# Of libpq: a database whose machine is gone without a word is noticed within a minute, not after TCP's two hours.
LIFELINE = {
    "connect_timeout": 10,
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 50_000,  # milliseconds
}


def connect(url: URL) -> Engine:
    """Make the engine; nothing is opened yet, but a missing folder is refused."""
    if url.get_backend_name() == "postgresql":
        # A coordinator waits minutes between rounds; pre_ping replaces what a firewall has cut meanwhile.
        return create_engine(url, pool_pre_ping=True, connect_args=LIFELINE)
    arguments: dict[str, Any] = {"timeout": BUSY_SECONDS, "check_same_thread": False}
    pool: dict[str, Any] = {"poolclass": StaticPool} if is_memory(url) else {}
    file = file_of(url)
    if file is not None and not file.absolute().parent.is_dir():
        raise DatabaseError(f"The folder '{file.parent}' of the database does not exist; make it first.")
    engine = create_engine(url, connect_args=arguments, **pool)
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    event.listen(engine, "handle_error", _keep)
    return engine


def _configure(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # transactions begin in `_begin`, not where the driver guesses
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA synchronous=FULL")
    _use_wal(connection)


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch the file to its write-ahead log, unless it is switched or in memory.

    Where two processes switch a fresh file at once, SQLite tells one of them "locked" without waiting for
    its timeout; so the waiting is done here.
    """
    until = time.monotonic() + BUSY_SECONDS
    while connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return  # memory and some file systems stay as they are
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("moonflower_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _keep(context: ExceptionContext) -> None:
    # After Ctrl-C inside a statement SQLAlchemy drops the connection instead of rolling back, and SQLite
    # then keeps the lock for as long as the traceback lives: the attempt could not even be ended.
    context.is_disconnect = False


def explain(error: SQLAlchemyError, url: URL) -> DatabaseError:
    """Turn a driver's error into one line with a remedy."""
    said = str(getattr(error, "orig", None) or error).strip()
    first = said.splitlines()[0] if said else type(error).__name__
    signs = {} if isinstance(error, IntegrityError) else REMEDIES  # that one quotes our own values
    remedy = next((text for sign, text in signs.items() if sign in said), first)
    away = isinstance(error, OperationalError | InterfaceError)  # no connection, no lock, no room
    kind = DatabaseAwayError if away else DatabaseError
    return kind(f"The database {masked(url)}: {remedy}.")
