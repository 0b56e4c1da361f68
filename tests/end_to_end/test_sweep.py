"""Sweeps as real processes: what each cell came to, and sweeps that are killed, stopped, and given twice."""

import csv
import json
import math
import signal
import statistics
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest

from server.history.store import History
from server.privacy.statement import StudyError, check_no_study
from shared.processes import alive

T = 12.7062047364  # 97.5 % point of Student's t with one degree of freedom
GRID = ("--grid", "privacy.epsilon=2,8", "--grid", "training.local_steps=1,2", "--seeds", "2")
CELLS = {1: (2, 1), 2: (2, 2), 3: (8, 1), 4: (8, 2)}
ROUNDS = 6
SHORT = ("--set", "training.rounds=1")
SMALL = ("--set", "model.trainable=head", "--set", f"training.rounds={ROUNDS}", "--jobs", "2")
PATIENCE = 600.0


class Federation(Protocol):
    """The fixture's type: the tests' folders are no packages."""

    def __getattr__(self, name: str) -> Any: ...


def trials(federation: Federation) -> dict[tuple[int, int], list[str]]:
    """The runs of each place, as the history's file has them."""
    found: dict[tuple[int, int], list[str]] = {}
    for cell, seed, run in federation.asked("SELECT cell, seed, run_id FROM trials"):
        found.setdefault((cell, seed), []).append(run)
    return found


def finished(federation: Federation) -> list[str]:
    return [run for (run,) in federation.asked("SELECT id FROM runs WHERE status = 'completed'")]


def half_done(federation: Federation) -> list[str]:
    """Runs that have committed a round and are not at their end."""
    return [
        run
        for (run,) in federation.asked("SELECT id FROM runs WHERE status = 'running'")
        if 0 < federation.committed(run) < ROUNDS - 1
    ]


def signal_all(processes: list[psutil.Process], order: signal.Signals) -> None:
    for each in processes:
        with suppress(psutil.NoSuchProcess):  # a run that has just ended
            each.send_signal(order)


def kill(process: subprocess.Popen[str]) -> float:
    """Kill a sweep's process alone; give the seconds until all that it started were gone."""
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.kill()
    process.communicate()
    started = time.monotonic()
    while any(alive(each) for each in family):
        assert time.monotonic() - started < 10, "a run outlives its sweep"
        time.sleep(0.01)
    return time.monotonic() - started


def test_a_run_of_a_sweep_is_an_ordinary_run_that_is_charged_in_full_and_not_stated(federation: Federation) -> None:
    printed = federation.moonflower("sweep", federation.scenario, "--grid", "lora.rank=4", *SMALL, *SHORT)
    ((run,),) = trials(federation).values()
    (sweep,) = (row[0] for row in federation.asked("SELECT id FROM sweeps"))
    assert printed.splitlines()[0] == f"{sweep}: 1 run"
    federation.assert_finished_and_accounted_for(run, rounds=1)
    with (
        History.open(federation.database) as history,
        pytest.raises(StudyError, match=f"one of the 1 of sweep {sweep}"),
    ):
        check_no_study(history, history.run(run))


@pytest.mark.slow
def test_a_sweep_killed_at_any_point_goes_on_and_runs_each_cell_once(federation: Federation, tmp_path: Path) -> None:
    command = ("sweep", federation.scenario, *GRID, *SMALL)
    process = federation.start(*command)
    federation.wait_for(lambda: federation.asked("SELECT run_id FROM trials"), "first run")
    kill(process)  # it was entered, and not begun
    process = federation.start(*command)
    while True:
        federation.wait_for(lambda: half_done(federation) and finished(federation), "half-done run beside a done one")
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        signal_all(family, signal.SIGSTOP)
        halves, done = half_done(federation), finished(federation)
        if halves:  # still: they can no longer move
            break
        signal_all(family, signal.SIGCONT)
    kill(process)
    attempts = {run: len(federation.attempts(run)) for run in done}

    printed = federation.moonflower("sweep", "--resume", "last", "--jobs", "2", "--out", str(tmp_path / "out"))
    found = trials(federation)
    assert set(found) == {(cell, seed) for cell in CELLS for seed in (0, 1)}
    assert [len(runs) for runs in found.values()] == [1] * 8
    assert len(federation.asked("SELECT id FROM runs")) == 8
    for runs in found.values():
        federation.assert_finished_and_accounted_for(runs[0], rounds=ROUNDS)
    assert {run: len(federation.attempts(run)) for run in done} == attempts  # not run again
    outcomes = [[outcome for outcome, _ in federation.attempts(run)] for run in halves]
    assert outcomes
    assert all(each[-2:] == ["lost", "completed"] for each in outcomes)

    with (tmp_path / "out" / "sweep.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    with History.open(federation.database) as history:
        configs = {place: history.run(runs[0]).config for place, runs in found.items()}
    for cell, (epsilon, steps) in CELLS.items():
        scores = [accuracy(federation, found[cell, seed][0]) for seed in (0, 1)]
        mean, half = statistics.fmean(scores), T * statistics.stdev(scores) / math.sqrt(2)
        row = rows[cell - 1]
        assert (row["privacy.epsilon"], row["training.local_steps"]) == (str(epsilon), str(steps))
        assert float(row["mean"]) == pytest.approx(mean)
        assert [float(row[name]) for name in ("low", "high")] == pytest.approx([mean - half, mean + half])
        assert epsilon - 0.1 < float(row["epsilon"]) <= epsilon
        for seed in (0, 1):
            config = configs[cell, seed]
            held = (config["privacy"]["epsilon"], config["training"]["local_steps"], config["seed"])
            assert held == (epsilon, steps, seed)
    assert "8 of 8 runs done" in printed

    # The command that is printed makes the best run's configuration again, by itself.
    said = json.loads((tmp_path / "out" / "sweep.json").read_text())
    again = federation.moonflower(*said["best"]["command"][1:], "--prepare", "--format", "json")
    digests = dict(federation.asked("SELECT id, config_digest FROM runs"))
    assert digests[json.loads(again)["run"]] == digests[said["best"]["run"]]
    assert len(federation.asked("SELECT run_id FROM trials")) == 8  # and it is no run of the sweep


def accuracy(federation: Federation, run: str) -> float:
    """The public test set's, after the last round, from the history's file."""
    query = "SELECT value FROM metrics JOIN rounds ON rounds.id = round_id WHERE run_id = ? AND number = ?"
    ((value,),) = federation.asked(f"{query} AND scope = 'test' AND name = 'accuracy'", run, ROUNDS)
    return float(value)


@pytest.mark.slow
@pytest.mark.parametrize("order", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_told_to_stop_closes_its_runs_and_says_how_to_go_on(
    federation: Federation, order: signal.Signals
) -> None:
    process = federation.start("sweep", federation.scenario, "--seeds", "2", *SMALL)
    federation.wait_for(lambda: len(half_done(federation)) == 2, "two runs")
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(order)
    _, said = process.communicate(timeout=30)
    (sweep,) = (row[0] for row in federation.asked("SELECT id FROM sweeps"))
    assert process.returncode == 130
    assert said == f"Interrupted: 0 of 2 runs are done. Go on with: moonflower sweep --resume {sweep}\n"
    assert not any(alive(each) for each in family)
    runs = [runs[0] for runs in trials(federation).values()]
    assert [federation.attempts(run)[-1][0] for run in runs] == ["stopped", "stopped"]
    federation.moonflower("sweep", "--resume", sweep, "--jobs", "2")
    for run in runs:
        assert [outcome for outcome, _ in federation.attempts(run)] == ["stopped", "completed"]
        federation.assert_finished_and_accounted_for(run, rounds=ROUNDS)


@pytest.mark.slow
def test_of_two_that_are_given_the_same_sweep_one_runs_it_and_the_other_is_refused(federation: Federation) -> None:
    command = ("sweep", federation.scenario, "--seeds", "2", *SMALL, "--set", "training.rounds=2")
    both = [federation.start(*command) for _ in range(2)]
    ends = {process.communicate(timeout=PATIENCE)[1]: process for process in both}
    assert sorted(process.returncode for process in both) == [0, 2], list(ends)
    said, refused = next((said, process) for said, process in ends.items() if process.returncode == 2)
    winner = next(process for process in both if process is not refused)
    (sweep,) = (row[0] for row in federation.asked("SELECT id FROM sweeps"))
    assert said.startswith(f"Error: sweep {sweep} is in use by process {winner.pid}; stop that one first")
    assert [len(runs) for runs in trials(federation).values()] == [1, 1]
    for run in finished(federation):
        federation.assert_finished_and_accounted_for(run, rounds=2)
        assert len(federation.attempts(run)) == 1
