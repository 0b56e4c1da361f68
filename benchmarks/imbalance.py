"""What class weights, the focal loss and thresholds do for rare labels: private runs of a head over four sites.

    python benchmarks/imbalance.py --data DIR --model FOLDER > benchmarks/results/imbalance.md

DIR holds sst2-sentences (train.jsonl, test.jsonl: text, label), of which positives are thinned out to one in ten, and
goemotions (train.jsonl.gz, test.jsonl.gz: text, label a list), of which 4,000 records are taken. Every figure is of a whole run
of coordinator and sites at epsilon 8, scored on test records; the sites' sampling and noise are fresh each time. The encoder
stands still, so that its features are computed once for all runs. Thresholds are those that the coordinator has recorded.
"""

import argparse
import gzip
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from client import app as client_app
from client.privacy.policy import Policy
from client.site import Dataset, Site
from server import checkpoints, rounds
from server.history.store import History
from server.job import Job
from shared import models, records
from shared.examples import Examples
from shared.features import features
from shared.run_config import RunConfig
from simulations.engine import Silent
from simulations.grid import InProcessGrid

SITES, EPSILON, SEEDS = 4, 8.0, 5
VARIANTS: dict[str, dict[str, Any]] = {
    "cross-entropy": {},
    "given weights": {"class_weights": "given"},
    "released weights": {"class_weights": "released"},
    "focal, gamma 2": {"kind": "focal"},
    "focal and released weights": {"kind": "focal", "class_weights": "released"},
}
Row = dict[str, Any]
Values = npt.NDArray[np.float64]


def rare_positives(data: Path) -> tuple[list[str], list[Row], list[Row]]:
    """Labels, training and test records of the binary set, one positive in ten."""

    def thin(part: str) -> list[Row]:
        rows = [json.loads(line) for line in (data / "sst2-sentences" / f"{part}.jsonl").open(encoding="utf-8")]
        each = {label: [row for row in rows if row["label"] == label] for label in (0, 1)}
        return [*each[0], *random.Random(0).sample(each[1], len(each[0]) // 9)]  # noqa: S311 - a choice of records

    names = ["negative", "positive"]
    train, test = (
        [{"text": row["text"], "label": names[row["label"]]} for row in thin(part)] for part in ("train", "test")
    )
    return names, train, test


def emotions(data: Path) -> tuple[list[str], list[Row], list[Row]]:
    """Labels, training and test records of the set of many labels a record."""
    said = (data / "goemotions" / "README.md").read_text(encoding="utf-8")
    line = next(line for line in said.splitlines() if line.startswith("- Labels: "))
    names = [part.split()[1] for part in line.removeprefix("- Labels: ").split(",")]

    def read(part: str) -> list[Row]:
        with gzip.open(data / "goemotions" / f"{part}.jsonl.gz", "rt", encoding="utf-8") as lines:
            return [{"text": row["text"], "label": [names[n] for n in row["label"]]} for row in map(json.loads, lines)]

    return names, random.Random(0).sample(read("train"), 4000), read("test")[:1500]  # noqa: S311


def config(model: str, labels: list[str], many: bool, loss: dict[str, Any], shares: Values) -> RunConfig:
    """Give the run's configuration; `shares` are the labels' in the training records, for the weights that are given."""
    if loss.get("class_weights") == "given":
        wanted = (1 - shares) / shares if many else 1 / (len(labels) * shares)
        loss = loss | {"weights": np.clip(wanted, 0.1, 10.0).tolist()}
    return RunConfig.model_validate(
        {
            "model": {"name": model, "trainable": "head"},
            "task": {"labels": labels, "multi_label": many, "max_length": 64},
            "training": {
                "rounds": 30,
                "sampling_rate": 0.5,
                "clipping_norm": 1.0 if many else 3.0,
                "server_optimizer": "adam",
                "server_learning_rate": 2e-2,
                "server_schedule": "decay",
                "server_average": 0.7,
            },
            "loss": loss,
            "privacy": {"epsilon": EPSILON},
            "evaluation": {"every": 5},
        }
    )


class Bench:
    """Sites laid out once, test records' features, and runs over them."""

    def __init__(self, folder: Path, model: str, labels: list[str], train: list[Row], test: list[Row]) -> None:
        self.folder, self.name, self.labels = folder, model, labels
        self.many = isinstance(train[0]["label"], list)
        random.Random(1).shuffle(train)  # noqa: S311 - into sites
        self.sites: list[Site] = []
        for number in range(SITES):
            place = folder / f"site-{number}"
            place.mkdir(parents=True)
            rows = train[number::SITES]
            (place / "records.jsonl").write_text(
                "".join(json.dumps(row | {"id": str(n)}) + "\n" for n, row in enumerate(rows)), encoding="utf-8"
            )
            dataset = Dataset(
                id=f"site-{number}",
                path=place / "records.jsonl",
                records=round(len(rows), -1),
                validation=0.2,
                labels=tuple(labels),
            )
            policy = Policy(max_epsilon=20.0, models=("*",))
            self.sites.append(
                Site(
                    name=f"site-{number}",
                    dataset=dataset,
                    privacy=policy,
                    split_key=place / "split.key",
                    cache=place / "cache",
                    device="cpu",
                )
            )
        held = [[label in row["label"] if self.many else label == row["label"] for label in labels] for row in train]
        self.shares: Values = np.mean(np.array(held, dtype=float), axis=0)
        self.app = client_app.build(lambda context: self._site(int(context.node_config["number"])))
        self.ledgers = folder
        self._test(test)

    def _test(self, rows: list[Row]) -> None:
        loaded = models.load(config(self.name, self.labels, self.many, {}, self.shares))
        path = self.folder / "test.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found = records.read(path, loaded.task, identified=False)
        encoded = [loaded.task.encode(record.values, loaded.processor) for record in found]
        examples = Examples.single(loaded.task, loaded.processor, encoded)
        self.features = features(loaded, examples, config(self.name, self.labels, self.many, {}, self.shares).hardware)
        self.targets = np.stack([record["labels"] for record in encoded])

    def _site(self, number: int) -> Site:
        return self.sites[number].model_copy(update={"ledger": self.ledgers / f"{number}.db"})

    def run(self, loss: dict[str, Any], seed: int) -> dict[str, float]:
        """Play one run, and score its model on the test records: at one half, and at the recorded thresholds."""
        settings = config(self.name, self.labels, self.many, loss, self.shares)
        name = f"run-{abs(hash(str(loss)))}-{seed}"
        self.ledgers = self.folder / name
        self.ledgers.mkdir()
        job = Job(name, settings, self.ledgers / "checkpoints", None, sites=SITES)
        grid = InProcessGrid(self.app, {number + 1: {"number": number} for number in range(SITES)})
        with History.open("sqlite://") as history:
            history.create_run(
                name,
                name="imbalance",
                config=settings.as_dict(),
                config_digest=settings.digest,
                rounds_planned=settings.rounds,
                private=True,
                version="0",
            )
            rounds.run(job, grid, history, Silent(), engine="in-process")
            last = history.last_round(name)
            assert last is not None
            state = checkpoints.read(job.checkpoints, last.checkpoint.digest)
            thresholds = [metric.value for metric in last.metrics if metric.name.startswith("threshold/")]
        head = {key: torch.from_numpy(array) for key, array in state.published.items()}
        logits = self.features @ head["head.weight"].T + head["head.bias"]
        if self.many:
            likely = logits.double().sigmoid().numpy()
            return {
                "one half": _macro(likely >= 0.5, self.targets),
                "threshold": _macro(likely >= thresholds, self.targets),
            }
        likely = logits.double().softmax(1).numpy()[:, 1]
        found = {}
        for how, place in (("one half", 0.5), ("threshold", thresholds[0])):
            chosen = likely >= place
            found[how] = _macro(np.stack([~chosen, chosen], 1), np.stack([self.targets == 0, self.targets == 1], 1))
        return found


def _macro(chosen: npt.NDArray[np.bool_], held: npt.NDArray[Any]) -> float:
    """Mean over labels of F1, of choices and truths (N, labels)."""
    truth = held.astype(bool)
    hits = (chosen & truth).sum(0)
    return float(np.mean(2 * hits / np.maximum(chosen.sum(0) + truth.sum(0), 1)))


def table(bench: Bench) -> Iterator[str]:
    """Yield the lines of a set's table."""
    yield "| loss | macro F1 at one half | at the released thresholds |"
    yield "| --- | --- | --- |"
    for title, loss in VARIANTS.items():
        began = time.monotonic()
        scores = [bench.run(loss, seed) for seed in range(SEEDS)]
        cells = [f"{np.mean(each):.3f} ({min(each):.3f} to {max(each):.3f})" for each in _columns(scores)]
        print(f"{title}: {cells}, {time.monotonic() - began:.0f} s", file=sys.stderr)
        yield f"| {title} | {cells[0]} | {cells[1]} |"


def _columns(scores: list[dict[str, float]]) -> list[list[float]]:
    return [[each[how] for each in scores] for how in ("one half", "threshold")]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--only", choices=["sst2", "emotions"])
    given = parser.parse_args()
    sets = {"sst2": ("Two labels, one record in ten positive", rare_positives), "emotions": ("28 emotions", emotions)}
    for key, (title, read) in sets.items():
        if given.only in (None, key):
            with tempfile.TemporaryDirectory() as folder:
                labels, train, test = read(given.data)
                bench = Bench(Path(folder), given.model, labels, train, test)
                print(f"\n## {title}\n\n{len(train)} training records over {SITES} sites, {len(test)} test records.\n")
                print("\n".join(table(bench)), flush=True)


if __name__ == "__main__":
    main()
