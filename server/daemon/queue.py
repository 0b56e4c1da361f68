"""The run queue: submitted runs wait in the history, and play one after another, over as many attempts as it takes.

An attempt is one ServerApp, a child of the daemon. One that dies, whatever it died of, is a lost attempt and not a
lost run: the next one goes on after the last committed round. All that must survive is in the history, so that a
daemon that starts anew finds its runs there.
"""

import asyncio
import logging
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.daemon.flower import SuperLinkError
from server.daemon.patience import Patience
from server.daemon.settings import Settings
from server.daemon.superlink import SuperLink, child_log, ending, environment
from server.history.records import Run
from server.history.store import History
from shared.certificates import write_key
from shared.errors import MoonflowerError
from shared.locks import holder
from shared.processes import Child

log = logging.getLogger("moonflower.daemon")
LOOK = 0.5  # seconds between looks at the history
POLL = 0.05  # seconds between looks at a ServerApp
LISTEN = 10.0  # seconds between looks whether the SuperLink still hears a ServerApp
LINGER = 3.0  # seconds that a ServerApp may take to end after its run has
MOST_TRIES = 10  # attempts in a row without a newly committed round, after which the run has failed
FIRST_PAUSE, MOST_PAUSE = 1.0, 60.0  # seconds before the next attempt: doubled with each try that brought nothing
ATTEMPT_LOCK = "attempt.lock"
SAID_WHY = re.compile(r"^[\w.]*(Error|Exception|Killed)\b")


@dataclass
class Play:
    """A run that is under way."""

    run: str
    tries: int = 0  # attempts that ended, in a row, without a newly committed round
    child: Child | None = None  # its ServerApp
    flower_run: int | None = None
    stop: bool = False  # a person asked for it
    ended_at: float | None = None  # time.monotonic(); when its run was seen to be finished
    listened_at: float = 0.0  # time.monotonic()
    unheard: int = 0  # looks in a row at which the SuperLink had ended its Flower run
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=30))  # of its ServerApp
    task: asyncio.Task[None] | None = None


class Queue:
    """Plays runs of origin "daemon", the oldest first, `queue.max_concurrent_runs` at once.

    Parameters
    ----------
    settings : Settings
        Where the runs' folders are, and how many play at once.
    history, patiently
        The open history, and how it is called.
    superlink : SuperLink
        Where runs are entered; while it is down, they wait.
    mark : str
        The family of the daemon's children.
    """

    def __init__(
        self, settings: Settings, history: History, patiently: Patience, superlink: SuperLink, mark: str
    ) -> None:
        self._settings, self._superlink, self._mark = settings, superlink, mark
        self._history, self._patiently = history, patiently
        self._environment = environment(settings.state) | {"MOONFLOWER_DATABASE": settings.history}
        self._plays: dict[str, Play] = {}
        self._waiting = 0

    def status(self) -> dict[str, Any]:
        """Say what plays, and how many runs wait."""
        playing = [
            {"run": play.run, "pid": play.child.pid if play.child else None, "tries": play.tries}
            for play in self._plays.values()
        ]
        return {"playing": playing, "waiting": self._waiting}

    async def work(self) -> None:
        """Play what waits, for ever."""
        while True:
            runs = await self._patiently(self._history.queue)
            self._compare(runs)
            for play in [play for play in self._plays.values() if play.task is not None and play.task.done()]:
                del self._plays[play.run]
                await _result(play)
            for run in runs:
                if len(self._plays) < self._settings.queue.max_concurrent_runs and run.id not in self._plays:
                    play = self._plays[run.id] = Play(run.id, stop=run.stop_requested_at is not None)
                    play.task = asyncio.create_task(self._play(play))
            self._waiting = sum(run.id not in self._plays for run in runs)
            await asyncio.sleep(LOOK)

    async def close(self) -> None:
        """End the ServerApps. Their runs stay as they are, and go on when a daemon starts again."""
        plays, self._plays = list(self._plays.values()), {}
        for play in plays:
            if play.task is not None:
                play.task.cancel()
        await asyncio.gather(*(play.task for play in plays if play.task is not None), return_exceptions=True)
        interrupted = [(play, play.child) for play in plays if play.child is not None]
        for play, child in interrupted:
            await asyncio.to_thread(child.stop, 0)
            self._token_file(play).unlink(missing_ok=True)
            log.info("run %s: interrupted; it goes on when the daemon starts again", play.run)
        for play, _ in interrupted:
            await self._close_attempt(play, "lost", "the coordinator was shut down")

    def _compare(self, runs: list[Run]) -> None:
        """See which of the runs under way were asked to stop, or have ended."""
        unfinished = {run.id: run for run in runs}
        for play in self._plays.values():
            run = unfinished.get(play.run)
            if run is None:
                play.ended_at = play.ended_at or time.monotonic()
            elif run.stop_requested_at is not None:
                play.stop = True

    async def _play(self, play: Play) -> None:
        """Make attempts until the run is finished."""
        while True:
            await self._superlink.up.wait()
            before = await self._patiently(self._history.run, play.run)
            if before.finished_at is not None:
                return
            if play.stop:
                await self._finish(play, "stopped", "stopped by request")
                return
            reason = await self._attempt(play)
            after = await self._patiently(self._history.run, play.run)
            if after.finished_at is not None:
                log.info("run %s: %s", play.run, after.status)
                return
            if play.stop:
                continue
            play.tries = 0 if after.rounds_done > before.rounds_done else play.tries + 1
            if play.tries >= MOST_TRIES:
                text = f"{MOST_TRIES} attempts in a row brought no new round; the last one ended with: {reason}"
                await self._finish(play, "failed", text)
                return
            pause = min(FIRST_PAUSE * 2 ** (play.tries - 1), MOST_PAUSE) if play.tries else 0.0
            log.warning("run %s: attempt lost (%s); the next one starts in %.0f s", play.run, reason, pause)
            await asyncio.sleep(pause)

    async def _attempt(self, play: Play) -> str:
        """Start a ServerApp and see it end; return why it did, as far as can be told."""
        ends = self._superlink.ends
        attempts = len(await self._patiently(self._history.attempts, play.run))
        play.last_lines.clear()
        play.ended_at, play.listened_at, play.unheard = None, time.monotonic(), 0
        try:
            await self._start(play)
        except (MoonflowerError, OSError) as error:
            return str(error)
        child = play.child
        if child is None:
            raise RuntimeError("no ServerApp was started")
        why = ""
        while (code := child.poll()) is None:
            if self._superlink.ends != ends:
                why = "the SuperLink ended"
            elif play.stop:
                why = "stopped by request"
            elif play.ended_at is not None and time.monotonic() - play.ended_at > LINGER:
                why = "it did not end after its run"
            elif await self._unheard(play):
                why = "it hung: the SuperLink has heard no more of it"
            if why:
                break
            await asyncio.sleep(POLL)
        code = await asyncio.to_thread(child.stop, 0)
        play.child = None
        self._token_file(play).unlink(missing_ok=True)
        if code < 0 and play.flower_run is not None:  # otherwise it has said itself that it ended
            await asyncio.to_thread(self._superlink.flower.stop, play.flower_run)
        why = why or f"its process ended by {ending(code)}"
        if code > 0:
            why += f": {_last_word(play)}"
        if len(await self._patiently(self._history.attempts, play.run)) == attempts and not play.stop:
            text = f"An attempt ended before it began: {why}."
            await self._patiently(self._history.add_event, play.run, "warning", text)
        else:
            await self._close_attempt(play, "stopped" if play.stop else "lost", why)
        return why

    async def _unheard(self, play: Play) -> bool:
        """Whether the SuperLink has ended the Flower run of a ServerApp that lives: it beats no more."""
        if time.monotonic() - play.listened_at < LISTEN:
            return False
        try:
            unfinished = await asyncio.to_thread(self._superlink.flower.unfinished)
        except SuperLinkError:
            return False
        finally:
            play.listened_at = time.monotonic()
        play.unheard = 0 if play.flower_run in unfinished else play.unheard + 1
        return play.unheard > 1  # once is one that is just ending

    async def _start(self, play: Play) -> None:
        lock = self._settings.run(play.run) / ATTEMPT_LOCK
        if (pid := holder(lock)) is not None:
            raise SuperLinkError(f"{lock} is held by process {pid}, which is not this daemon's; end it.")
        started = await asyncio.to_thread(self._superlink.flower.start, self._settings.run(play.run))
        play.flower_run = started.id
        token = self._token_file(play)
        write_key(token, started.token.encode())
        command = ["flwr-serverapp", "--runtime-api-address", self._superlink.address, "--token-file", str(token)]
        ca = self._superlink.ca
        command += ["--insecure"] if ca is None else ["--root-certificates", str(ca)]
        play.child = Child(
            f"ServerApp of {play.run}",
            command,
            self._environment,
            on_line=_both(play.last_lines.append, child_log("serverapp", play.run)),
            mark=f"{self._mark}#run {play.run}",
        )
        log.info("run %s: a ServerApp is started (process %d)", play.run, play.child.pid)

    async def _close_attempt(self, play: Play, outcome: Any, why: str) -> None:
        """Close the attempt that the ServerApp left open, if it did."""
        attempts = await self._patiently(self._history.attempts, play.run)
        if attempts and attempts[-1].ended_at is None:
            await self._patiently(self._history.end_attempt, play.run, attempts[-1].number, outcome, why)

    async def _finish(self, play: Play, status: Any, text: str) -> None:
        await self._close_attempt(play, "stopped" if status == "stopped" else "failed", text)
        await self._patiently(self._history.finish_run, play.run, status)
        level: Any = "error" if status == "failed" else "info"
        await self._patiently(self._history.add_event, play.run, level, f"The run {status}: {text}.")
        log.info("run %s: %s (%s)", play.run, status, text)

    def _token_file(self, play: Play) -> Path:
        return self._settings.state / "inner" / f"{play.run}.token"


def _both(first: Callable[[str], None], second: Callable[[str], None]) -> Callable[[str], None]:
    def take(line: str) -> None:
        first(line)
        second(line)

    return take


def _last_word(play: Play) -> str:
    """Return the line in which the ServerApp said why it ended, or its last one."""
    lines = [line.strip() for line in play.last_lines if line.strip()]
    return next((line for line in reversed(lines) if SAID_WHY.match(line)), lines[-1] if lines else "no word")


async def _result(play: Play) -> None:
    if play.task is not None:
        await play.task
