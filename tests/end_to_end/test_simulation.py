"""`moonflower simulate` and the commands around it, as a user calls them, on a task that a word count solves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
from click.testing import CliRunner

from server.history.store import History
from shared.cli import root

SITES = ("north", "south", "west")


class Federation(Protocol):
    """The fixture's type: the tests' folders are no packages."""

    def __getattr__(self, name: str) -> Any: ...


Command = Callable[..., str]


@pytest.fixture
def moonflower(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command in this process, where a warning is an error; give what it printed on standard output."""
    monkeypatch.setenv("MOONFLOWER_HOME", str(federation.home))
    monkeypatch.delenv("MOONFLOWER_DATABASE", raising=False)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the tests' own handlers stay

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(root, list(arguments), catch_exceptions=False, env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        return done.stdout

    return run


def test_without_privacy_an_easy_task_is_learned_and_every_report_says_that_there_is_none(
    federation: Federation, tmp_path: Path
) -> None:
    """200 public test sentences, half of them positive: a model that learned nothing has 160 right once in 10^17."""
    printed = federation.moonflower("simulate", federation.scenario, "--epsilon", "inf")
    run = federation.newest_run()
    assert printed.count("WITHOUT PRIVACY") == 2  # before the first round, and with the result
    federation.assert_finished_and_accounted_for(run)

    with History.open(federation.database) as history:
        metrics = history.metrics(run, round_number=12)
    test = {metric.name: metric.value for _, metric in metrics if metric.scope == "test"}
    assert test["records"] == 200
    assert test["accuracy"] >= 0.8

    for command in (("rounds", run), ("metrics", run), ("spends", run), ("participations", run), ("events", run)):
        assert "no privacy" in federation.moonflower("history", *command).splitlines()[0], command
    assert "no privacy" in federation.moonflower("history", "runs")
    for row in federation.listed("spends", run):
        assert (row["private"], row["epsilon"], row["budget"]) == (False, "Infinity", "Infinity")
    report = tmp_path / "report.html"
    federation.moonflower("report", run, "--out", str(report))
    assert "without privacy" in report.read_text(encoding="utf-8").lower()


def test_the_result_as_json_says_whether_the_run_was_private(federation: Federation, moonflower: Command) -> None:
    short = ("simulate", federation.scenario, "--rounds", "2", "--format", "json")
    private, bare = json.loads(moonflower(*short)), json.loads(moonflower(*short, "--epsilon", "inf"))
    assert (private["private"], bare["private"]) == (True, False)
    assert set(private["epsilon"]) == {f"{site}/{part}" for site in SITES for part in ("train", "validation")}
    assert all(0 < value <= 8 for value in private["epsilon"].values())
    assert set(bare["epsilon"].values()) == {"inf"}


def test_the_commands_that_a_private_run_names_next_work(federation: Federation) -> None:
    printed = federation.moonflower("simulate", federation.scenario)
    run = federation.newest_run()
    assert "without privacy" not in printed.lower()
    federation.assert_finished_and_accounted_for(run)
    named = [line.split()[1:] for line in printed.splitlines() if line.strip().startswith("moonflower ")]
    assert ["history", "rounds", run] in named
    for command in named:
        assert federation.moonflower(*command) is not None


@pytest.mark.parametrize("trainable", ["full", "lora", "bias", "head"])
def test_every_choice_of_what_is_trained_runs_and_is_accounted_for(
    federation: Federation, moonflower: Command, trainable: str
) -> None:
    settings = ("--rounds", "3", "--set", f"model.trainable={trainable}")
    run = moonflower("simulate", federation.scenario, *settings, "--quiet").strip()
    federation.assert_finished_and_accounted_for(run, rounds=3)
    sent = {row["bytes_up"] for row in rows(moonflower("history", "participations", run, "--format", "json"))}
    head = 4 * (2 * 32 + 2)  # float32, and what the message itself takes
    exchanged = {"full": 60_000, "lora": 4 * 2 * 2 * 8 * 32 + head, "bias": 4 * 500, "head": head}[trainable]
    assert exchanged < max(sent) < 3 * exchanged + 6_000


def test_a_postgresql_database_holds_a_run_from_end_to_end(
    federation: Federation, moonflower: Command, postgres_url: str
) -> None:
    where = ("--database", postgres_url)
    run = moonflower("simulate", federation.scenario, "--rounds", "3", "--quiet", *where).strip()
    federation.assert_finished_and_accounted_for(run, rounds=3, database=postgres_url)
    assert not (federation.home / "history.db").exists()
    assert [row["run"] for row in rows(moonflower("history", "runs", "--format", "json", *where))] == [run]
    listed = rows(moonflower("history", "spends", run, "--round", "3", "--format", "json", *where))
    assert {(row["site"], row["part"]) for row in listed} == {
        (site, part) for site in SITES for part in ("train", "validation")
    }


def rows(printed: str) -> list[dict[str, Any]]:
    """Read a history command's JSON."""
    found: list[dict[str, Any]] = json.loads(printed)
    return found
