"""Files that one process at a time may hold: a daemon's state, a node's state, a run's attempt.

The lock is the kernel's (`flock`), so that it ends with its holder however that ends. The holder's process id
is in the file, for messages and for whoever watches it.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import ConfigError

PATIENCE = 0.25  # seconds: `holder` takes the lock for a moment to see whether it is free


@contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Hold `path` until the block ends, with this process's id in it; its folder must exist.

    Parameters
    ----------
    path : Path
        The file, made where it is missing. It stays when the lock ends, empty.
    what : str
        What the lock stands for, as the message of a refusal begins: "the state folder /var/lib/moonflower".

    Raises
    ------
    ConfigError
        Where another process holds it, naming that process, or where the file cannot be opened.
    """
    handle = _open(path, what)
    try:
        if not _take(handle, PATIENCE):
            raise ConfigError(f"{what} is in use by process {_pid(path) or '(unknown)'}; stop that one first ({path}).")
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def holder(path: Path) -> int | None:
    """Return the process id that holds `path`, or None where nobody does.

    0 where somebody holds it and has not written its id yet; ask again.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return None if _take(handle, 0.0) else _pid(path)
    finally:
        os.close(handle)


def _open(path: Path, what: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{what} cannot be locked: {path}: {error.strerror}.") from None


def _take(handle: int, patience: float) -> bool:
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.01)
        else:
            return True


def _pid(path: Path) -> int:
    text = path.read_text(encoding="ascii").strip()
    return int(text) if text.isdigit() else 0
