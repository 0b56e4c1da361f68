"""Runs of the tiny scenario that are played to their end, each in a home of its own, to export from."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client.app
from server import checkpoints, job, optimization, rounds
from server.evaluation import TestSet
from server.export import folder
from server.history.records import Metric, Round
from server.history.store import History
from server.observer import Log
from shared import models
from shared.run_config import RunConfig, parse
from simulations import prepare, scenario
from simulations.grid import InProcessGrid


@dataclass
class Trained:
    """A run that was played, and ways to export it."""

    id: str
    home: Path
    history: History

    @property
    def folder(self) -> Path:
        return self.home / "runs" / self.id

    @property
    def database(self) -> str:
        return f"sqlite:///{self.home / 'history.db'}"

    def export(self, out: Path, form: Any = "merged", **asked: Any) -> Path:
        folder.write(self.history, self.id, self.folder, out, form, **asked)
        return out

    def copy(self, home: Path) -> "Trained":
        """Give a copy to change."""
        shutil.copytree(self.home, home)
        return Trained(self.id, home, History.open(f"sqlite:///{home / 'history.db'}"))


Train = Callable[..., Trained]
ROUND = {"rounds": 3, "batch_size": 4}


def commit(
    home: Path,
    values: dict[str, Any],
    test: list[dict[str, Any]] | None,
    *,
    spread: float = 0.3,
    released: list[list[Metric]] | None = None,
) -> Trained:
    """Enter a run of three rounds whose arrays moved at random, as its coordinator commits them; no site takes part.

    `files` in `home` is where the test records' files lie; `released` are more scores of each round.
    """
    config = parse(RunConfig, {"training": ROUND, "hardware": {"precision": "float32"}, **values}, source="test")
    run = Trained(config.name, home, History.open(f"sqlite:///{home / 'history.db'}"))
    run.folder.mkdir(parents=True)
    shutil.copytree(home / "files", run.folder / "files") if (home / "files").exists() else None
    described = {"run": run.id, "sites": 1, "config": config.as_dict()}
    (run.folder / job.RUN_FILE).write_text(json.dumps(described), encoding="utf-8")
    if test is not None:
        rows = "".join(f"{json.dumps(row)}\n" for row in test)
        (run.folder / job.TEST_FILE).write_text(rows, encoding="utf-8")
    run.history.create_run(
        run.id, name=config.name, config=config.as_dict(), config_digest=config.digest, rounds_planned=config.rounds,
        private=True, version="0",
    )  # fmt: skip
    attempt = run.history.start_attempt(run.id, engine="in-process")
    model = models.load(config)
    state = optimization.start(model.arrays(), model.base_digest)
    draws = np.random.default_rng(0)
    for number in range(1, config.rounds + 1):
        moved = {
            name: array + draws.normal(0, spread / max(1, array.shape[-1]) ** 0.5, array.shape).astype(np.float32)
            if name in model.trainable
            else array
            for name, array in state.published.items()
        }
        state = replace(state, iterate=moved, published=moved)
        metrics: list[Metric] = []
        if test is not None:
            model.module.eval()
            metrics = TestSet(run.folder / job.TEST_FILE, config, model).score(moved, whole=True)
        metrics += [] if released is None else released[number - 1]
        kept = checkpoints.write(run.folder / job.CHECKPOINTS, state)
        run.history.commit_round(
            Round(
                run=run.id,
                number=number,
                attempt=attempt.number,
                phase="training",
                started_at=datetime.now(UTC),
                seconds=1.0,
                checkpoint=kept,
                participations=(),
                metrics=tuple(metrics),
                spends=(),
            )
        )
    run.history.end_attempt(run.id, attempt.number, "completed")
    run.history.finish_run(run.id, "completed", attempt=attempt.number)
    return run


@pytest.fixture(scope="module")
def train(tiny_scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """Play the tiny scenario with other settings; `play=False` only lays it out; `cache` has packages."""
    opened: list[History] = []

    def make(*, play: bool = True, cache: Path | None = None, **settings: Any) -> Trained:
        home = tmp_path_factory.mktemp("home")
        if cache is not None:
            (home / "cache").symlink_to(cache)
        history = History.open(f"sqlite:///{home / 'history.db'}")
        opened.append(history)
        settings = {"hardware__precision": "float32", **settings}  # the scores that float32 code gives again
        asked = {name.replace("__", "."): value for name, value in settings.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOONFLOWER_HOME", str(home))
            run = prepare.prepare(scenario.load(str(tiny_scenario), asked), history)
            if play:
                grid = InProcessGrid(client.app.build(client.app.site_from_context), prepare.nodes(run))
                rounds.run(job.load(prepare.run_folder(run)), grid, history, Log(), engine="in-process")
        return Trained(run, home, history)

    yield make
    for history in opened:
        history.close()


@pytest.fixture(scope="module")
def lora(train: Train) -> Trained:
    """Give a LoRA run of five rounds whose adapters have moved far enough to matter."""
    return train(
        training__server_learning_rate=0.3,
        model__feature_scale=0.7,
        model__lora__targets=["query", "dense"],
        model__lora__layers=[1],
    )
