"""The warm process that does a site's work: it holds model, tokenised records and the device between messages.

`Worker` is the node's end of it, `main` the process. One message at a time goes down a socket and one reply comes
back. The process can die (out of memory, a kill) without the node: the socket ends, and the node knows at once.
"""

import argparse
import ctypes
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared import logs
from shared.errors import MoonflowerError, let_interrupts_through

if TYPE_CHECKING:
    from flwr.app import Message

    from client.node.runtime import Envelope, Sealed

log = logging.getLogger("moonflower.node")
BACKOFF = (0.5, 60.0)  # seconds between starts of a worker that does not come up
STEADY = 60.0  # seconds after which an earlier failure is forgotten
PR_SET_PDEATHSIG = 1
PROGRAM = (
    "from client.node.worker import main; main()"  # run with -P, so that no file of the folder it starts in is imported
)


@dataclass(frozen=True)
class Began:
    """What the worker read of a request, before it answers it: all of it is the coordinator's word."""

    kind: str
    run: str
    round: int
    deadline: float | None  # seconds, of the run's configuration


@dataclass(frozen=True)
class Done:
    """A reply, and in words what it is: "ok", or a refusal's outcome and reason."""

    reply: "Sealed"
    outcome: str
    reason: str = ""


class WorkerDiedError(MoonflowerError):
    """The worker process ended while it was wanted."""


class Worker:
    """The node's end of the worker: start it, hand it one message, take its reply, end it.

    Parameters
    ----------
    config : Path
        The site.toml, which the process reads anew for each message.
    device : str | None
        Instead of the one that site.toml names.
    log_format : logs.Format
        How the process logs; it writes to this process's standard error.
    """

    def __init__(self, config: Path, device: str | None, log_format: logs.Format) -> None:
        self.starts = 0
        self.ready = False  # it has loaded what every message needs
        self._command = [sys.executable, "-P", "-c", PROGRAM, "--config", str(config)]
        self._command += ["--log-format", log_format, *(["--device", device] if device else [])]
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._started_at = self._restart_at = 0.0
        self._delay = BACKOFF[0]

    @property
    def pid(self) -> int | None:
        """The process's id, or None while there is none."""
        return self._process.pid if self._process else None

    @property
    def failing(self) -> bool:
        """Whether it died before it was ready, the last time, so that waiting for it may be waiting for ever."""
        return self._process is None and self._delay > BACKOFF[0]

    def start(self) -> None:
        """Start the process. To be called in the main thread: it dies with the thread that started it."""
        own, its = socket.socketpair()
        with its:
            self._process = subprocess.Popen(  # noqa: S603 - our own
                [*self._command, "--socket", str(its.fileno()), "--parent", str(os.getpid())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt at the terminal is the node's to handle
            )
        self._pipe = Connection(own.detach())
        self.starts, self.ready, self._started_at = self.starts + 1, False, time.monotonic()

    def poll(self) -> int | None:
        """Return the exit code once after the process has ended, and start it again when its time has come.

        To be called often, in the main thread, while no message is with it.
        """
        if self._process is None:
            if time.monotonic() >= self._restart_at:
                try:
                    self.start()
                except OSError as error:  # no memory for a process, say
                    log.error("the worker cannot be started: %s", error)
                    self._back_off()
            return None
        if not self.ready and self._pipe and self._pipe.poll():
            with suppress(EOFError, OSError):
                self.ready = self._pipe.recv() == "ready"
        if self._process.poll() is None:
            return None
        return self._ended()

    def answer(self, envelope: "Envelope", tick: Callable[["Began | None"], None]) -> Done:
        """Hand over a message and wait for its reply.

        Parameters
        ----------
        envelope : Envelope
            The message; the worker must be ready.
        tick : Callable[[Began | None], None]
            Called several times a second with what the worker has said of the request; what it raises ends the wait.

        Raises
        ------
        WorkerDiedError
            Where the process has ended; `poll` will start it again.
        """
        if self._pipe is None or self._process is None:
            raise WorkerDiedError("the worker is not there.")
        began: Began | None = None
        # In a thread of its own, for a worker that hangs takes nothing; one that is ended ends it too.
        threading.Thread(target=_send, args=(self._pipe, envelope), name="to the worker", daemon=True).start()
        while True:
            try:
                said = self._pipe.recv() if self._pipe.poll(0.1) else None
            except (EOFError, OSError):
                self._process.kill()  # if it has only closed its end, it is of no more use
                raise WorkerDiedError(f"the worker {how(self._ended())}.") from None
            if isinstance(said, Done):
                return said
            began = said or began
            tick(began)

    def end(self) -> None:
        """End the process at once; its ledger is written before anything is sent, so that nothing is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._ended()

    def _ended(self) -> int:
        assert self._process is not None  # noqa: S101 - who calls has looked
        code = self._process.wait()
        if self._pipe is not None:
            self._pipe.close()
        if self.ready or time.monotonic() - self._started_at > STEADY:
            self._delay = BACKOFF[0]
            self._restart_at = 0.0
        else:
            self._back_off()
        self._process, self._pipe, self.ready = None, None, False
        return code

    def _back_off(self) -> None:
        self._restart_at = time.monotonic() + self._delay
        self._delay = min(2 * self._delay, BACKOFF[1])


def _send(pipe: Connection, envelope: "Envelope") -> None:
    with suppress(OSError):  # who waits for the reply sees that the worker has ended
        pipe.send(envelope)


def how(code: int) -> str:
    """Say how a process ended."""
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL; where nobody did, the machine was out of memory)"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def main() -> None:
    """Be the worker: read messages from the socket and answer them, until it ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--device")
    parser.add_argument("--log-format", default="text")
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != options.parent:  # it ended before it could be watched
        sys.exit(1)
    logs.setup(options.log_format)
    with Connection(options.socket) as pipe:
        serve(pipe, options.config, options.device)


def serve(pipe: Connection, config: Path, device: str | None) -> None:
    """Answer each envelope that comes with `Began`, where the request can be read, and `Done`."""
    from client import site
    from client.app import build
    from client.node import runtime

    name = site.load(config, device).name
    app = build(lambda _: site.load(config, device))
    pipe.send("ready")
    while True:
        try:
            envelope: Envelope = pipe.recv()
        except EOFError:
            return
        try:
            message, context = runtime.unseal(envelope)
            pipe.send(_began(message))
            done = _done(app(message, context))
        except Exception as error:  # what came is no message, or of no kind that is answered
            let_interrupts_through(error)
            log.exception("a message could not be read")
            done = failed(envelope, name, "the site cannot read the message; its own log says why.")
        pipe.send(done)
        del envelope, done


def failed(envelope: "Envelope", site: str, reason: str) -> Done:
    """Make the reply that says that a request was not answered. `reason` leaves the site: it rests on nothing private."""
    from flwr.app import Message

    from client.node import runtime
    from shared.messages import Refusal, to_record

    return _done(Message(to_record(Refusal(site, "failed", reason)), reply_to=runtime.header(envelope)))


def _done(reply: "Message") -> Done:
    from client.node import runtime
    from shared.messages import Refusal

    values: Any = reply.content["values"]  # not by config_records: its view keeps the whole message
    if values["message"] != Refusal.__name__:
        return Done(runtime.seal(reply), "ok")
    return Done(runtime.seal(reply), str(values["outcome"]), str(values["reason"]))


def _began(message: "Message") -> Began:
    """Read what a request says of itself, as far as it can be read: for the status, and to know when to give up."""
    from client.answers import RUN
    from shared.messages import FLOWER_TYPES

    values: Any = message.content.get("values", {})
    deadline: float | None = None
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        deadline = float(json.loads(values["config"])["federation"]["deadline"])
    number = values.get("round", 0)
    run = values.get("run")
    kinds: dict[str, str] = {sent: kind for kind, sent in FLOWER_TYPES.items()}
    return Began(
        kinds.get(message.metadata.message_type, "unknown"),
        run if isinstance(run, str) and RUN.fullmatch(run) else "?",
        number if type(number) is int else 0,
        deadline,
    )
