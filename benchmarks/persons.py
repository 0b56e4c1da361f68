"""What it costs to promise privacy to persons and not to records: the scenario `persons`, by unit and records a step.

    python benchmarks/persons.py --data DATA --model MODEL --epsilon 8

DATA holds the folder 20news-bydate, MODEL is all-MiniLM-L6-v2 as a folder. The sites' own code trains and plans; the
encoder's features are computed once for all runs, and no ledger is kept. Sampling and noise are drawn anew in each run.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from task_scenarios.persons import SITES, layout
from torch import Tensor

from client import data, training
from client.privacy.randomness import Keystream
from client.resident import Resident
from client.site import Site, split_key
from server import optimization
from server.aggregation import Fold
from server.evaluation import TestSet
from shared import plan
from shared.accounting import Release, epsilon
from shared.examples import Examples
from shared.messages import TrainRequest
from shared.plan import SitePlan
from shared.run_config import RunConfig
from simulations import scenario as scenarios

VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("record", {"unit": "record", "records_per_person": ""}),
    ("person, at most 1 record a step", {"records_per_person": 1}),
    ("person, at most 4", {"records_per_person": 4}),
    ("person, at most 8", {"records_per_person": 8}),
    ("record, no privacy", {"unit": "record", "records_per_person": "", "epsilon": float("inf")}),
    ("person, at most 4, no privacy", {"records_per_person": 4, "epsilon": float("inf")}),
)


class Warm(Resident):
    """Keeps the encoder's features from run to run: the encoder never changes, only what is asked of it."""

    def features(self, site: Site, part: Any, examples: Examples, config: RunConfig, trained: Any) -> Tensor:
        """Compute the features once."""
        held: dict[str, Tensor] = self.__dict__.setdefault("held", {})
        key = f"{site.name} {site.dataset.unit} {part}"
        if key not in held:
            held[key] = super().features(site, part, examples, config, trained)
        return held[key]


def make(folder: Path, model: str, changes: dict[str, Any]) -> tuple[RunConfig, list[Site]]:
    """Return a run and its sites; where the record is the unit, sizes are those of the files, rounded."""
    settings = {f"privacy.{name}": value for name, value in changes.items()}
    overrides: dict[str, Any] = {"data.folder": str(folder), "model.name": model} | settings
    rows = {name: _rows(folder / f"{name}.jsonl") for name in SITES}
    if changes.get("unit") == "record":
        overrides |= {"data.unit_column": ""}
        overrides["sites"] = [{"name": name, "records": round(len(held), -1)} for name, held in rows.items()]
    made = scenarios.load("persons", overrides)
    sites = [
        Site.model_validate(
            {
                "name": each.name,
                "dataset": {
                    "id": f"{each.name}-{made.privacy.unit}",
                    "path": str(folder / f"{each.name}.jsonl"),
                    "records": each.records,
                    "persons": each.persons,
                    "unit_column": made.data.unit_column,
                    "labels": list(made.task.labels),
                    "validation": made.data.validation,
                },
                "privacy": {"max_epsilon": 20.0},
                "split_key": str(folder / f"{each.name}.key"),
                "cache": str(folder / "cache"),
                "device": "cpu",
            }
        )
        for each in made.sites
    ]
    return made.run_config(), sites


def run(config: RunConfig, sites: list[Site], plans: list[SitePlan], resident: Resident, test: TestSet) -> float:
    """Train once; return the accuracy on the public test set."""
    state = optimization.start(resident.model(config, "cpu").arrays())
    most = max(site.dataset.units for site in sites)
    for number in range(1, config.rounds + 1):
        name, phase, done = config.place(number)
        state = optimization.enter(state, name, resident.model(config, "cpu").names(name))
        mean = Fold({name: state.iterate[name] for name in state.first})
        for site, planned in zip(sites, plans, strict=True):
            request = TrainRequest("run", config.as_json(), number, state.iterate)
            reply = training.train(resident, site, config, planned, request, Keystream.from_system())
            mean.add(reply.update, site.dataset.units / most)
        state = optimization.step(state, phase, mean.mean(), done=(done - 1) / phase.rounds)
    scores = {metric.name: metric.value for metric in test.score(state.published, whole=True)}
    return scores["accuracy"]


def heaviest(config: RunConfig, sites: list[Site], plans: list[SitePlan]) -> float:
    """Epsilon of the person with the most training records, under a promise to records of full batches.

    All of a person's records are in each step, so that they move its sum by as many clipping norms: the noise
    is that much smaller for the person.
    """
    worst = 0.0
    for site, planned in zip(sites, plans, strict=True):
        key, rows = split_key(site), _rows(site.dataset.path)
        held = Counter(row["author"] for row in rows if not data.is_validation(row["id"], key, site.dataset.validation))
        times = max(held.values())
        releases = [
            Release(1.0, phase.noise_multiplier / times, phase.steps_per_round * phase.rounds, phase.mechanism)
            for phase in planned.phases.values()
        ]
        worst = max(worst, epsilon(releases, config.privacy.delta))
    return worst


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--epsilon", type=float, default=8.0)
    given = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        layout(given.data, folder)
        resident, test = Warm(), None
        for name, changes in VARIANTS:
            config, sites = make(
                folder, given.model, {"epsilon": given.epsilon, "max_noise_multiplier": 100.0} | changes
            )
            plans = [plan.make(config, site.dataset.card()) for site in sites]
            test = test or TestSet(folder / "test.jsonl", config, resident.model(config, "cpu"))
            scores = [100 * run(config, sites, plans, resident, test) for _ in range(given.runs)]
            noises = [next(iter(planned.phases.values())).noise_multiplier for planned in plans]
            person = (
                f"{given.epsilon:g}" if config.privacy.unit == "person" else f"{heaviest(config, sites, plans):.0f}"
            )
            lines.append(
                f"| {name} | {sum(site.dataset.units for site in sites)} | {statistics.mean(noises):.2f} | "
                f"{'inf' if not config.privacy.private else person} | {statistics.mean(scores):.1f} | {statistics.stdev(scores):.1f} |"
            )
            sys.stderr.write(f"{lines[-1]}\n")
    sys.stdout.write(
        f"{given.runs} runs each, 30 rounds of full batches over four sites, epsilon {given.epsilon:g} at delta 1e-5; accuracy on 800 posts of "
        f"persons whom no site has. torch {torch.__version__}, {platform.machine()}, CPU.\n\n"
        "| promise to | declared units | noise multiplier | epsilon of the person with the most posts | accuracy | deviation |\n"
        "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
