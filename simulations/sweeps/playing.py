"""Play a sweep's runs: so many processes at once, each of which dies with this one, however that ends.

What is done is known from the history alone. A run that was begun is resumed after its last committed round, by a process
that holds its lock; a run that fails leaves the others as they are.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals

from server.history.store import History
from shared.processes import Child
from simulations.sweeps import places
from simulations.sweeps.plan import Place, Plan

GRACE = 15.0  # seconds for a run to close its attempt when it is told to stop
LOOK = 0.1  # seconds between two looks at the processes
KEPT = 20  # of a run's last lines, in memory


@dataclass
class Playing:
    """A run's process."""

    place: Place
    child: Child
    lines: deque[str] = field(repr=False)
    gpu: int | None

    def reason(self, code: int) -> str:
        """Say why it ended with this code."""
        if code == -Signals.SIGKILL:
            return "its process was killed (SIGKILL): where memory ran out, give fewer --jobs."
        if code < 0:
            return f"its process ended by {Signals(-code).name}."
        said = [line for line in self.lines if line.strip()]
        last = next((line for line in reversed(said) if line.startswith("Error: ")), said[-1] if said else "")
        return last.removeprefix("Error: ") or f"its process ended with code {code}."


Watch = Callable[[Place, str | None], None]  # of a run that has ended: its place, and why it failed


class Sweeping:
    """A sweep in progress. `failed` says of each run that failed why."""

    def __init__(self, sweep: str, plan: Plan, history: History, jobs: int) -> None:
        self._sweep, self._history, self._jobs = sweep, history, jobs
        done = completed(history, sweep)
        self._waiting = deque(place for place in plan.places if place not in done)
        self._running: list[Playing] = []
        # Runs take the GPUs in turn; one that is named is the same for all.
        self._gpus = list(places.gpus(plan.device)) if plan.device == "auto" else []
        self.failed: dict[Place, str] = {}
        threads = max(1, places.cores() // jobs)
        given = os.environ.get("OMP_NUM_THREADS", "")
        self._environment = dict(os.environ) | {
            "MOONFLOWER_DATABASE": history.url,
            "OMP_NUM_THREADS": str(min(threads, int(given)) if given.isdigit() and int(given) else threads),
            "PYTHONUNBUFFERED": "1",
        }

    @property
    def running(self) -> list[Place]:
        """The runs that are under way."""
        return [each.place for each in self._running]

    def play(self, watch: Watch, look: Callable[[], None]) -> None:
        """Play all that is left. `watch` is told of each run that ends; `look` is called often meanwhile.

        Call it in the main thread: the processes die with the thread that starts them. An interrupt ends them all first.
        """
        try:
            while self._waiting or self._running:
                while self._waiting and len(self._running) < self._jobs:
                    self._running.append(self._start(self._waiting.popleft()))
                for each in list(self._running):
                    code = each.child.poll()
                    if code is not None:
                        self._ended(each, code, watch)
                look()
                time.sleep(LOOK)
        finally:
            self.stop()

    def stop(self) -> None:
        """End the runs that are under way, all at once: each closes its attempt, and can be resumed."""
        running, self._running = self._running, []
        if running:
            with ThreadPoolExecutor(len(running)) as pool:
                list(pool.map(lambda each: each.child.stop(GRACE), running))

    def _start(self, place: Place) -> Playing:
        lines = deque[str](maxlen=KEPT)
        log = places.folder(self._sweep) / f"{place[0]}-{place[1]}.log"
        command = [sys.executable, "-P", "-m", "simulations.sweeps.trial", self._sweep, *map(str, place)]
        gpu = min(self._gpus, key=lambda each: sum(run.gpu == each for run in self._running), default=None)
        environment = self._environment | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
        child = Child(f"cell {place[0]}, seed {place[1]}", command, environment, on_line=_writer(log, lines))
        return Playing(place, child, lines, gpu)

    def _ended(self, playing: Playing, code: int, watch: Watch) -> None:
        playing.child.stop(0)  # what it left running, and its last lines
        self._running.remove(playing)
        if code != 0:
            self.failed[playing.place] = playing.reason(code)
        watch(playing.place, self.failed.get(playing.place))


def completed(history: History, sweep: str) -> Mapping[Place, str]:
    """Give the runs of a sweep that are completed, by their places."""
    return {
        (run.trial.cell, run.trial.seed): run.id
        for run in history.trials(sweep)
        if run.trial is not None and run.status == "completed"
    }


def _writer(log: Path, lines: deque[str]) -> Callable[[str], None]:
    """Keep a run's last lines, and write all to its log."""

    def write(line: str) -> None:
        lines.append(line)
        with log.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    return write
