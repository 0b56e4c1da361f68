"""Who holds a reservation, and whether it still lives: a locked file beside the ledger.

Whoever reserves budget keeps an exclusive lock (flock) on a file of its own, `ledger.db.TOKEN.owner`, and its token
stands in the reservation. The kernel drops the lock when the process dies, however it dies, and at a restart of the
machine, so another process finds out by trying the lock: no process number can be mistaken for another's, in no
container. All of this runs under the ledger's write lock. Where it cannot be told, the owner counts as alive.

A child that a process forked keeps its lock too: the reservation then stands until the child has ended as well.
"""

import fcntl
import os
import secrets
from pathlib import Path

_SUFFIX = ".owner"


class Owner:
    """The lock of one opened ledger; `close` ends it. Make it under the ledger's write lock."""

    def __init__(self, ledger: Path) -> None:
        self.token = secrets.token_hex(8)
        self._file = _file(ledger, self.token)
        self._descriptor = os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """End what it owns: without its file an owner counts as dead."""
        self._file.unlink(missing_ok=True)
        os.close(self._descriptor)


def lives(ledger: Path, token: str) -> bool:
    """Whether an owner still holds its lock. One without a file has ended, or was left behind by a move."""
    try:
        descriptor = os.open(_file(ledger, token), os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def tidy(ledger: Path) -> None:
    """Remove the files of owners that are dead; call it under the ledger's write lock, for no owner is born meanwhile."""
    for file in ledger.parent.iterdir():
        name = file.name
        if name.startswith(f"{ledger.name}.") and name.endswith(_SUFFIX):
            token = name.removeprefix(f"{ledger.name}.").removesuffix(_SUFFIX)
            if not lives(ledger, token):
                file.unlink(missing_ok=True)


def _file(ledger: Path, token: str) -> Path:
    return ledger.with_name(f"{ledger.name}.{token}{_SUFFIX}")
