"""What a person sees while a sweep runs: how many runs are done, how far those under way are, and a line a run that ends."""

import time
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from server.history.records import Run
from server.history.store import History
from server.listing import clean
from server.report import words
from simulations.sweeps.plan import Place, Plan
from simulations.sweeps.playing import Sweeping, completed

PERIOD = 1.0  # seconds between two looks into the history


class Watching:
    """A context manager that draws on a terminal; where there is none, only the lines are printed."""

    def __init__(self, console: Console, history: History, sweep: str, plan: Plan, sweeping: Sweeping) -> None:
        self._console, self._history, self._sweep, self._sweeping = console, history, sweep, sweeping
        self._names = {cell.number: cell.name for cell in plan.cells}
        self._runs = len(plan.places)
        self._done = len(completed(history, sweep))
        self._rows = dict[Place, TaskID]()
        self._looked = 0.0
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._all = self._progress.add_task("runs", total=self._runs, completed=self._done)

    def __enter__(self) -> Self:
        left = self._runs - self._done
        said = f"{self._sweep}: {words.count(self._runs, 'run')}" + (
            f", {self._done} done already" if self._done else ""
        )
        self._console.print(Text(clean(said if left else f"{said}; nothing is left to run")), soft_wrap=True)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def look(self) -> None:
        """Move the bars of the runs that are under way."""
        if not self._console.is_terminal or time.monotonic() - self._looked < PERIOD:
            return
        self._looked = time.monotonic()
        runs = {(run.trial.cell, run.trial.seed): run for run in self._history.trials(self._sweep) if run.trial}
        running = self._sweeping.running
        for place in [place for place in self._rows if place not in running]:
            self._progress.remove_task(self._rows.pop(place))
        for place in running:
            if place not in self._rows:
                self._rows[place] = self._progress.add_task(self._name(place), total=None)
            self._move(self._rows[place], runs.get(place))

    def ended(self, place: Place, error: str | None) -> None:
        """Say that a run has ended, and how."""
        self._done += error is None
        self._progress.update(self._all, completed=self._done)
        said = (
            f"{self._done} of {self._runs} done: {self._name(place)}"
            if error is None
            else f"{self._name(place)} failed: {error}"
        )
        self._console.print(Text(clean(said), style="" if error is None else "yellow"), soft_wrap=True)

    def counted(self) -> str:
        """Say how far it got."""
        return f"{len(completed(self._history, self._sweep))} of {self._runs} runs are done"

    def _move(self, row: TaskID, run: Run | None) -> None:
        if run is not None:
            self._progress.update(row, total=run.rounds_planned, completed=run.rounds_done)

    def _name(self, place: Place) -> str:
        return f"cell {place[0]} ({self._names[place[0]]}), seed {place[1]}"
