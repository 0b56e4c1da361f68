"""A run whose promise is to persons, from the scenario to the statement."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from client.privacy.account import Account
from server.history.store import History
from server.privacy import statement, verify
from server.privacy.cli import privacy
from server.privacy.export import load
from server.report.cli import report
from shared import ledger_chain
from shared.errors import ConfigError
from simulations import engine, prepare, scenario

PERSONS = 30  # of a site, with two posts each
WORDS = {"data.unit_column": "who", "privacy.unit": "person", "privacy.records_per_person": 2}


@pytest.fixture
def folder(tiny_scenario: Path, tmp_path: Path) -> Path:
    """Give the tiny scenario's data, where each row says whose it is."""
    for file in tiny_scenario.parent.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        told = [row | {"who": f"{file.stem}-{number // 2}"} for number, row in enumerate(rows)]
        (tmp_path / file.name).write_text("".join(json.dumps(row) + "\n" for row in told))
    return tmp_path


def made(tiny_scenario: Path, folder: Path, **changes: Any) -> scenario.Scenario:
    sites = [{"name": name, "persons": PERSONS} for name in ("north", "south", "west")]
    return scenario.load(str(tiny_scenario), {"data.folder": str(folder), "sites": sites} | WORDS | changes)


def test_a_run_for_persons_says_so_wherever_it_says_what_it_promises(
    tiny_scenario: Path, folder: Path, moonflower_home: Path
) -> None:
    url = f"sqlite:///{moonflower_home / 'history.db'}"
    moonflower_home.mkdir()
    with History.open(url) as history:
        run = prepare.prepare(made(tiny_scenario, folder), history)
    assert engine.play(run, url, None).status == "completed"

    def said(*words: str) -> str:
        done = CliRunner().invoke(privacy, ["statement", run, "--database", url, *words])
        assert done.exit_code == 0, done.output
        return done.output

    text = said()
    assert "Each person of each site lost at most epsilon" in text
    assert "one person of a site's dataset, with all their records; neighbours: add or remove one person" in text
    assert "a step takes at most 2 records, chosen at random from that person's alone" in text
    assert "No person has records at two sites." in text
    assert "for k records of one person epsilon" not in text
    stated = json.loads(said("--format", "json"))["guarantee"]
    assert (stated["unit"].split(",")[0], stated["records_per_person"]) == ("one person of a site's dataset", 2)
    page = moonflower_home / "run.html"
    done = CliRunner().invoke(report, [run, "--database", url, "--out", str(page)])
    assert done.exit_code == 0, done.output
    assert "Each person of each site lost at most" in page.read_text()
    ledger = prepare.run_folder(run) / "sites" / "north" / "ledger.db"
    with Account.read(ledger, "tiny.north") as account:
        (moonflower_home / "north.json").write_text(json.dumps(account.export()))
    verified = json.loads(said("--format", "json", "--verify", str(moonflower_home / "north.json")))
    assert verified["verifications"][0]["faults"] == []


def test_a_ledger_kept_for_records_does_not_confirm_a_promise_to_persons(
    tiny_scenario: Path, folder: Path, moonflower_home: Path
) -> None:
    url = f"sqlite:///{moonflower_home / 'history.db'}"
    moonflower_home.mkdir()
    with History.open(url) as history:
        run = prepare.prepare(made(tiny_scenario, folder), history)
    engine.play(run, url, None)
    with Account.read(prepare.run_folder(run) / "sites" / "north" / "ledger.db", "tiny.north") as account:
        export = account.export()
    header = {name: value for name, value in export["dataset"].items() if name != "unit"}
    head = ledger_chain.NO_HEAD
    for event in export["events"]:  # as a site could rewrite its own
        event["previous"] = head
        head = event["row"] = ledger_chain.row_digest(header, event)
    file = moonflower_home / "rewritten.json"
    file.write_text(json.dumps(export | {"dataset": header, "head": head}))
    with History.open(url) as history:
        recorded = statement.read(history, history.run(run))
    stated = verify.verify(statement.make(recorded, now=datetime.now(UTC)), recorded, [load(file)])
    faults = " ".join(stated.verifications[0].faults)
    assert "is kept for records, and the run's promise is to persons" in faults


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"privacy.unit": "record", "privacy.records_per_person": ""}, "has the person as its unit"),
        ({"data.unit_column": ""}, "declares its size as records=N"),
        ({"privacy.records_per_person": ""}, "needs privacy.records_per_person"),
        ({"privacy.unit": "record"}, "bounds persons' records, and privacy.unit is 'record'"),
        ({"sites": [{"name": "north", "persons": 60}], "federation.min_sites": 1}, "persons=60 and holds 30"),
        ({"privacy.delta": 1e-2}, r"above 1/\(10 x persons\)"),
    ],
    ids=str,
)
def test_a_scenario_that_confuses_records_and_persons_is_refused(
    tiny_scenario: Path, folder: Path, moonflower_home: Path, changes: dict[str, Any], fault: str
) -> None:
    moonflower_home.mkdir()
    with History.open("sqlite://") as history, pytest.raises(ConfigError, match=fault):
        prepare.prepare(made(tiny_scenario, folder, **changes), history)
