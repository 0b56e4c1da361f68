"""`moonflower history` and `moonflower database`, as a person or a script runs them."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace

import click
import pytest
from click.testing import CliRunner

from server.cli import database, history
from server.history import schema
from server.history.records import Participation, Trial
from server.history.store import History
from shared.errors import ConfigError, DatabaseError, MoonflowerError, NotFoundError
from shared.paths import default_database, home

LISTINGS = ["rounds", "metrics", "participations", "spends", "events"]
ESCAPE = "\x1b[31m[red]no[/red]\nsecond line"


@pytest.fixture
def url(sqlite_url, new_run, new_round):
    """Make a history with a private run of three rounds and, newer, one without privacy of one round."""
    with History.open(sqlite_url) as store:
        new_run(store, "lungs-1")
        for number in range(1, 4):
            store.commit_round(new_round(number))
        new_run(store, "open-2", private=False)
        loud = Participation("aku", "train", "failed", 1.0, 0, 0, error=ESCAPE + " and so on" * 40)
        round = new_round(1, run="open-2", epsilon=float("inf"))
        store.commit_round(replace(round, participations=(*round.participations[:2], loud)))
    return sqlite_url


def call(group, *arguments, url):
    return CliRunner().invoke(group, [*arguments, "--database", url], catch_exceptions=True)


def said(group, *arguments, url):
    result = call(group, *arguments, url=url)
    assert result.exception is None, result.output
    return result.stdout


def rows(*arguments, url):
    return json.loads(said(history, *arguments, "--format", "json", url=url))


def refused(group, *arguments, url):
    error = call(group, *arguments, url=url).exception
    assert isinstance(error, MoonflowerError)
    return error


@pytest.mark.parametrize("listing", LISTINGS)
def test_csv_and_json_hold_the_same_rows(url, listing):
    expected = rows(listing, "lungs-1", url=url)
    assert expected
    text = said(history, listing, "lungs-1", "--format", "csv", url=url)
    got = list(csv.DictReader(io.StringIO(text)))
    assert got == [{k: "" if v is None else str(v) for k, v in row.items()} for row in expected]
    assert list(got[0])[:2] == ["run", "private"]


@pytest.mark.parametrize("listing", LISTINGS)
def test_a_table_shows_every_value_of_its_rows(url, listing):
    table = said(history, listing, "lungs-1", url=url)
    assert "Run lungs-1 (Lungs), with differential privacy" in table.splitlines()[0]
    for row in rows(listing, "lungs-1", url=url):
        left_out = {"private", "run", "ledger_id", "ledger_head"}
        words = {str(v) for k, v in row.items() if k not in left_out and isinstance(v, str | int)}
        words -= {word for word in words if "T" in word and word[:2] == "20"}  # times are shown shorter
        assert any(all(word in line for word in words) for line in table.splitlines()), words


def test_the_runs_are_listed_with_what_privacy_they_have(url):
    table = said(history, "runs", url=url)
    lungs, without = (next(line for line in table.splitlines() if name in line) for name in ("lungs-1", "open-2"))
    assert "∞ (no privacy)" in without
    assert "differential" in lungs
    assert [(row["run"], row["private"], row["rounds_done"]) for row in rows("runs", url=url)] == [
        ("open-2", False, 1),
        ("lungs-1", True, 3),
    ]


@pytest.mark.parametrize("listing", LISTINGS)
def test_every_listing_of_a_run_without_privacy_says_so(url, listing):
    assert "epsilon ∞ (no privacy)" in said(history, listing, "open-2", url=url)
    assert all(row["private"] is False for row in rows(listing, "open-2", url=url))
    assert ",False," in said(history, listing, "open-2", "--format", "csv", url=url)


def test_an_infinite_epsilon_is_plain_in_a_table_and_strict_in_json_and_csv(url):
    assert "∞ (no privacy)" in said(history, "spends", "open-2", url=url).splitlines()[3]
    text = said(history, "spends", "open-2", "--format", "json", url=url)
    parsed = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert {row["epsilon"] for row in parsed} == {"Infinity"}
    assert ",Infinity," in said(history, "spends", "open-2", "--format", "csv", url=url)


def test_last_is_the_newest_run_and_a_beginning_is_enough(url):
    assert {row["run"] for row in rows("rounds", "last", url=url)} == {"open-2"}
    assert {row["run"] for row in rows("rounds", "lun", url=url)} == {"lungs-1"}


def test_site_and_round_choose_rows(url):
    chosen = rows("participations", "lungs-1", "--site", "st-marys", "--round", "2", url=url)
    assert [(row["round"], row["site"], row["kind"]) for row in chosen] == [
        (2, "st-marys", "train"),
        (2, "st-marys", "evaluate"),
    ]
    assert {row["round"] for row in rows("rounds", "lungs-1", "--round", "3", url=url)} == {3}


def test_a_round_says_what_came_from_its_sites_and_what_went_to_them(url, new_run, new_round):
    parts = new_round(1).participations
    up, down = sum(part.bytes_up for part in parts), sum(part.bytes_down for part in parts)
    assert [(row["bytes_up"], row["bytes_down"]) for row in rows("rounds", "lungs-1", url=url)] == [(up, down)] * 3
    with History.open(url) as store:
        store.commit_round(replace(new_round(4), participations=()))
    (row,) = rows("rounds", "lungs-1", "--round", "4", url=url)
    assert (row["bytes_up"], row["bytes_down"]) == (0, 0)
    assert str(up) in said(history, "rounds", "lungs-1", url=url)


def test_a_limit_keeps_the_newest_rows_and_says_that_it_did(url):
    result = call(history, "metrics", "lungs-1", "--limit", "4", "--format", "json", url=url)
    assert [row["round"] for row in json.loads(result.stdout)] == [2, 3, 3, 3]
    assert result.stderr == "These are the newest 4 rows; --limit 0 shows all.\n"
    assert "These are the newest 4 rows" in said(history, "metrics", "lungs-1", "--limit", "4", url=url)
    assert len(rows("metrics", "lungs-1", "--limit", "0", url=url)) == 9
    assert [row["run"] for row in rows("runs", "--limit", "1", url=url)] == ["open-2"]
    for enough in ("9", "0"):
        assert "newest" not in call(history, "metrics", "lungs-1", "--limit", enough, url=url).output


def test_nothing_to_show_is_said_in_each_format(url):
    assert "Nothing to show." in said(history, "metrics", "lungs-1", "--site", "nobody", url=url)
    assert rows("metrics", "lungs-1", "--site", "nobody", url=url) == []
    header = said(history, "metrics", "lungs-1", "--site", "nobody", "--format", "csv", url=url)
    full = said(history, "metrics", "lungs-1", "--format", "csv", url=url)
    assert header.splitlines() == full.splitlines()[:1]


def test_a_pipe_gets_every_column_whole(url):
    table = said(history, "participations", "open-2", url=url)
    assert " and so on" * 40 in table
    assert len(table.splitlines()) == 6


def test_a_sites_message_cannot_steer_the_terminal(url):
    table = said(history, "participations", "open-2", url=url)
    assert "\x1b" not in table
    assert "\ufffd[31m[red]no[/red]\ufffdsecond line" in table
    kept = next(row["error"] for row in rows("participations", "open-2", url=url) if row["error"])
    assert kept.startswith(ESCAPE)


def test_an_unknown_run_names_the_command_that_lists_them(url, tmp_path):
    assert "`moonflower history runs` lists them" in str(refused(history, "rounds", "zebra", url=url))
    empty = f"sqlite:///{tmp_path / 'empty.db'}"
    History.open(empty).close()
    error = refused(history, "rounds", "last", url=empty)
    assert isinstance(error, NotFoundError)
    assert "There is no run yet" in str(error)


def test_reading_a_missing_database_neither_works_nor_makes_it(tmp_path):
    error = refused(history, "runs", url=f"sqlite:///{tmp_path / 'none.db'}")
    assert isinstance(error, DatabaseError)
    assert list(tmp_path.iterdir()) == []


def test_the_default_database_is_named_by_the_environment(monkeypatch, tmp_path, url):
    monkeypatch.delenv("MOONFLOWER_DATABASE", raising=False)
    monkeypatch.delenv("MOONFLOWER_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".moonflower"
    monkeypatch.setenv("MOONFLOWER_HOME", str(tmp_path / "moon"))
    assert default_database() == f"sqlite:///{tmp_path / 'moon' / 'history.db'}"
    monkeypatch.setenv("MOONFLOWER_DATABASE", url)
    assert "lungs-1" in CliRunner().invoke(history, ["runs"]).output


def test_the_status_of_a_database_is_told_in_each_state(url, tmp_path, monkeypatch):
    def status(where):
        return json.loads(said(database, "status", "--format", "json", url=where))[0]

    assert status(url) == {"database": url, "state": "newest", "revision": schema.NEWEST, "newest": schema.NEWEST}
    assert status(f"sqlite:///{tmp_path / 'none.db'}")["state"] == "empty"
    monkeypatch.setattr(schema, "NEWEST", "9999")
    assert status(url)["state"] == "older"
    assert "older" in said(database, "status", url=url)


def test_an_upgrade_says_what_it_did(tmp_path, url):
    fresh = f"sqlite:///{tmp_path / 'fresh.db'}"
    assert f"upgraded from nothing to revision {schema.NEWEST}" in said(database, "upgrade", url=fresh)
    assert f"already at revision {schema.NEWEST}" in said(database, "upgrade", url=fresh)


def test_a_password_is_never_printed(postgres_url):
    secret = postgres_url.replace("postgres:@", "postgres:s3cret@")
    assert "s3cret" in secret
    printed = said(database, "upgrade", url=secret) + said(database, "status", url=secret)
    assert "postgres:***@" in printed
    assert "s3cret" not in printed
    assert "s3cret" not in str(refused(history, "runs", url="postgresql://u:s3cret@127.0.0.1:1/x"))


def test_the_commands_work_on_postgresql(postgres_url, new_run, new_round):
    with History.open(postgres_url) as store:
        new_run(store)
        store.commit_round(new_round(1))
    for listing in LISTINGS:
        assert rows(listing, "last", url=postgres_url)


@pytest.mark.parametrize("group", [history, database], ids=["history", "database"])
def test_every_command_is_documented_with_an_example(group):
    for command in [group, *group.commands.values()]:
        assert "Example: moonflower " in (command.help or ""), command.name
        assert all(option.help for option in command.params if isinstance(option, click.Option))


def test_a_bad_option_is_refused_before_the_database_is_opened():
    result = CliRunner().invoke(history, ["metrics", "last", "--round", "0", "--database", "nonsense"])
    assert result.exit_code == 2
    assert "0 is not in the range x>=1" in result.output


def test_help_needs_no_database_driver_and_no_torch():
    code = "import sys, server.cli; print(*({'torch', 'flwr', 'sqlalchemy', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


def test_errors_of_settings_and_of_databases_share_an_exit_code():
    assert ConfigError.exit_code == DatabaseError.exit_code == NotFoundError.exit_code == 2


def test_the_runs_of_a_sweep_are_listed_by_themselves_and_sweeps_with_how_far_they_are(url):
    with History.open(url) as store:
        store.create_sweep("lungs-5ca1e", name="lungs", plan={}, version="0")
        values = {"name": "x", "config": {}, "config_digest": "c0ffee", "rounds_planned": 3, "private": True}
        for seed in (0, 1):
            store.create_run(f"trial-{seed}", **values, version="0", trial=Trial("lungs-5ca1e", 4, seed))
        store.finish_run("trial-0", "completed")
    listed = rows("runs", "--sweep", "last", url=url)
    assert [(row["run"], row["sweep"], row["cell"]) for row in listed] == [
        ("trial-1", "lungs-5ca1e", 4),
        ("trial-0", "lungs-5ca1e", 4),
    ]
    assert [row["sweep"] for row in rows("runs", url=url)] == ["lungs-5ca1e", "lungs-5ca1e", None, None]
    assert said(history, "runs", "--sweep", "lungs", url=url).startswith("Runs of sweep lungs-5ca1e, newest first\n")
    (row,) = rows("sweeps", url=url)
    assert (row["sweep"], row["name"], row["runs"], row["completed"]) == ("lungs-5ca1e", "lungs", 2, 1)
    assert isinstance(refused(history, "runs", "--sweep", "zebra", url=url), NotFoundError)


def test_asking_for_the_last_sweep_where_there_is_none_names_the_command_that_makes_one(url):
    assert "`moonflower sweep` makes one" in str(refused(history, "runs", "--sweep", "last", url=url))
