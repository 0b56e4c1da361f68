"""`moonflower client start`: one process that keeps a site connected, and answers what it is asked.

It keeps two children running: Flower's SuperNode, which holds the connection, and the worker, which holds model and
data. Between them it carries one message at a time: task from the SuperNode's Runtime API, answer from the worker,
reply back. Whatever happens to a request, a reply goes out: a SuperNode whose task has none waits for ever.
"""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from client import site as sites
from client.node import status as statuses
from client.node.runtime import Envelope, RuntimeApiError, Task
from client.node.status import Answered, Status
from client.node.supernode import SuperNode
from client.node.worker import Began, Done, Worker, WorkerDiedError, failed
from client.site import Coordinator, Site
from shared import locks, logs
from shared.errors import ConfigError

log = logging.getLogger("moonflower.node")

POLL = 0.1  # seconds between looks for a task: what a message waits, on the average, is half of it
STALE = 0.5  # seconds between looks at what the status file says
READING = 120.0  # seconds for a worker to read a request, and to refuse one that names no deadline
PATIENCE = 2.0  # times the run's deadline: a slow answer is kept for a retry, one that never comes is not
FAREWELL = 2.5  # seconds for the last reply to go to the coordinator
GRACE = 5.0  # seconds for the SuperNode to sign off

DIED = "the site's worker process died while it was at work and is started again; the site's own log says more."
HUNG = "the site's worker did not answer within {limit:g} s and was ended; the site's own log says more."
BROKEN = "the site's worker process does not start; the site's own log says why."
STOPPED = "the site's node was stopped while it was at work; ask again when it is back."


class _StopError(Exception):
    """The node is to stop."""


class _HungError(Exception):
    """The worker has had its time."""


class Node:
    """A site's node; `run` is its life.

    Parameters
    ----------
    config : Path
        The site.toml, with its [coordinator].
    device : str | None
        Instead of the one that site.toml names.
    log_format : logs.Format
        How the worker logs.
    insecure : bool
        Plaintext without a key; only to a coordinator on this machine.
    """

    def __init__(self, config: Path, device: str | None, log_format: logs.Format, *, insecure: bool) -> None:
        self.site = sites.load(config, device)
        self.coordinator = connection(self.site, config)
        check_address(self.coordinator, insecure=insecure)
        self._config, self._device, self._log_format, self._insecure = config, device, log_format, insecure
        self._stopping = False
        self._written: tuple[object, ...] = ()
        self._looked = 0.0

    def run(self) -> None:
        """Keep the site connected and answer, until SIGTERM or SIGINT.

        Raises
        ------
        ConfigError
            Where another node holds the state folder, or a setting is wrong.
        """
        state = self.coordinator.state
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"[coordinator] state={state} cannot be made: {error.strerror}.") from None
        with locks.hold(state / "node.lock", f"the state folder {state}"), self._signals():
            self._supernode = SuperNode(self.coordinator, insecure=self._insecure)
            self._worker = Worker(self._config, self._device, self._log_format)
            self._status = Status(
                self.site.name,
                self.site.dataset.id,
                self.coordinator.name,
                self.coordinator.address,
                os.getpid(),
                _now(),
            )
            log.info("site %s: connecting to %s", self.site.name, self.coordinator.address)
            try:
                self._supernode.start()
                self._worker.start()
                self._serve()
            finally:
                self._supernode.stop(GRACE)
                self._worker.end()
                self._say()
        log.info("stopped")

    def _serve(self) -> None:
        while not self._stopping:
            self._look()
            code = self._worker.poll()
            if code is not None:
                self._status.last_error = f"{_now()} the worker ended with code {code}"
                log.error("the worker ended with code %d and is started again", code)
            task = self._acquire() if self._worker.ready or self._worker.failing else None
            if task is None:
                time.sleep(POLL)
                continue
            start, self._status.task = self._supernode.starts, None
            with task.alive():
                try:
                    self._carry(task)
                except RuntimeApiError as error:
                    self._fault(
                        f"a reply was not delivered: {error} What it released is kept for the next time it is asked."
                    )
                    if self._supernode.starts == start:  # it waits for a reply that it will not get
                        self._supernode.restart("it has a task without a reply")
                except _StopError:
                    log.info("stopping in the middle of a message that had not come")
                except Exception:  # whatever it is, the next request is another
                    log.exception("a request was not answered")
                    self._fault("a request was not answered; the log says why.")
                    self._supernode.restart("it has a task without a reply")
            self._status.task = None

    def _acquire(self) -> Task | None:
        try:
            return self._supernode.runtime.acquire()
        except RuntimeApiError as error:
            if error.status is not None:  # it is there, and does not want us
                self._fault(str(error))
                self._supernode.restart(str(error))
            return None

    def _carry(self, task: Task) -> None:
        """Carry one task from the SuperNode to the worker and its reply back."""
        began_at = time.monotonic()
        self._supernode.sent.clear()
        envelope = task.pull(self._tick, self._supernode.dropped)
        if envelope is None:
            task.finish(ok=False)
            return
        done = self._answer(envelope)
        task.push(done.reply, ok=done.outcome == "ok")
        self._answered(done, time.monotonic() - began_at)
        if self._stopping:
            self._supernode.sent.wait(FAREWELL)

    def _answer(self, envelope: Envelope) -> Done:
        """Have the worker answer; where it cannot, say so in its place."""
        given_at = time.monotonic()

        def tick(began: Began | None) -> None:
            if began is not None and self._status.task is None:
                self._status.task = {"kind": began.kind, "run": began.run, "round": began.round, "since": _now()}
                self._say()
                log.info("%s of run %s, round %d", began.kind, began.run, began.round)
            self._tick()
            limit = PATIENCE * began.deadline if began is not None and began.deadline else READING
            if time.monotonic() - given_at > limit:
                raise _HungError(limit)

        try:
            return self._worker.answer(envelope, tick)
        except WorkerDiedError as error:
            self._fault(str(error))
            return failed(envelope, self.site.name, BROKEN if self._worker.failing else DIED)
        except _HungError as error:
            self._worker.end()
            reason = HUNG.format(limit=error.args[0])
            self._fault(reason)
            return failed(envelope, self.site.name, reason)
        except _StopError:
            self._worker.end()
            return failed(envelope, self.site.name, STOPPED)

    def _tick(self) -> None:
        if self._stopping:
            raise _StopError
        self._look()

    def _look(self) -> None:
        """See to the SuperNode, and keep the status file true."""
        self._supernode.poll()
        if time.monotonic() - self._looked >= STALE:
            self._looked = time.monotonic()
            self._say()

    def _answered(self, done: Done, seconds: float) -> None:
        task = self._status.task or {"kind": "unread", "run": "", "round": 0}
        answered = Answered(
            _now(), task["run"], task["round"], task["kind"], done.outcome, done.reason, round(seconds, 3)
        )
        log.info(
            "%s of run %s, round %d: %s after %.1f s", task["kind"], task["run"], task["round"], done.outcome, seconds
        )
        self._status.task = None
        self._status.answered += 1
        self._status.last_answers = [*self._status.last_answers, answered][-statuses.KEPT :]
        self._say()

    def _fault(self, text: str) -> None:
        log.error("%s", text)
        self._status.last_error = f"{_now()} {text}"

    def _say(self) -> None:
        """Write the status where it has changed."""
        status, since = self._status, self._supernode.connected_since
        status.connected_since = since.isoformat(timespec="seconds") if since else None
        status.trouble = self._supernode.trouble
        status.worker = {"pid": self._worker.pid, "ready": self._worker.ready, "starts": self._worker.starts}
        status.supernode = {"pid": self._supernode.pid, "starts": self._supernode.starts}
        key = (repr(status),)
        if key == self._written:
            return
        try:
            statuses.write(self.coordinator.state, status)
        except OSError as error:  # a full disk stops no node; the ledger's own writes are another matter
            log.error("the status cannot be written: %s", error)
        self._written = key

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a handler's arguments
            self._stopping = True

        kept = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)


def connection(site: Site, config: Path) -> Coordinator:
    """Return how a site is connected.

    Raises
    ------
    ConfigError
        Where its site.toml does not say.
    """
    if site.coordinator is None:
        raise ConfigError(
            f"{config} has no [coordinator]; put name, address, ca, key and state there, as the kit's has them."
        )
    return site.coordinator


def check_address(coordinator: Coordinator, *, insecure: bool) -> None:
    """Refuse plaintext to another machine, and files that are not there.

    Raises
    ------
    ConfigError
        Naming the setting.
    """
    from client.node.coordinator import private_key, trust

    if insecure:
        host = coordinator.address.rpartition(":")[0]
        if host not in ("localhost", "127.0.0.1", "[::1]"):
            raise ConfigError(
                f"[coordinator] address={coordinator.address!r} is not this machine; --insecure is plaintext, for trying things out on one."
            )
        return
    trust(coordinator.ca)
    private_key(coordinator.key)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
