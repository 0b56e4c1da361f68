"""A real run of the tiny scenario with its sites' real ledgers, and copies of it to tamper with."""

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from flwr.app import Message

import client.app
from client.privacy.account import Account
from server import job, rounds
from server.history.store import History
from server.observer import Log
from server.privacy.cli import privacy
from shared import messages
from shared.messages import Refusal
from simulations import prepare, scenario
from simulations.grid import InProcessGrid

SITES = ["north", "south", "west"]
SHORT = {"training.rounds": 2, "refit.rounds": 0}  # three rounds, of which the last two are scored


class Played:
    """A run in a home of its own."""

    def __init__(self, run: str, home: Path) -> None:
        self.run, self.home = run, home

    @property
    def url(self) -> str:
        return f"sqlite:///{self.home / 'history.db'}"

    def copy(self, home: Path) -> "Played":
        shutil.copytree(self.home, home)
        return Played(self.run, home)

    def play(self, app_of: Callable[[Any], Any] = lambda app: app, observer: Any = None) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOONFLOWER_HOME", str(self.home))
            app = app_of(client.app.build(client.app.site_from_context))
            found = job.load(prepare.run_folder(self.run))
            with History.open(self.url) as history:
                grid = InProcessGrid(app, prepare.nodes(self.run))
                grid.in_process = False  # `app_of` reads what is written
                rounds.run(found, grid, history, observer or Log(), engine="in-process")

    def play_losing(self, *lost: tuple[str, str, int]) -> None:
        """Play it with these answers (site, kind, round) computed, charged, and lost on their way."""

        def app_of(inner: Any) -> Any:
            def answer(message: Message, context: Any) -> Message:
                reply: Message = inner(message=message, context=context)
                site, kind = SITES[context.node_id - 1], message.metadata.message_type
                if (site, kind, message.content.config_records["values"].get("round")) in lost:
                    return Message(messages.to_record(Refusal(site, "failed", "lost on its way")), reply_to=message)
                return reply

            return answer

        self.play(app_of)

    def ledger(self, site: str) -> Path:
        return self.home / "runs" / self.run / "sites" / site / "ledger.db"

    def export(self, site: str) -> Path:
        """Write the site's ledger as `moonflower ledger export` does."""
        out = self.home / f"{site}.json"
        with Account.read(self.ledger(site), f"tiny.{site}") as account:
            out.write_text(json.dumps(account.export()), encoding="utf-8")
        return out

    def change(self, statement: str, *values: object) -> None:
        """Change the history behind its back."""
        with closing(sqlite3.connect(self.home / "history.db")) as connection, connection:
            assert connection.execute(statement, values).rowcount > 0

    def state(self, *arguments: object, style: str = "json") -> Result:
        words = ["statement", self.run, "--database", self.url, "--format", style, *map(str, arguments)]
        return CliRunner().invoke(privacy, words)

    def stated(self, *arguments: object, sound: bool = True) -> dict[str, Any]:
        """Give the statement's JSON; it must be sound, or in doubt."""
        result = self.state(*arguments)
        assert (result.exit_code == 0) is sound, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        assert (found["guarantee"]["verdict"] == "in doubt") is not sound
        return found


def lay_out(file: Path, home: Path, settings: dict[str, Any]) -> Played:
    home.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOONFLOWER_HOME", str(home))
        with History.open(f"sqlite:///{home / 'history.db'}") as history:
            return Played(prepare.prepare(scenario.load(str(file), settings), history), home)


@pytest.fixture(scope="module")
def fresh(tiny_scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Give a run that is laid out and not begun: copy it before use."""
    return lay_out(tiny_scenario, tmp_path_factory.mktemp("fresh") / "home", SHORT)


@pytest.fixture(scope="module")
def played(fresh: Played, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Give the run, played to its end: copy it before changing it."""
    run = fresh.copy(tmp_path_factory.mktemp("played") / "home")
    run.play()
    return run


@pytest.fixture
def mine(played: Played, tmp_path: Path) -> Played:
    """Give a copy of the played run to tamper with."""
    return played.copy(tmp_path / "home")


@pytest.fixture
def begun(fresh: Played, tmp_path: Path) -> Played:
    """Give a copy of the run that is not begun."""
    return fresh.copy(tmp_path / "home")


@pytest.fixture
def without_privacy(tiny_scenario: Path, tmp_path: Path) -> Played:
    run = lay_out(tiny_scenario, tmp_path / "home", {"privacy.epsilon": float("inf"), "training.rounds": 0, **SHORT})
    run.play()
    return run


@pytest.fixture
def discrete(tiny_scenario: Path, tmp_path: Path) -> Played:
    """Give a run of one scored round with discrete noise."""
    settings = {"privacy.noise": "discrete", "training.rounds": 0, "refit.rounds": 0}
    run = lay_out(tiny_scenario, tmp_path / "home", settings)
    run.play()
    return run


@pytest.fixture
def environment(begun: Played) -> dict[str, str]:
    return {**os.environ, "MOONFLOWER_HOME": str(begun.home), "OMP_NUM_THREADS": "1"}
