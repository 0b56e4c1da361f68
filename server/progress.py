"""Writes what happens in a run into the history, for whoever watches it from elsewhere.

Best effort, and no part of the record: a thread writes, so that a slow or absent database holds no round up,
and what it cannot write is dropped.
"""

import logging
import queue
import threading
from typing import Self

from server.history.records import Kind, Outcome, ProgressKind, Round, Run
from server.history.store import History
from server.observer import summary
from shared.errors import DatabaseError
from shared.messages import JoinReply

log = logging.getLogger("moonflower.run")

WAITING = 1000  # lines that wait for the database; more are dropped
FAREWELL = 5.0  # seconds that the last lines get when the run ends
Line = tuple[int, ProgressKind, str | list[str] | None, str, str | None]  # round, kind, site or sites, state, text


class Progress:
    """An observer of one run; a context manager, whose end writes what still waits."""

    def __init__(self, history: History, run: str) -> None:
        self._history, self._run = history, run
        self._lines: queue.Queue[Line | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._write, name="moonflower-progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._lines.put(None, timeout=FAREWELL)
        except queue.Full:
            return
        self._thread.join(FAREWELL)

    def run_started(self, run: Run, sites: list[JoinReply]) -> None:
        """Tell who takes part."""
        names = ", ".join(site.site for site in sites)
        self._tell(run.rounds_done, "run", None, "joined", f"{len(sites)} sites: {names}")

    def round_started(self, number: int, phase: str) -> None:
        """Tell that it began, and in which phase."""
        self._tell(number, "round", None, "started", phase)

    def asked(self, number: int, kind: Kind, sites: list[str]) -> None:
        """Tell who works now."""
        self._tell(number, kind, sites, "asked", None)

    def answered(self, number: int, kind: Kind, site: str, outcome: Outcome, error: str | None) -> None:
        """Tell how it ended for this site."""
        self._tell(number, kind, site, outcome, error)

    def late(self, number: int, kind: Kind, site: str, text: str) -> None:
        """Tell whose answer was dropped."""
        self._tell(number, kind, site, "late", text)

    def round_finished(self, done: Round) -> None:
        """Tell its scores."""
        self._tell(done.number, "round", None, "committed", f"{summary(done)}, {done.seconds:.1f} s".lstrip(", "))

    def _tell(
        self, number: int, kind: ProgressKind, site: str | list[str] | None, state: str, text: str | None
    ) -> None:
        try:
            self._lines.put_nowait((number, kind, site, state, text))
        except queue.Full:
            log.debug("progress of round %d dropped: the database is behind", number)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._history.add_progress(self._run, *line)
            except DatabaseError as error:
                log.debug("progress of round %d dropped: %s", line[0], error)
