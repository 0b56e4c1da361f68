"""`moonflower simulate`, as a person runs it: what it prints, and every mistake in one line with nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest
import tomli_w

from server.history.records import Checkpoint, Metric, Round, Spend
from server.history.store import History
from shared.cli import main
from simulations.cli import SITES_SHOWN, _table

FAST = ("--rounds", "1", "--set", "warm_start.rounds=0", "--set", "refit.rounds=0")


@pytest.fixture
def moonflower(moonflower_home, monkeypatch, capfd):
    """Run the command line in this process, to its exit code, standard output and standard error."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["moonflower", *(str(argument) for argument in arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def refused(moonflower, moonflower_home):
    """Run a command that must fail with one line and code 2, and leave neither a run's folder nor its row."""

    def run(*arguments):
        code, out, err = moonflower("simulate", *arguments)
        assert code == 2, err
        assert out == ""
        assert err.startswith("Error: ")
        assert len(err.splitlines()) == 1, err
        assert err.endswith((".\n", "?\n"))
        folder = moonflower_home / "runs"
        assert not folder.is_dir() or not list(folder.iterdir())
        if (moonflower_home / "history.db").exists():
            with History.open(f"sqlite:///{moonflower_home / 'history.db'}") as history:
                assert history.runs() == []
        return err

    return run


@pytest.fixture
def scenario_file(tiny_scenario, tmp_path):
    """Write the tiny scenario with other values."""

    def write(**changes):
        values = tomllib.loads(tiny_scenario.read_text(encoding="utf-8"))
        values["data"]["folder"] = str(tiny_scenario.parent)
        for key, value in changes.items():
            values[key] = value
        file = tmp_path / "changed.toml"
        file.write_text(tomli_w.dumps(values), encoding="utf-8")
        return file

    return write


MISTAKES = {
    "epsilon of nothing": (["--epsilon", "0"], "privacy.epsilon=0.0 must be above 0"),
    "negative epsilon": (["--epsilon", "-1"], "privacy.epsilon=-1.0 must be above 0"),
    "epsilon that is no number": (["--epsilon", "nan"], "privacy.epsilon=nan must be above 0"),
    "epsilon as a word": (["--epsilon", "eight"], "'eight' is not a valid float"),
    "epsilon above the sites' limit": (["--epsilon", "12"], "privacy.epsilon=12 is above this site's limit of 8"),
    "more than a dataset's budget": (["--set", "policy.max_epsilon=8"], "above the limit of 8"),
    "delta too large": (["--set", "privacy.delta=0.01"], "privacy.delta=0.01 is above 1/(10 x records)"),
    "delta above the sites' limit": (
        ["--set", "privacy.delta=1e-4"],
        "privacy.delta=0.0001 is above this site's limit",
    ),
    "noise above the most": (["--epsilon", "0.05"], "above privacy.max_noise_multiplier=20"),
    "an unknown section": (["--set", "trainig.rounds=1"], "unknown setting 'trainig'"),
    "an unknown key": (["--set", "training.round=1"], "unknown setting 'training.round'"),
    "a number as text": (["--set", "training.rounds='3'"], "training.rounds='3' must be a whole number"),
    "a truth for a number": (["--set", "training.rounds=true"], "training.rounds=True must be a whole number"),
    "a share above one": (["--set", "training.sampling_rate=1.5"], "training.sampling_rate=1.5 must be at most 1"),
    "both batch and rate": (["--set", "training.batch_size=5"], "batch_size=5 and sampling_rate=0.5"),
    "no rounds": ([*FAST, "--rounds", "0"], "no phase has a round"),
    "no equals": (["--set", "training.rounds"], "is not KEY=VALUE"),
    "into a value": (["--set", "training.rounds.x=1"], "'rounds' is a value and not a section"),
    "no such layer": (["--set", "model.lora.targets=['nothing']"], "match no layer"),
    "no such model": (["--set", "model.name='/nowhere'"], "model.name='/nowhere' is not a folder"),
    "another digest": (["--set", f"model.digest='{'0' * 64}'"], "is not that of"),
    "an unknown label": (["--set", "task.labels=['good', 'bad']"], "is not one of the declared"),
    "a missing file": (["--set", "data.folder='/nowhere'"], "/nowhere holds no records of 'north'"),
    "a bad URL": (["--database", "nonsense"], "database URL cannot be read"),
    "another database": (["--database", "mysql://x@y/z"], "'mysql' is not supported"),
    "no such folder": (["--database", "sqlite:////nowhere/at/all.db"], "does not exist"),
    "a database in memory": (["--database", "sqlite://"], "ends with the process"),
    "an option that is none": (["--epsilom", "3"], "No such option"),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_with_nothing_left_behind(refused, tiny_scenario, arguments, said):
    assert said in refused(tiny_scenario, *arguments)


def test_an_unknown_scenario_is_answered_with_those_that_are_built_in(refused):
    assert "scenario 'vadr' is not built in (" in refused("vadr")
    assert "/nowhere.toml cannot be read: No such file" in refused("/nowhere.toml")


def test_a_file_that_is_no_toml_is_named(refused, tmp_path):
    (tmp_path / "bad.toml").write_text("rounds = = 3\n")
    assert "bad.toml is not TOML: " in refused(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    assert "bad.toml is not TOML: " in refused(tmp_path / "bad.toml")


def test_a_batch_above_the_data_is_refused_with_the_most(refused, scenario_file):
    file = scenario_file(training={"rounds": 1, "batch_size": 49})
    assert "training.batch_size=49 is above the 48 training records that dataset 'tiny.north' declares" in refused(file)


def test_a_declared_size_far_from_the_truth_is_refused_with_a_better_one(refused, scenario_file):
    err = refused(scenario_file(sites=[{"name": "north", "records": 90}], federation={"min_sites": 1}))
    assert "'north' declares records=90 and holds 60; declare its size rounded, as 60" in err


def test_a_site_without_a_file_is_named(refused, scenario_file):
    err = refused(scenario_file(sites=[{"name": "east", "records": 60}], federation={"min_sites": 1}))
    assert "holds no records of 'east'; data.folder needs, for each site, one SITE.jsonl" in err


def test_rows_that_break_the_declaration_are_named_before_anything_runs(refused, scenario_file, tmp_path):
    data = {"source": "folder", "folder": str(tmp_path)}
    file = scenario_file(sites=[{"name": "east", "records": 60}], federation={"min_sites": 1}, data=data)
    good = '{"id": 1, "text": "good", "label": "positive"}\n'
    for row, said in {
        "{": "row 2: not a JSON object",
        '{"id": 2, "label": "positive"}': "row 2: column 'text' is missing",
        '{"id": 2, "text": " ", "label": "positive"}': "row 2: 'text' is empty",
        '{"id": 1, "text": "bad", "label": "negative"}': "row 2: id '1' stands twice",
    }.items():
        (tmp_path / "east.jsonl").write_text(good + row + "\n")
        assert said in refused(file)
    (tmp_path / "east.jsonl").write_text(good)
    (tmp_path / "test.jsonl").write_text('{"text": 3, "label": "positive"}\n')
    assert "test.jsonl, row 1: 'text' holds a whole number, and no text" in refused(file)


def test_a_home_that_cannot_be_written_is_named(refused, tiny_scenario, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOONFLOWER_HOME", str(tmp_path / "file" / "home"))
    assert f"MOONFLOWER_HOME='{tmp_path / 'file' / 'home'}' cannot be written" in refused(tiny_scenario)


def test_resuming_what_cannot_be_resumed_is_refused(refused, tiny_scenario):
    assert "There is no run 'zebra' here; `moonflower history runs` lists them" in refused("--resume", "zebra")
    assert "There is no run yet" in refused("--resume", "last")
    own = "--resume goes on with the run's own configuration"
    for more in (["--seed", "0"], ["--epsilon", "0"], ["--rounds", "3"], ["--set", "seed=1"], [tiny_scenario]):
        assert own in refused("--resume", "last", *more)


def test_quiet_prints_the_runs_id_and_nothing_else(moonflower, tiny_scenario):
    code, out, err = moonflower("simulate", tiny_scenario, "--quiet", *FAST)
    assert (code, err) == (0, "")
    assert out.startswith("tiny-")
    assert len(out.splitlines()) == 1


def test_json_is_one_object_on_standard_output(moonflower, tiny_scenario, moonflower_home):
    code, out, err = moonflower("simulate", tiny_scenario, "--format", "json", *FAST, "--set", "name='other-name'")
    assert code == 0, err
    said = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (said["status"], said["private"], said["rounds"]) == ("completed", True, 1)
    assert said["run"].startswith("other-name-")
    assert set(said["epsilon"]) == {
        f"{site}/{part}" for site in ("north", "south", "west") for part in ("train", "validation")
    }
    assert all(7.9 < value <= 8 for value in said["epsilon"].values())
    assert 0 <= said["test"]["accuracy"] <= 1
    with History.open(said["database"]) as history:
        assert history.run(said["run"]).config["training"]["rounds"] == 1


def test_without_privacy_the_screen_says_so_in_capitals_and_json_says_inf(moonflower, tiny_scenario):
    code, out, err = moonflower("simulate", tiny_scenario, "--epsilon", "inf", *FAST)
    assert code == 0, err
    assert out.count("WITHOUT PRIVACY") == 2
    code, out, _ = moonflower("simulate", tiny_scenario, "--epsilon", "inf", "--format", "json", *FAST)
    said = json.loads(out)
    assert said["private"] is False
    assert set(said["epsilon"].values()) == {"inf"}


def test_a_run_that_is_done_is_not_resumed_and_one_that_failed_is(moonflower, tiny_scenario, moonflower_home):
    code, out, _ = moonflower("simulate", tiny_scenario, "--quiet", *FAST)
    assert code == 0
    done = out.strip()
    code, out, err = moonflower("simulate", "--resume", done)
    assert (code, out) == (2, "")
    assert err == f"Error: Run '{done}' is already completed; start a new run to train further.\n"

    code, out, _ = moonflower("simulate", tiny_scenario, "--prepare", "--format", "json", *FAST)
    run = json.loads(out)["run"]
    rows = [moonflower_home / "runs" / run / "sites" / site / "records.jsonl" for site in ("north", "south")]
    texts = [file.read_text() for file in rows]
    for file in rows:
        file.write_text("a patient's secret\n")
    code, out, err = moonflower("simulate", "--resume", "last", "--quiet")
    assert code == 1
    assert "1 of the federation.min_sites=2 sites joined" in err.splitlines()[-1]
    assert "secret" not in err
    for file, text in zip(rows, texts, strict=True):
        file.write_text(text)
    assert moonflower("simulate", "--resume", "last", "--quiet")[:2] == (0, f"{run}\n")


def test_a_run_whose_folder_is_elsewhere_says_where_to_resume(moonflower, tiny_scenario, moonflower_home):
    _, out, _ = moonflower("simulate", tiny_scenario, "--prepare", "--format", "json", *FAST)
    (moonflower_home / "runs").rename(moonflower_home / "gone")
    code, _, err = moonflower("simulate", "--resume", json.loads(out)["run"])
    assert code == 2
    assert "holds no simulated sites; resume where the run was started (MOONFLOWER_HOME)" in err
    assert len(err.splitlines()) == 1


def test_a_user_in_a_shell_gets_one_line_and_code_2(moonflower_home):
    command = [Path(sys.executable).parent / "moonflower", "simulate", "--set", "privacy.epsilon=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: vader.toml: privacy.epsilon=0 must be above 0.\n"


def test_the_last_table_of_thousands_of_sites_is_short_and_not_late():
    names = [f"site-{number:05d}" for number in range(20_000)]
    spends = tuple(Spend(name, name, "train", 1.0, 1e-5, 2.0, 0.1, 1, 8.0) for name in names)
    metrics = tuple(Metric("validation", name, "accuracy", 0.5) for name in names)
    checkpoint = Checkpoint("0" * 64, 1)
    last = Round("r", 1, 1, "training", datetime.now(UTC), 1.0, checkpoint, (), metrics, spends)
    table = _table(last)
    assert (table.row_count, list(table.columns[0].cells)) == (SITES_SHOWN, names[:SITES_SHOWN])
    assert set(table.columns[4].cells) == {"0.500"}
