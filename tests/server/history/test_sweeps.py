"""Sweeps in the history: a place has one run, and a run knows its place."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from server.history.records import Trial
from server.history.store import History
from shared.errors import ConfigError, NotFoundError

VALUES = {"name": "x", "config": {}, "config_digest": "c0ffee", "rounds_planned": 3, "private": True, "version": "0"}
PLAN = {"grid": {"privacy.epsilon": [1.0, float("inf")]}, "seeds": [0, 1]}


@pytest.fixture
def sweep(history):
    return history.create_sweep("vader-1a2b3c", name="vader", plan=PLAN, version="0").id


def test_a_sweep_is_entered_once_and_read_back_as_it_was(history, sweep):
    again = history.create_sweep(sweep, name="another", plan={}, version="1")
    assert (again.name, again.plan, again.version) == ("vader", PLAN, "0")
    assert history.sweeps() == [again]
    assert history.sweep("vader-1a") == again


def test_a_sweep_that_is_not_here_or_not_the_only_one_is_named(history, sweep):
    history.create_sweep("vader-1a2b4d", name="vader", plan=PLAN, version="0")
    with pytest.raises(NotFoundError, match="There is no sweep 'zebra' here; `moonflower history sweeps`"):
        history.sweep("zebra")
    with pytest.raises(NotFoundError, match=r"Several sweeps begin with 'vader-1a2b' \(vader-1a2b3c, vader-1a2b4d\)"):
        history.trials("vader-1a2b")
    with pytest.raises(NotFoundError, match="There is no sweep ''"):
        history.sweep("")


def test_runs_know_their_places_and_other_runs_have_none(history, sweep):
    history.create_run("plain", **VALUES)
    places = [Trial(sweep, cell, seed) for cell in (1, 2) for seed in (0, 2**31 - 1)]
    for number, place in enumerate(places):
        history.create_run(f"r{number}", **VALUES, trial=place)
    assert history.run("plain").trial is None
    assert history.run("r3").trial == places[3]
    assert [run.id for run in history.trials(sweep)] == ["r3", "r2", "r1", "r0"]
    assert [run.id for run in history.trials(sweep, limit=1)] == ["r3"]
    assert len(history.runs()) == 5


def test_a_place_is_not_given_twice_and_the_second_run_is_not_entered(history, sweep):
    history.create_run("first", **VALUES, trial=Trial(sweep, 1, 0))
    with pytest.raises(ConfigError, match="has a run of cell 1, seed 0 already"):
        history.create_run("second", **VALUES, trial=Trial(sweep, 1, 0))
    assert [run.id for run in history.runs()] == ["first"]
    with pytest.raises(ConfigError, match="or is not here"):
        history.create_run("second", **VALUES, trial=Trial("no-such", 1, 0))
    assert [run.id for run in history.runs()] == ["first"]


def test_of_processes_that_take_a_place_at_once_one_has_it(shared_url):
    with History.open(shared_url) as history:
        history.create_sweep("s", name="s", plan=PLAN, version="0")

    gate = Barrier(6)

    def take(number):
        with History.open(shared_url) as mine:
            gate.wait(30)
            try:
                mine.create_run(f"r{number}", **VALUES, trial=Trial("s", 1, 0))
            except ConfigError as error:
                return error

    with ThreadPoolExecutor(6) as pool:
        errors = list(pool.map(take, range(6)))
    assert errors.count(None) == 1
    assert all("cell 1, seed 0 already" in str(error) for error in errors if error)
    with History.open(shared_url) as history:
        assert len(history.runs()) == len(history.trials("s")) == 1
