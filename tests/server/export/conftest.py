"""Runs of the tiny scenario that are played to their end, each in a home of its own, to export from."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import client.app
from server import job, rounds
from server.export import folder
from server.history.store import History
from server.observer import Log
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
        return folder.write(self.history, self.id, self.folder, out, form, **asked)

    def copy(self, home: Path) -> "Trained":
        """Give a copy to change."""
        shutil.copytree(self.home, home)
        return Trained(self.id, home, History.open(f"sqlite:///{home / 'history.db'}"))


Train = Callable[..., Trained]


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
                grid = InProcessGrid(client.app.build(client.app.site_from_context), prepare.site_files(run))
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
