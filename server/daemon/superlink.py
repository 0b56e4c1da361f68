"""The SuperLink that the daemon keeps running, on loopback, and what of it is the daemon's to set."""

import asyncio
import logging
import os
import re
import secrets
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

from server.daemon.flower import Flower, SuperLinkError
from shared.certificates import loopback, write_key
from shared.processes import Supervised

log = logging.getLogger("moonflower.daemon")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
FLOWERS_OWN = re.compile(r"^(?:\S+Z )?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s*:?(?:\s+|$)")
POLL = 0.1  # seconds
LISTEN = 5.0  # seconds between looks whether it still answers
SILENT, STARTING = 25.0, 180.0  # seconds without an answer until it is ended: when it was up, and when it starts
STOP = 2.0  # seconds that it gets to end by itself


def child_log(name: str, run: str | None = None) -> Callable[[str], None]:
    """Return what takes a Flower process's lines into the daemon's log, each with the level that it claims."""
    into = logging.getLogger(name)
    prefix, extra = (f"{run}: ", {"run": run}) if run else ("", {})

    def take(line: str) -> None:
        text = COLOURS.sub("", line).rstrip()
        claimed = FLOWERS_OWN.match(text)
        level = logging.getLevelNamesMapping()[claimed[1]] if claimed else logging.INFO
        if said := text[claimed.end() :] if claimed else text:
            into.log(level, "%s%s", prefix, said, extra=extra)

    return take


def environment(state: Path) -> dict[str, str]:
    """Return the environment of Flower's processes: this one's, its home in `state`, and nothing sent to anybody."""
    own = {
        "FLWR_HOME": str(state / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
    }
    return dict(os.environ) | own


class SuperLink:
    """flower-superlink, started again with backoff for as long as the daemon lives.

    It listens on one port of 127.0.0.1 all that time, with TLS by an authority that is made anew at each start of the
    daemon and never leaves this machine; sites reach it through the gateway only.

    Parameters
    ----------
    state : Path
        The daemon's state folder.
    insecure : bool
        Plaintext and nodes without keys.
    mark : str
        The family of the daemon's children.
    """

    def __init__(self, state: Path, *, insecure: bool, mark: str) -> None:
        inner = state / "inner"
        inner.mkdir(parents=True, exist_ok=True)
        self.tls = None if insecure else loopback(inner)
        secret = secrets.token_bytes(32)
        self._secret_file = inner / "tasks.secret"
        write_key(self._secret_file, secret)
        self.address = f"127.0.0.1:{_free_port()}"
        self.flower = Flower(self.address, self.tls.ca if self.tls else None, secret)
        self.up = asyncio.Event()
        self.ends = 0  # how often it ended by itself
        self._database = state / "link.db"
        _tidy(self._database)
        take = child_log("superlink")
        self._process = Supervised(
            "flower-superlink", self._command, environment(state), on_line=take, mark=f"{mark}#superlink"
        )

    @property
    def ca(self) -> Path | None:
        """The authority of its certificate; None in plaintext."""
        return self.tls.ca if self.tls else None

    @property
    def pid(self) -> int | None:
        """Its process id, or None while it is down."""
        return self._process.pid

    async def supervise(self, ready: Callable[[], Awaitable[None]]) -> None:
        """Start it, and start it again whenever it ends, for ever; `ready` is awaited each time before it is `up`."""
        self._process.start()
        while True:
            code = self._process.poll()
            if code is not None:
                self.up.clear()
                self.ends += 1
                log.warning("flower-superlink ended (%s); it is started again", ending(code))
            if self._process.pid is not None and not self.up.is_set() and await self._answers():
                try:
                    await ready()
                    self.up.set()
                    log.info("flower-superlink is up on %s", self.address)
                except SuperLinkError as error:
                    log.warning("flower-superlink is not ready: %s", error)
            await asyncio.sleep(POLL)

    async def _answers(self) -> bool:
        return await asyncio.to_thread(self.flower.alive)

    async def listen(self) -> None:
        """End it where it lives and does not answer any more, for ever; `supervise` starts it again."""
        heard, silences, known = time.monotonic(), 0, None
        while True:
            await asyncio.sleep(LISTEN)
            pid = self.pid
            if pid is None or pid != known or await self._answers():
                heard, silences, known = time.monotonic(), 0, pid
                continue
            silences += 1
            silent = time.monotonic() - heard
            # Twice: this process, too, may have stood still meanwhile.
            if silences > 1 and silent > (SILENT if self.up.is_set() else STARTING) and self.pid == pid:
                log.error("flower-superlink has not answered for %.0f s; it is ended", silent)
                os.kill(pid, signal.SIGKILL)

    async def stop(self) -> None:
        """End it for good."""
        self.up.clear()
        self.flower.close()
        await asyncio.to_thread(self._process.stop, STOP)

    def _command(self) -> list[str]:
        host, _, port = self.address.partition(":")
        command = ["flower-superlink", "--host", host, "--port", port, "--database", str(self._database)]
        command += ["--disable-runtime-dependency-installation"]
        command += ["--isolation", "process", "--superexec-auth-secret-file", str(self._secret_file)]
        if self.tls is None:
            return [*command, "--insecure"]
        command += ["--ssl-ca-certfile", str(self.tls.ca)]
        command += ["--ssl-certfile", str(self.tls.certificate), "--ssl-keyfile", str(self.tls.key)]
        return [*command, "--enable-supernode-auth"]


def _tidy(database: Path) -> None:
    """Give back the room that arrays took in the link's state, now and from now on; what is damaged there is put aside.

    Nothing in it is missed: attempts begin anew, and keys are registered again from the history.
    """
    try:
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA auto_vacuum = FULL")  # else a flood's room would stay taken after its run
            connection.execute("VACUUM")
    except sqlite3.OperationalError as error:  # such as a full disk
        log.warning("%s is not tidied: %s", database, error)
    except sqlite3.DatabaseError as error:
        aside = database.replace(database.with_suffix(".damaged"))
        for part in ("-wal", "-shm"):
            database.with_name(database.name + part).unlink(missing_ok=True)
        log.error("%s is damaged (%s): it is put aside as %s, and made anew", database, error, aside)


def ending(code: int) -> str:
    """Say how a process ended."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
