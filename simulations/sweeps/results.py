"""What a sweep came to: each cell's score as a mean over its seeds, with the interval that so few of them leave.

The interval is Student's t at 95 %: of n scores with mean m and standard deviation s (over n - 1), m ± t s / sqrt(n), t being
the 97.5 % point of n - 1 degrees of freedom. It is over initial weights, who takes part, sampling and noise; not over data.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
from scipy import stats

from server.export.choice import DOWNWARDS
from server.history.records import Metric, Run
from server.history.store import History
from shared.errors import ConfigError
from shared.score_names import telling, title
from simulations.sweeps.plan import Cell, Place, Plan

LEVEL = 0.95
Scope = Literal["test", "validation"]
NOT_RUN = "not run"


@dataclass(frozen=True)
class Score:
    """By which score runs are compared: of the public test set, or of all sites' released validation histograms."""

    scope: Scope
    name: str

    @classmethod
    def read(cls, text: str) -> "Score":
        """Read `--metric`: a score's name, of the public test set unless `validation/` stands before it."""
        scope, slash, name = text.rpartition("/")
        return cls("validation", name) if slash and scope == "validation" else cls("test", text)

    @property
    def title(self) -> str:
        """What it is called."""
        return title(self.name) if self.scope == "test" else f"validation {title(self.name)}"

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return -1 if self.name in DOWNWARDS else 1


@dataclass(frozen=True)
class Trial:
    """One run of a cell. `value` is its score after its last round; only a completed run has one."""

    seed: int
    run: str | None
    status: str
    value: float | None
    epsilon: float | None  # the largest of any site and part
    rounds: int
    seconds: float  # of its committed rounds
    error: str | None
    course: Mapping[int, float]  # the score by round


@dataclass(frozen=True)
class Row:
    """A cell's runs, and what they come to."""

    cell: Cell
    trials: tuple[Trial, ...]

    @property
    def values(self) -> list[float]:
        """Its completed runs' scores."""
        return [trial.value for trial in self.trials if trial.value is not None]

    @property
    def mean(self) -> float | None:
        """Their mean; None where there is none."""
        return float(np.mean(self.values)) if self.values else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the mean over all seeds may lie; None below two scores."""
        return interval(self.values)

    @property
    def epsilon(self) -> float | None:
        """The largest that any of its runs spent."""
        return max((trial.epsilon for trial in self.trials if trial.epsilon is not None), default=None)

    @property
    def rounds(self) -> int:
        """The most rounds that any of its runs has done."""
        return max((trial.rounds for trial in self.trials), default=0)

    @property
    def seconds(self) -> float | None:
        """Mean over its completed runs; None where there is none."""
        took = [trial.seconds for trial in self.trials if trial.status == "completed"]
        return float(np.mean(took)) if took else None

    @property
    def completed(self) -> int:
        """How many of its runs are completed."""
        return sum(trial.status == "completed" for trial in self.trials)

    @property
    def faults(self) -> list[tuple[str, list[int]]]:
        """Why runs failed, and the seeds of each reason."""
        failed = sorted((trial.error, trial.seed) for trial in self.trials if trial.error)
        return [(error, [seed for _, seed in pairs]) for error, pairs in groupby(failed, key=lambda pair: pair[0])]


@dataclass(frozen=True)
class Results:
    """All rows of a sweep, by cell, and the score that they are compared by; None where nothing is scored yet."""

    sweep: str
    plan: Plan
    score: Score | None
    rows: tuple[Row, ...]

    @property
    def completed(self) -> int:
        """How many runs are completed."""
        return sum(row.completed for row in self.rows)

    @property
    def best(self) -> tuple[Row, Trial] | None:
        """The cell with the best mean, and the best of its runs; of equal ones the first."""
        score = self.score
        scored = [row for row in self.rows if row.mean is not None and math.isfinite(row.mean)]
        if score is None or not scored:
            return None
        row = max(scored, key=lambda each: score.sign * (each.mean or 0.0))
        held = [trial for trial in row.trials if trial.value is not None]
        return row, max(held, key=lambda each: score.sign * (each.value or 0.0))

    @property
    def rivals(self) -> list[Row]:
        """The cells whose interval overlaps the best one's: chance may have chosen between them."""
        if self.best is None or (best := self.best[0]).interval is None:
            return []
        low, high = best.interval
        others = [row for row in self.rows if row is not best]
        return [row for row in others if row.interval and row.interval[0] <= high and low <= row.interval[1]]


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Give Student's t interval of a mean; None below two values."""
    if len(values) < 2:
        return None
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * spread / math.sqrt(len(values))
    return mean - half, mean + half


def read(history: History, sweep: str, plan: Plan, asked: str | None, failed: Mapping[Place, str]) -> Results:
    """Read a sweep from the history; `failed` says why runs failed that never got there.

    Raises
    ------
    ConfigError
        Where runs have scores, and none is called as `asked`.
    """
    runs = {(run.trial.cell, run.trial.seed): run for run in history.trials(sweep) if run.trial is not None}
    scores = {run.id: [each for each in history.metrics(run.id) if each[1].site is None] for run in runs.values()}
    score = _choose(scores.values(), asked)
    rows = []
    for cell in plan.cells:
        trials = []
        for seed in plan.seeds:
            run, reason = runs.get((cell.number, seed)), failed.get((cell.number, seed))
            if run is None:
                status = NOT_RUN if reason is None else "failed"
                trials.append(Trial(seed, None, status, None, None, 0, 0.0, reason, {}))
            else:
                trials.append(_trial(history, run, seed, _course(scores[run.id], score), reason))
        rows.append(Row(cell, tuple(trials)))
    return Results(sweep, plan, score, tuple(rows))


def _trial(history: History, run: Run, seed: int, course: Mapping[int, float], reason: str | None) -> Trial:
    completed = run.status == "completed"
    if not completed and reason is None and run.status == "failed":
        reason = history.attempts(run.id)[-1].error
    return Trial(
        seed=seed,
        run=run.id,
        status=run.status,
        value=course.get(run.rounds_done) if completed else None,
        epsilon=max((spend.epsilon for _, spend in history.spends(run.id)), default=None),
        rounds=run.rounds_done,
        seconds=sum(each.seconds for each in history.rounds(run.id)),
        error=None if completed else reason,
        course=course,
    )


def _course(scores: Iterable[tuple[int, Metric]], score: Score | None) -> dict[int, float]:
    if score is None:
        return {}
    return {
        number: metric.value for number, metric in scores if (metric.scope, metric.name) == (score.scope, score.name)
    }


def _choose(scores: Iterable[Sequence[tuple[int, Metric]]], asked: str | None) -> Score | None:
    """Give the score asked for, or the task's most telling: of the public test set, where there is one."""
    found: dict[str, set[str]] = {"test": set(), "validation": set()}
    for of_run in scores:
        for _, metric in of_run:
            found[metric.scope].add(metric.name)
    if asked is not None:
        score = Score.read(asked)
        known = [*telling(found["test"]), *(f"validation/{name}" for name in telling(found["validation"]))]
        if known and score.name not in found[score.scope]:
            raise ConfigError(f"--metric {asked}: the runs have no such score; they have {', '.join(known)}.")
        return score
    if names := telling(found["test"]):
        return Score("test", names[0])
    names = telling(found["validation"])
    return Score("validation", names[0]) if names else None
