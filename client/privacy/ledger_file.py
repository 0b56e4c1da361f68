"""The SQLite file under a site's ledger: its schema, its creation, and how a change to it becomes durable.

A file is made whole or not at all, a change is one transaction under the write lock and is on disk when it
returns (write-ahead log, synchronous FULL), and what went wrong is said in one line.
"""

import os
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from client.privacy.ledger_count import sync_folder
from shared.errors import DatabaseError

_APPLICATION, _VERSION = 0x4D6F6F6E, 2  # "Moon"; the version of the schema below
_BUSY_SECONDS = 30.0  # how long to wait for another process's transaction
_DRAFT = re.compile(r"\.[0-9a-f]{16}\.new(-wal|-shm|-journal)?")  # after the ledger's name, while it is made
_DRAFT_SECONDS = 3600.0  # a draft is made in a moment: one this old is a dead process's
# File systems of which two machines may hold one at once. The write-ahead log and its locks are one machine's: each would
# charge without seeing what the other has charged (sqlite.org/wal.html).
_SHARED = ("nfs", "cifs", "smb", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "ocfs2", "gfs2", "sshfs")
_SCHEMA = """
CREATE TABLE datasets (
    id TEXT PRIMARY KEY,
    account TEXT NOT NULL,
    delta REAL NOT NULL,
    rdp_order INTEGER NOT NULL,
    opened_at TEXT NOT NULL
);
CREATE TABLE spends (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    dataset TEXT NOT NULL REFERENCES datasets,
    number INTEGER NOT NULL CHECK (number > 0),
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    kind TEXT NOT NULL,
    part TEXT NOT NULL CHECK (part IN ('train', 'validation')),
    request TEXT NOT NULL,
    digest TEXT NOT NULL,
    mechanism TEXT NOT NULL,
    noise_multiplier REAL NOT NULL,
    sampling_rate REAL NOT NULL,
    steps INTEGER NOT NULL,
    at TEXT NOT NULL,
    previous TEXT NOT NULL,
    row TEXT NOT NULL,
    UNIQUE (dataset, number),
    UNIQUE (dataset, run, request)
);
CREATE TABLE reservations (
    dataset TEXT NOT NULL REFERENCES datasets,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    kind TEXT NOT NULL,
    part TEXT NOT NULL CHECK (part IN ('train', 'validation')),
    request TEXT NOT NULL,
    digest TEXT NOT NULL,
    mechanism TEXT NOT NULL,
    noise_multiplier REAL NOT NULL,
    sampling_rate REAL NOT NULL,
    steps INTEGER NOT NULL,
    at TEXT NOT NULL,
    owner TEXT NOT NULL,
    PRIMARY KEY (dataset, run, request, owner)
);
CREATE TABLE replies (spend INTEGER PRIMARY KEY REFERENCES spends, reply BLOB NOT NULL);
CREATE TABLE states (
    dataset TEXT NOT NULL,
    run TEXT NOT NULL,
    kind TEXT NOT NULL,
    state BLOB NOT NULL,
    PRIMARY KEY (dataset, run, kind)
);
CREATE TRIGGER spends_update BEFORE UPDATE ON spends BEGIN SELECT RAISE (ABORT, 'append-only'); END;
CREATE TRIGGER spends_delete BEFORE DELETE ON spends BEGIN SELECT RAISE (ABORT, 'append-only'); END;
CREATE TRIGGER spends_replace BEFORE INSERT ON spends
WHEN EXISTS (
    SELECT 1 FROM spends
    WHERE id = NEW.id
    OR (dataset = NEW.dataset AND (number = NEW.number OR (run = NEW.run AND request = NEW.request)))
) BEGIN SELECT RAISE (ABORT, 'append-only'); END;
CREATE TRIGGER datasets_update BEFORE UPDATE ON datasets BEGIN SELECT RAISE (ABORT, 'append-only'); END;
CREATE TRIGGER datasets_delete BEFORE DELETE ON datasets BEGIN SELECT RAISE (ABORT, 'append-only'); END;
CREATE TRIGGER datasets_replace BEFORE INSERT ON datasets
WHEN EXISTS (SELECT 1 FROM datasets WHERE id = NEW.id) BEGIN SELECT RAISE (ABORT, 'append-only'); END;
"""


def one_name(path: Path) -> Path:
    """Return the one name of a ledger that links may give others: beside it stand its counter and reservations."""
    return Path(os.path.realpath(path))


def connect(path: Path, *, to_write: bool = True) -> sqlite3.Connection:
    """Open the ledger's file; the caller begins its transactions.

    To write, it is made with mode 0600 if there is none; to read, it is left as it is.

    Raises
    ------
    DatabaseError
        If it is not a ledger of this version, if only its write-ahead log is there, or if it cannot be
        opened. An empty file is refused too: a ledger that lost its content must not start anew.
    """
    if path.is_dir():
        raise DatabaseError(f"{path} is a folder, not a ledger: name the file in it, as in {path / 'ledger.db'}.")
    with said_in_one_line(path):
        if to_write:
            refuse_shared(path)
            if not path.exists():
                _create(path)
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
        connection = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode={'rw' if to_write else 'ro'}",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
        )
        try:
            _check(path, connection, to_write)
        except BaseException:
            connection.close()
            raise
    return connection


@contextmanager
def transaction(path: Path, connection: sqlite3.Connection) -> Iterator[None]:
    """Hold the write lock; at the end commit durably, and on any error undo everything."""
    with said_in_one_line(path):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


@contextmanager
def said_in_one_line(path: Path) -> Iterator[None]:
    """Raise what SQLite or the file system complains of as a DatabaseError that a person can act on."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # used from another thread, or after it was closed: a bug
    except (sqlite3.Error, OSError) as error:
        raise DatabaseError(
            f"The ledger {path} cannot be used: {error}. See that the file is a ledger, "
            "that it and its folder can be written, and that the disk has room."
        ) from error


def tidy(path: Path) -> None:
    """Remove what processes that died while they made the ledger have left."""
    for file in path.parent.iterdir():
        if file.name.startswith(path.name) and _DRAFT.fullmatch(file.name.removeprefix(path.name)):
            with suppress(FileNotFoundError):  # another process is tidying too, or the draft was live and is done
                if time.time() - file.stat().st_mtime > _DRAFT_SECONDS:
                    file.unlink()


def refuse_shared(path: Path) -> None:
    """Refuse a place that another machine may write to.

    Raises
    ------
    DatabaseError
        Naming the kind of its file system.
    """
    folder = Path(os.path.realpath(path.parent))
    mounts = [each for each in psutil.disk_partitions(all=True) if folder.is_relative_to(each.mountpoint)]
    kind = max(mounts[::-1], key=lambda each: len(each.mountpoint)).fstype if mounts else ""
    if kind.removeprefix("fuse.").startswith(_SHARED):
        raise DatabaseError(
            f"{path} is on a file system of several machines ({kind}), where one cannot see what another has charged: move the "
            "ledger and its counter to a local disk (site.toml, ledger)."
        )


def _check(path: Path, connection: sqlite3.Connection, to_write: bool) -> None:
    def pragma(name: str) -> object:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]

    application, version = pragma("application_id"), pragma("user_version")
    if application != _APPLICATION:
        raise DatabaseError(f"{path} is a database, but not a Moonflower ledger: restore it from a backup.")
    if version != _VERSION:
        raise DatabaseError(
            f"{path} is a ledger of version {version}, and this Moonflower reads version {_VERSION}: run the "
            "one that made it. The file was not changed."
        )
    if pragma("journal_mode") != "wal":
        raise DatabaseError(f"{path} is on a file system without a write-ahead log: move it to a local disk.")
    if not to_write:
        return
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute(f"PRAGMA user_version = {_VERSION}")  # a write: better refused now than after training


def _create(path: Path) -> None:
    """Write an empty ledger beside its place, sync it, then link it there: whole or not at all."""
    if (log := Path(f"{path}-wal")).exists() and not path.exists():  # else another process just made both
        raise DatabaseError(f"{path} is missing, but not {log}: restore both from a backup.")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}.new")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        connection = sqlite3.connect(draft, isolation_level=None)
        try:
            connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")
            marks = f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {_VERSION};"
            connection.executescript(f"BEGIN; {_SCHEMA} {marks} COMMIT;")
        finally:
            connection.close()  # folds the write-ahead log into the file
        with suppress(FileExistsError):  # another process was faster: its ledger is as good
            path.hardlink_to(draft)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)
