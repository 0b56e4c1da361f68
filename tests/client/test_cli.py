"""`moonflower ledger` as a person at a site uses it, on a real ledger."""

import json
import math
import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from client import site as sites
from client.cli import ledger as command
from client.privacy import ledger_count, ledger_export
from client.privacy.events import Part
from client.privacy.ledger import Ledger, Question
from shared import accounting, ledger_chain
from shared.accounting import Release
from shared.cli import root
from shared.errors import ConfigError, DatabaseError, DataError, NotFoundError

ROUND, SCORES, NO_NOISE = Release(0.032, 1.0, 32), Release(1.0, 20.0, 1), Release(0.032, 0.0, 32)


def open_for(own: Any) -> Ledger:
    privacy = own.privacy
    return Ledger.open(own.ledger, dataset=own.dataset.id, delta=privacy.delta, max_epsilon=privacy.max_epsilon)


def charge(ledger: Ledger, number: int, run: str, part: Part, release: Release) -> None:
    question = Question(
        run, f"{run}/{number}/{part}", "d" * 64, number, "train" if part == "train" else "evaluate", part
    )
    ledger.charge(question, release, lambda *_: b"reply", allow_unbounded=True)


@pytest.fixture
def own(new_site: Callable[..., Any]) -> Any:
    """Give a site that took part in two runs."""
    own = new_site()
    with open_for(own) as ledger:
        for run in ("first", "second"):
            for number in (1, 2):
                charge(ledger, number, run, "train", ROUND)
            charge(ledger, 2, run, "validation", SCORES)
    return own


def of(own: Any) -> list[str]:
    return ["--ledger", str(own.ledger), "--dataset", own.dataset.id]


def asked(*arguments: str) -> Result:
    return CliRunner().invoke(root, ["ledger", *arguments])


def text(*arguments: str) -> str:
    result = asked(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_show_lists_what_was_released_and_what_is_reserved(own: Any) -> None:
    shown = text("show", *of(own))
    assert "dataset notes-of-clinic: 6 events" in shown
    assert sum("gaussian" in line for line in shown.splitlines()) == 6
    assert "Reserved" not in shown
    with open_for(own) as ledger, ledger.reserve(Question("third", "third/1", "d", 1, "train", "train"), ROUND):
        shown = text("show", *of(own), "--limit", "1")
    assert "The newest 1 of 6 events" in shown
    assert "third" in shown[shown.index("Reserved by rounds under way") :]


def test_a_sites_toml_names_its_ledger(own: Any) -> None:
    toml = str(own.ledger.with_name("site.toml"))
    assert text("show", "--site", toml) == text("show", *of(own))
    assert "200" in text("epsilon", "--site", toml)  # its limit


def test_show_and_export_agree_and_what_is_exported_can_be_verified(own: Any, tmp_path: Path) -> None:
    export = json.loads(text("export", *of(own)))
    assert ledger_chain.verify(export) is None
    assert json.loads(text("show", *of(own), "--format", "json")) == export
    out = tmp_path / "export.json"
    assert f"6 events of dataset notes-of-clinic, head {export['head'][:16]}" in text(
        "export", *of(own), "--out", str(out)
    )
    assert json.loads(out.read_text()) == export
    assert "6 events" in text("verify", "--export", str(out))
    export["events"][3]["steps"] = 1
    out.write_text(json.dumps(export))
    broken = asked("verify", "--export", str(out))
    assert isinstance(broken.exception, DataError)
    assert "event 4 was edited" in str(broken.exception)


@pytest.mark.parametrize(
    "name",
    [
        "ledger.db",
        "ledger.db.count",
        "ledger.db-wal",
        "ledger.db.new",
        "split.key",
        "site.toml",
        "records.jsonl",
        "link",
    ],
)
def test_an_export_is_written_over_nothing_but_an_export(own: Any, name: str) -> None:
    sites.split_key(own)
    folder = own.ledger.parent
    (folder / "link").symlink_to(own.ledger)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert own.dataset.path.name == "records.jsonl"
    result = asked("export", *of(own), "--out", str(folder / name))
    assert isinstance(result.exception, ConfigError)
    assert "choose another name" in str(result.exception)
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() <= {"ledger.db-wal", "ledger.db-shm"}  # SQLite's own
    assert "6 events" in text("verify", *of(own))


def test_an_earlier_export_is_replaced_and_stays_whole_on_a_full_disk(own: Any, tmp_path: Path) -> None:
    out = tmp_path / "export.json"
    text("export", *of(own), "--out", str(out))
    before = out.read_bytes()
    with open_for(own) as ledger:
        charge(ledger, 3, "third", "train", ROUND)
        values = ledger.export()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(ConfigError, match="cannot be written"):
            ledger_export.write(out, values, own.ledger)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert out.read_bytes() == before
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".export")]
    text("export", *of(own), "--out", str(out))
    assert len(json.loads(out.read_text())["events"]) == 7


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 100_000, "\xff", "[1, 2]", '"x"', "9" * 5000],
    ids=["deep", "deeper", "no text", "a list", "a text", "a number"],
)
def test_an_export_that_is_none_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "export.json"
    file.write_text(content, encoding="latin-1")
    result = asked("verify", "--export", str(file))
    assert isinstance(result.exception, DataError)
    assert len(str(result.exception).splitlines()) == 1
    assert result.exception.exit_code == 2


def test_epsilon_is_what_an_accountant_makes_of_the_events(own: Any) -> None:
    values = json.loads(text("epsilon", *of(own), "--format", "json"))
    expected = {"train": [ROUND, ROUND], "validation": [SCORES]}
    for row in values["runs"]:
        assert row["epsilon"] == accounting.epsilon(expected[row["part"]], 1e-3)
    assert [(row["run"], row["part"], row["releases"]) for row in values["runs"]] == [
        *[("first", "train", 2), ("first", "validation", 1)],
        *[("second", "train", 2), ("second", "validation", 1)],
    ]
    train, _ = values["lifetime"]
    spent = 4 * accounting.rdp(ROUND, values["order"])
    assert train["epsilon"] == pytest.approx(accounting.rdp_to_epsilon(spent, values["order"], 1e-3), rel=1e-12)
    assert train["if_planned_in_advance"] == accounting.epsilon([ROUND] * 4, 1e-3)
    lower = json.loads(text("epsilon", *of(own), "--format", "json", "--delta", "1e-6"))
    assert lower["runs"][0]["epsilon"] > values["runs"][0]["epsilon"]
    assert lower["lifetime"] == values["lifetime"]
    table = text("epsilon", *of(own))
    assert "by PLD at delta 0.001" in table
    assert "if planned in advance" in table


def test_no_privacy_is_said_so_and_the_json_stays_strict(own: Any) -> None:
    with open_for(own) as ledger:
        charge(ledger, 3, "third", "train", NO_NOISE)
        assert ledger.lifetime_epsilon() == math.inf
    assert "∞ (no privacy)" in text("epsilon", *of(own))
    values = json.loads(text("epsilon", *of(own), "--format", "json"), parse_constant=pytest.fail)
    assert values["lifetime"][0]["epsilon"] == "Infinity"


@pytest.mark.parametrize("name", ["show", "export", "epsilon", "verify"])
def test_every_command_refuses_a_broken_chain(own: Any, name: str) -> None:
    assert text(name, *of(own))
    connection = sqlite3.connect(own.ledger)
    connection.execute("DROP TRIGGER spends_update")
    connection.execute("UPDATE spends SET noise_multiplier = 5 WHERE number = 4")
    connection.commit()
    connection.close()
    result = asked(name, *of(own))
    assert isinstance(result.exception, DatabaseError)
    assert "event 4 was edited" in str(result.exception)
    assert result.output == ""


def test_a_lost_counter_is_written_anew_only_when_asked(own: Any) -> None:
    ledger_count.file_of(own.ledger).unlink()
    assert isinstance(asked("verify", *of(own)).exception, DatabaseError)
    for damaged in (False, True):
        if damaged:
            ledger_count.file_of(own.ledger).write_text('{"format": "moonflower')
        said = text("verify", *of(own), "--new-count")
        assert "counts 6 events of dataset notes-of-clinic now" in said
    assert isinstance(asked("verify", *of(own), "--new-count").exception, ConfigError)


@pytest.mark.parametrize(
    "arguments",
    [[], ["--ledger", "x.db"], ["--dataset", "x"], ["--site", "s.toml", "--ledger", "x.db", "--dataset", "x"]],
)
def test_an_account_is_named_in_one_of_two_ways(arguments: list[str]) -> None:
    result = asked("show", *arguments)
    assert result.exit_code == 2
    assert "give --site SITE.TOML, or --ledger FILE and --dataset ID" in result.output
    assert asked("verify", "--export", "x.json", "--new-count").exit_code == 2


def test_what_is_not_there_is_one_line(own: Any, tmp_path: Path) -> None:
    assert isinstance(asked("show", "--ledger", str(tmp_path / "no.db"), "--dataset", "x").exception, NotFoundError)
    assert isinstance(asked("show", "--ledger", str(own.ledger), "--dataset", "x").exception, NotFoundError)
    assert isinstance(asked("show", "--site", str(tmp_path / "no.toml")).exception, ConfigError)
    folder = asked("show", "--ledger", str(tmp_path), "--dataset", "x").exception
    assert "is a folder, not a ledger" in str(folder)
    assert isinstance(asked("verify", "--export", str(tmp_path / "no.json")).exception, DataError)
    assert isinstance(asked("export", *of(own), "--out", str(tmp_path / "no" / "x.json")).exception, ConfigError)


@pytest.mark.parametrize("name", sorted(command.commands))
def test_every_command_has_help_with_an_example(name: str) -> None:
    assert "Example: moonflower ledger" in text(name, "--help")


def test_a_broken_chain_ends_the_program_with_one_line_and_help_loads_nothing_heavy(own: Any) -> None:
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    program = [sys.executable, "-c", "from shared.cli import main; main()", "ledger"]
    loaded = subprocess.run([*program, "verify", "--help"], capture_output=True, text=True, check=True, env=environment)
    assert not [
        line for line in loaded.stderr.splitlines() if line.split("|")[-1].strip() in ("torch", "scipy", "pydantic")
    ]
    ledger_count.file_of(own.ledger).unlink()
    broken = subprocess.run([*program, "verify", *of(own)], capture_output=True, text=True, check=False)
    assert (broken.returncode, broken.stdout, len(broken.stderr.splitlines())) == (2, "", 1)
    assert broken.stderr.startswith("Error: The ledger")
