"""The same private federation under stragglers, by four schedules: simulated time against accuracy.

    python benchmarks/schedules.py                                    vader-many: 100 sites, 400 updates each
    python benchmarks/schedules.py --seeds 3 --plot schedules.png
    python benchmarks/schedules.py --scenario my.toml --goal 0.75 --only synchronous buffered

The sites' speeds are lognormal (sigma 1), a site's rounds differ by sigma 0.3 more. `synchronous` waits for all of a cohort of
20, `deadline` twice the median; `buffered` steps at each 20th update of whom, and `small buffer` at each 10th, in twice
as many rounds. All plan the same epsilon; who may answer twice as many questions has more noise in each answer.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.history.store import History
from simulations import engine, prepare, scenario

STEP = 10.0  # seconds, the median of a local step
WEATHER = {"dynamics.speed.step": STEP, "dynamics.speed.sigma": 1.0, "dynamics.speed.jitter": 0.3}
COHORT, ROUNDS = 20, 20
BUFFERED = {"federation.mode": "buffered", "federation.concurrency": COHORT, "federation.sites_per_round": ""}
SCHEDULES: dict[str, dict[str, Any]] = {
    "synchronous": {"training.rounds": ROUNDS},
    "deadline": {
        "training.rounds": ROUNDS,
        "federation.deadline": 2 * STEP,
        "federation.min_sites": 1,
        "federation.on_shortfall": "continue",
    },
    "buffered": BUFFERED | {"training.rounds": ROUNDS, "federation.buffer_size": COHORT},
    "small buffer": BUFFERED | {"training.rounds": 2 * ROUNDS, "federation.buffer_size": COHORT // 2},
}


@dataclass(frozen=True)
class Course:
    """A run: simulated seconds and accuracy after each round, and what became of its answers."""

    times: list[float]
    accuracies: list[float]
    counted: int
    charged: int
    age: float  # mean rounds between an update's question and its round
    epsilon: float

    def reached(self, goal: float) -> float | None:
        """Return the simulated seconds after which the accuracy was there first."""
        return next((at for at, score in zip(self.times, self.accuracies, strict=True) if score >= goal), None)


def play(name: str, settings: Mapping[str, Any], database: str) -> Course:
    """Play a scenario under a schedule."""
    with History.open(database) as history:
        run = prepare.prepare(scenario.load(name, dict(settings)), history)
        engine.play(run, database, None)
        times, total = [], 0.0
        for done in history.rounds(run):
            total += done.simulated_seconds or 0.0
            times.append(total)
        scores = [m.value for _, m in history.metrics(run) if (m.scope, m.name) == ("test", "accuracy")]
        parts = [(n, part) for n, part in history.participations(run) if part.kind == "train"]
        late = sum("its answer came" in event.text for event in history.events(run))
        spends = [spend for _, spend in history.spends(run) if spend.part == "train"]
    taken = [(n, part) for n, part in parts if part.outcome == "ok"]
    age = statistics.mean(n - (part.asked or n) for n, part in taken)
    return Course(times, scores, len(taken), len(spends) + late, age, max(spend.epsilon for spend in spends))


def main() -> None:
    """Play each schedule with each seed, and print a table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--scenario", default="vader-many")
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--goal", type=float, default=0.72, help="the accuracy to reach")
    options.add_argument("--only", nargs="+", choices=SCHEDULES, default=list(SCHEDULES), help="some of the schedules")
    options.add_argument("--plot", type=Path, help="write a picture")
    asked = options.parse_args()
    courses: dict[str, list[Course]] = {name: [] for name in asked.only}
    with tempfile.TemporaryDirectory() as home:
        os.environ["MOONFLOWER_HOME"] = home
        for seed in range(asked.seeds):
            for name in asked.only:
                given = WEATHER | SCHEDULES[name] | {"seed": seed}
                courses[name].append(play(asked.scenario, given, f"sqlite:///{home}/history.db"))
                _show(name, courses[name], asked.goal)
    if asked.plot:
        draw(courses, asked.plot)


def _show(name: str, courses: list[Course], goal: float) -> None:
    reached = [course.reached(goal) for course in courses]
    there = [at for at in reached if at is not None]
    cells = [
        f"{name:13}",
        f"{statistics.median(course.times[-1] for course in courses):7.0f} s",
        f"{statistics.median(there):7.0f} s" if there else "never",
        f"({len(there)} of {len(courses)})",
        f"accuracy {statistics.median(course.accuracies[-1] for course in courses):.3f}",
        f"counted {statistics.median(course.counted for course in courses):.0f}",
        f"charged {statistics.median(course.charged for course in courses):.0f}",
        f"age {statistics.median(course.age for course in courses):.2f}",
        f"epsilon {max(course.epsilon for course in courses):.2f}",
    ]
    print("  ".join(cells), flush=True)


def draw(courses: Mapping[str, list[Course]], path: Path) -> None:
    """Draw accuracy over simulated time, a line a run."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, (name, each) in enumerate(courses.items()):
        for place, course in enumerate(each):
            axes.plot(
                course.times, course.accuracies, color=f"C{number}", label=name if place == 0 else None, alpha=0.8
            )
    axes.set(xlabel="simulated seconds", ylabel="accuracy on the public test set", xscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
