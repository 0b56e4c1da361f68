"""The ServerApp's wiring: a run's folder in, one line where it is none."""

import json

import pytest
from flwr.app import Context, RecordDict

from client.app import build as build_client
from client.app import site_from_context
from server import app
from server.history.store import History
from server.observer import Log
from shared.errors import ConfigError
from simulations import prepare, scenario
from simulations.grid import InProcessGrid

SHORT = {"training.rounds": 1, "warm_start.rounds": 0, "refit.rounds": 0}


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "3", "{}", '{"run": "a"}', '{"config": {}}'], ids=lambda text: repr(text)
)
def test_a_folder_that_holds_no_run_is_one_line_that_says_how_to_make_one(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"is not the folder of a run; make one with `moonflower simulate --prepare`"):
        app.load_job(tmp_path)


def test_a_configuration_of_another_version_names_its_settings(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"run": "a", "config": {"speed": 3}}))
    with pytest.raises(ConfigError, match=r"run.json: .*unknown setting 'speed'"):
        app.load_job(tmp_path)


def test_the_app_plays_the_run_that_flowers_configuration_names(moonflower_home, tiny_scenario, caplog):
    caplog.set_level("INFO", "moonflower.run")
    moonflower_home.mkdir()
    database = f"sqlite:///{moonflower_home / 'other.db'}"
    with History.open(database) as history:
        run = prepare.prepare(scenario.load(str(tiny_scenario), SHORT), history)
        context = Context(
            run_id=1,
            node_id=0,
            node_config={},
            state=RecordDict(),
            run_config={"run": str(prepare.run_folder(run)), "database": database, "engine": "a test"},
        )
        app.build(Log())(InProcessGrid(build_client(site_from_context), prepare.site_files(run)), context)
        assert history.run(run).status == "completed"
        assert [attempt.engine for attempt in history.attempts(run)] == ["a test"]
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == f"run {run}: 1 rounds, private, sites north, south, west"
    assert lines[1].startswith("round 1: accuracy 0.")
    assert "epsilon 8.00 of 8" in lines[1] or "epsilon 7.99 of 8" in lines[1]
