"""Flower's SuperNode, kept running: it holds the connection to the coordinator, and hands tasks to this process.

It is a process of its own, started again whenever it ends or can do no more. Its lines tell how the connection
stands; they are Flower's words, which tests/client/node/test_supernode.py holds against the installed release.
"""

import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from client.node.coordinator import UNKNOWN_KEY, knock, sign_off
from client.node.runtime import Runtime
from client.site import Coordinator
from shared import certificates
from shared.errors import ConfigError
from shared.processes import Supervised, family, kill

log = logging.getLogger("moonflower.node")
flower = logging.getLogger("moonflower.node.supernode")

SLOW = 60.0  # seconds between starts while the coordinator refuses the site's key
IGNORED = re.compile(r"Run ID \d+ is not in `RUNNING` status\. Ignoring message (\S+)\.$")  # of which only a part came
ONLINE = "[code: 2004]"  # of an activation: the coordinator still believes an earlier connection of this key
# Errors after which a SuperNode goes on. Any other ends its main thread and leaves the process idle, alive.
HARMLESS = (
    "[/v1/",  # a request to its API that it has refused: whose, does not matter
    "Failed to receive message",
    "Failed to send message",
    "Failed to create task",
    "Failed to start task",
    "Failed to finish task",
    "Cannot record end time",
    "Cannot get processing duration",
    "Start time or end time",
    "Cannot store message",
    "SSL/TLS handshake error detected",
)
ESCAPE = "\x1b"  # begins a colour of Flower's, and must not reach a terminal from elsewhere
LINE = re.compile(r"(?:\x1b\[\d+m)?(DEBUG|INFO|WARNING|ERROR)\s*(?:\x1b\[0m)?\s*:\s*(.*)")


class SuperNode:
    """A supervised `flower-supernode --isolation process`, and the way to its Runtime API.

    Parameters
    ----------
    coordinator : Coordinator
        Address, authority and the site's key.
    insecure : bool
        Plaintext and no key, to a coordinator on this machine.
    """

    def __init__(self, coordinator: Coordinator, *, insecure: bool) -> None:
        self.connected_since: datetime | None = None
        self.trouble = ""  # in one line, while it lasts
        self.starts = 0
        self.dropped: set[str] = set()  # messages whose run ended on their way: no more of them comes
        self.sent = threading.Event()  # set whenever a reply has gone to the coordinator
        self._coordinator, self._insecure = coordinator, insecure
        state = coordinator.state
        self._tls = certificates.loopback(state / "runtime")
        self._secret = secrets.token_bytes(32)
        self._secret_file = state / "runtime" / "secret"
        certificates.write_key(self._secret_file, self._secret)
        self._address = ""
        self._runtime: Runtime | None = None
        self._stuck = ""  # why it must be started again: what it has said leaves it idle, or a reply behind
        self._online = False
        self._ending = False
        self._not_before = 0.0
        self._asks: threading.Thread | None = None
        env = dict(os.environ) | {"FLWR_HOME": str(state / "flower"), "PYTHONUNBUFFERED": "1"}
        env |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        mark = f"node {state.absolute()}"
        kill(family(mark))  # what an earlier node left, if anything outlived it; this one holds the state's lock
        self._last = state / "runtime" / "connection"  # the last one: the node's id, and the machine
        self._process = Supervised("flower-supernode", self._command, env, on_line=self._line, mark=mark)

    @property
    def pid(self) -> int | None:
        """Its process id, or None while there is none."""
        return self._process.pid

    @property
    def runtime(self) -> Runtime:
        """Its Runtime API, which moves with each start."""
        if self._runtime is None:
            self._runtime = Runtime(self._address, self._tls.ca.read_bytes(), self._secret)
        return self._runtime

    def start(self) -> None:
        """Start it."""
        self._sign_off()
        self._process.start()

    def poll(self) -> None:
        """See that it runs: to be called often, in the main thread."""
        if self._stuck and self.pid is not None:
            self.restart(self._stuck)
        if self.pid is None and (time.monotonic() < self._not_before or (self._asks and self._asks.is_alive())):
            return
        code = self._process.poll()
        if code is not None:
            self._asks = threading.Thread(target=self._explain, args=(code,), name="knock", daemon=True)
            self._asks.start()

    def restart(self, reason: str) -> None:
        """End it, so that it is started anew."""
        log.warning("the SuperNode is started again: %s", reason)
        self._stuck = ""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)

    def stop(self, grace: float) -> None:
        """End it for good; it signs off within `grace` seconds."""
        self._ending = True
        self._process.stop(grace)
        self.connected_since = None
        if self._runtime is not None:
            self._runtime.close()

    def _command(self) -> Sequence[str]:
        """Return the command of one start, on a port that is free now."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._address, self._runtime, self._stuck, self._online = f"127.0.0.1:{port}", None, "", False
        self.starts += 1
        self.dropped.clear()
        own = self._coordinator
        command = [program("flower-supernode"), "--superlink", own.address, "--isolation", "process"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--superexec-auth-secret-file", str(self._secret_file)]
        command += ["--ssl-ca-certfile", str(self._tls.ca), "--ssl-certfile", str(self._tls.certificate)]
        command += ["--ssl-keyfile", str(self._tls.key)]
        if self._insecure:
            return [*command, "--insecure"]
        return [*command, "--root-certificates", str(own.ca), "--auth-supernode-private-key", str(own.key)]

    def _line(self, text: str) -> None:
        """Take one line of its output, in the thread that reads them. The coordinator may have a hand in it."""
        text = "".join(letter if letter.isprintable() or letter == ESCAPE else "?" for letter in text)
        found = LINE.match(text)
        level, said = (found[1], found[2]) if found else ("", text)
        flower.debug("%s", text)
        if self._ending:
            return
        if ONLINE in said:
            self._online = True
        elif said.startswith("SuperNode ID:"):
            self._last.write_text(f"{said.partition(':')[2].strip()} {socket.gethostname()}", encoding="utf-8")
            self._connected("connected to the coordinator")
        elif said.startswith("Connection attempt failed"):
            self._lost(f"{self._coordinator.address} does not answer; trying again for as long as it takes.")
        elif said.startswith("Connection successful"):
            self._connected("connected to the coordinator again")
        elif said.startswith("Sent successfully"):
            self.sent.set()
        elif ignored := IGNORED.match(said):
            # Its task is there all the same. The reply to it would be sent in place of the next one, which would then wait
            # for a further message, and the coordinator for it.
            self.dropped.add(ignored[1])
            self._stuck = "the run of a message ended while it was on its way"
        elif said.startswith(("Failed to receive message", "Failed to send message")):
            log.warning("SuperNode: %s", said.replace(ESCAPE, "?"))
        elif (level == "ERROR" and not said.startswith(("Exit Code", *HARMLESS))) or said.startswith(
            "Exception in thread"
        ):
            self._stuck = f"the SuperNode met an error: {said[:200].replace(ESCAPE, '?')}"
            self._lost(self._stuck)

    def _connected(self, text: str) -> None:
        if self.connected_since is None:
            self.connected_since, self.trouble = datetime.now(UTC), ""
            log.info("%s, %s", text, self._coordinator.address)

    def _lost(self, reason: str) -> None:
        if reason != self.trouble:
            log.warning("%s", reason)
        self.connected_since, self.trouble = None, reason

    def _sign_off(self) -> bool:
        """Sign this machine's last connection off, whose SuperNode is gone; return whether it was still believed."""
        try:
            node, machine = self._last.read_text(encoding="utf-8").split()
        except (OSError, ValueError):  # there was none, or its file was cut off
            return False
        own = machine == socket.gethostname() and node.isdecimal() and not self._insecure
        return own and sign_off(self._coordinator, int(node))

    def _explain(self, code: int) -> None:
        """Say in one line why it ended, as far as the coordinator's door tells; in a thread, for that can take seconds."""
        self._not_before = 0.0
        if self._ending:
            return
        if self._sign_off():
            self._lost(f"the SuperNode ended (code {code}) and is started again.")
            return
        if self._online:
            self._lost("the coordinator still believes this site's last connection; it forgets it within a minute.")
            return
        trouble = "" if self._insecure else knock(self._coordinator).trouble
        self._lost(trouble or f"the SuperNode ended (code {code}) and is started again.")
        if trouble == UNKNOWN_KEY:
            self._not_before = time.monotonic() + SLOW


def program(name: str) -> str:
    """Return the path of a command of this environment.

    Raises
    ------
    ConfigError
        Where it is not installed.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name} is not installed beside {sys.executable}; install moonflower with its dependencies.")
    return found
