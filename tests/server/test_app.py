"""The ServerApp's wiring."""

from flwr.app import Context, RecordDict

from client.app import build as build_client
from client.app import site_from_context
from server import app
from server.history.store import History
from server.observer import Log
from simulations import prepare, scenario
from simulations.grid import InProcessGrid

SHORT = {"training.rounds": 1, "warm_start.rounds": 0, "refit.rounds": 0}


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
        app.build(Log())(InProcessGrid(build_client(site_from_context), prepare.nodes(run)), context)
        assert history.run(run).status == "completed"
        assert [attempt.engine for attempt in history.attempts(run)] == ["a test"]
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == f"run {run}: 1 rounds, private, sites north, south, west"
    assert lines[1].startswith("round 1: accuracy 0.")
    assert "epsilon 8.00 of 8" in lines[1] or "epsilon 7.99 of 8" in lines[1]
