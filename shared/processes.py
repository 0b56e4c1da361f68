"""A child process that is kept running, and that leaves nobody behind.

The child dies with the process that started it, however that ends (PR_SET_PDEATHSIG). Its own children may open
sessions of their own, as Flower's do; they are known by a mark in their environment, which every process
inherits, so that they are found and ended by id even after their parents are gone.
"""

import ctypes
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "MOONFLOWER_FAMILY"  # names, in a process's environment, the family that it belongs to
PR_SET_PDEATHSIG = 1
STEADY = 60.0  # seconds that a child lives until an earlier failure is forgotten
LAST_LINES = 1.0  # seconds to wait for them after the end
LONGEST_LINE = 8192  # characters; a longer line is cut

# Runs in the child before its command: dies with the parent, then becomes the command. A small program and not a
# preexec_fn, which may deadlock in a parent with threads.
LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    print(f"{sys.argv[2]} cannot be started: {error.strerror}", flush=True)
    os._exit(127)
"""


class Child:
    """One process, from its start to its end.

    Parameters
    ----------
    name : str
        What messages call it.
    command : Sequence[str]
        The program and its arguments.
    env : Mapping[str, str] | None
        The child's whole environment; None is this process's.
    on_line : Callable[[str], None]
        Gets each line that the child and its children write, standard output and error as they come, in a thread.
    mark : str | None
        Names the child's family; a fresh name where it is None. A fixed one, such as a state folder's path,
        lets a later process find what an earlier one left (`family`).

    To be made in the main thread: the child dies with the thread that made it.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        on_line: Callable[[str], None],
        mark: str | None = None,
    ) -> None:
        self.name = name
        self.mark = mark or f"{name} {secrets.token_hex(8)}"
        self.started_at = time.monotonic()
        self._on_line = on_line
        self._process = subprocess.Popen(  # noqa: S603 - the command is ours
            [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), *command],
            env=dict(os.environ if env is None else env) | {MARK: self.mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, name=f"lines of {name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs; a negative one is the signal that ended it."""
        return self._process.poll()

    def stop(self, grace: float) -> int:
        """End it: SIGTERM, and after `grace` seconds SIGKILL (at once where it is 0); and then all of its family.

        Waits until they are gone, and returns the exit code; may be called in any thread, and again.
        """
        if grace > 0 and self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        if self._process.poll() is None:
            self._process.kill()
        code = self._process.wait()
        kill(family(self.mark))
        self._reader.join(LAST_LINES)
        return code

    def _read(self) -> None:
        if self._process.stdout is None:
            return
        with self._process.stdout as lines:
            while line := lines.readline(LONGEST_LINE):
                self._on_line(line.rstrip("\r\n"))


class Supervised:
    """A command that is started again, with backoff, whenever it ends.

    Parameters
    ----------
    name, env, on_line, mark
        As of `Child`.
    command : Callable[[], Sequence[str]]
        Asked at each start, so that a restart may have other arguments.
    backoff : tuple[float, float]
        Seconds to the next start after a first failure, which double with each further one, and their most.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        env: Mapping[str, str] | None = None,
        *,
        backoff: tuple[float, float] = (0.5, 30.0),
        on_line: Callable[[str], None],
        mark: str | None = None,
    ) -> None:
        self.name = name
        self.mark = mark or f"{name} {secrets.token_hex(8)}"
        self.restart_at: float | None = None  # time.monotonic(); None while it runs or was stopped
        self._command, self._env, self._on_line = command, env, on_line
        self._first, self._most = backoff
        self._delay = self._first
        self._child: Child | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id, or None while there is none."""
        return None if self._child is None else self._child.pid

    def start(self) -> None:
        """Start the command. To be called in the main thread."""
        if self._child is None:
            self.restart_at = None
            self._child = Child(self.name, self._command(), self._env, on_line=self._on_line, mark=self.mark)

    def poll(self) -> int | None:
        """Return the exit code once after the child has ended, and start it again when the backoff is over.

        To be called often, in the main thread. A negative code is the signal that ended it. What the child
        left running is ended before this returns.
        """
        if self._child is None:
            if self.restart_at is not None and time.monotonic() >= self.restart_at:
                self.start()
            return None
        code = self._child.poll()
        if code is None:
            return None
        child, self._child = self._child, None
        child.stop(0)
        now = time.monotonic()
        if now - child.started_at >= STEADY:
            self._delay = self._first
        self.restart_at = now + self._delay
        self._delay = min(2 * self._delay, self._most)
        return code

    def stop(self, grace: float) -> None:
        """End the child for good, as `Child.stop` does."""
        child, self._child, self.restart_at = self._child, None, None
        if child is not None:
            child.stop(grace)


def die_with_parent(parent: int) -> None:
    """Have the system end this process when the thread of `parent` that started it ends; at once, if it has."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def family(mark: str) -> list[psutil.Process]:
    """Return every process that has this mark in its environment, or this mark, a "#" and more; but the asking one."""
    found = []
    for process in psutil.process_iter():
        with suppress(OSError):  # ended meanwhile, or another user's
            its = _mark_of(process.pid)
            if process.pid != os.getpid() and (its == mark or its.startswith(f"{mark}#")):
                found.append(process)
    return found


def _mark_of(pid: int) -> str:
    """Return a process's mark; empty where it has none.

    Read as it lies there: a process that sets its title writes over the first variables (Ray's do), and psutil reads no
    further than the gap that this leaves.
    """
    begins = f"{MARK}=".encode()
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    found = next((each for each in variables if each.startswith(begins)), begins)
    return found.removeprefix(begins).decode(errors="replace")


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs: one that has ended and waits to be reaped by its parent does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(processes: Iterable[psutil.Process], wait: float = 5.0) -> None:
    """End processes at once, each by its id and start time, and wait at most `wait` seconds until they are gone."""
    left = list(processes)
    for process in left:
        with suppress(psutil.NoSuchProcess):  # ended by itself
            process.send_signal(signal.SIGKILL)
    until = time.monotonic() + wait
    while (left := [process for process in left if alive(process)]) and time.monotonic() < until:
        time.sleep(0.01)
