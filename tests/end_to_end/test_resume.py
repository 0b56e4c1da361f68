"""Runs that are killed, stopped and taken over, as real processes: what was committed stays, and nothing is spent twice."""

import random
import secrets
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from typing import Any, Protocol

import pytest

SITES = ("north", "south", "west")  # in the order in which they answer
PATIENCE = 120.0
MANY_KILLS, MANY_ROUNDS = 30, 100


class Federation(Protocol):
    """The fixture's type: the tests' folders are no packages."""

    def __getattr__(self, name: str) -> Any: ...


Place = Callable[[Federation, str, int], bool]


def training(federation: Federation, run: str, number: int) -> bool:
    """Round `number` is under way, and no site has charged it."""
    return federation.committed(run) == number - 1 and not federation.charged(run, number)


def charged(federation: Federation, run: str, number: int) -> bool:
    """A site has charged its update of round `number`, another has not, and the round is not committed."""
    return federation.committed(run) == number - 1 and 0 < len(federation.charged(run, number)) < len(SITES)


def committing(federation: Federation, run: str, number: int) -> bool:
    """All sites have charged round `number`, a file of its checkpoint is there, and the round is not committed."""
    files = {file.name for file in (federation.run(run) / "checkpoints").glob("*")}
    query = "SELECT digest FROM checkpoints JOIN rounds ON rounds.id = round_id WHERE run_id = ?"
    known = {f"{digest}.safetensors" for (digest,) in federation.asked(query, run)}
    done = federation.committed(run) == number - 1
    return bool(files - known) and done and len(federation.charged(run, number)) == len(SITES)


def stands(place: Place, federation: Federation, run: str, number: int) -> bool:
    """Look at a stopped process; one that stopped with a database's lock in its hand cannot be looked at."""
    try:
        return place(federation, run, number)
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise
        return False


def kill_at(federation: Federation, process: subprocess.Popen[str], run: str, place: Place) -> int:
    """Stop the process again and again until it stands at the place, then kill it; give the round."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        assert process.poll() is None, process.communicate()
        number = federation.committed(run) + 1
        if number > 1 and place(federation, run, number):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.01)
            if stands(place, federation, run, number):  # still: it can no longer move
                process.kill()
                process.wait()
                return number
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    pytest.fail(f"the process never stood at {place.__name__}")


def test_a_run_killed_in_training_after_a_charge_and_in_a_commit_ends_as_if_it_had_not_been(
    federation: Federation,
) -> None:
    process = federation.start("simulate", federation.scenario)
    run = federation.newest_run()
    killed = []
    for place in (training, charged, committing):
        killed.append(kill_at(federation, process, run, place))
        process = federation.start("simulate", "--resume", run)
        before = len(killed)
        federation.wait_for(lambda before=before: len(federation.attempts(run)) > before, "next attempt")
    printed, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, (killed, said)
    assert f"resumed after round {killed[-1] - 1}" in printed
    assert [outcome for outcome, _ in federation.attempts(run)] == ["lost", "lost", "lost", "completed"]
    federation.assert_finished_and_accounted_for(run)


def test_a_run_that_is_told_to_stop_says_so_within_ten_seconds_and_can_be_resumed(federation: Federation) -> None:
    process = federation.start("simulate", federation.scenario)
    run = federation.newest_run()
    for order in (signal.SIGTERM, signal.SIGINT):
        federation.wait_for(lambda: training(federation, run, max(2, federation.committed(run) + 1)), "training")
        process.send_signal(order)
        told = time.monotonic()
        _, said = process.communicate(timeout=10)
        assert time.monotonic() - told < 10
        assert (process.returncode, said.strip()) == (130, "Interrupted.")
        assert federation.attempts(run)[-1][0] == "stopped"
        assert federation.asked("SELECT status FROM runs WHERE id = ?", run) == [("stopped",)]
        done = federation.committed(run)
        process = federation.start("simulate", "--resume", "last")
        federation.wait_for(lambda done=done: federation.committed(run) > done, "next round")
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert [outcome for outcome, _ in federation.attempts(run)] == ["stopped", "stopped", "completed"]
    federation.assert_finished_and_accounted_for(run)


def test_of_two_processes_that_resume_one_run_the_later_goes_on_and_the_other_ends_in_one_line(
    federation: Federation,
) -> None:
    process = federation.start("simulate", federation.scenario)
    run = federation.newest_run()
    kill_at(federation, process, run, charged)
    first, second = (federation.start("simulate", "--resume", run) for _ in range(2))
    ends = {process.communicate(timeout=PATIENCE)[1]: process.returncode for process in (first, second)}
    assert sorted(ends.values()) == [0, 1], ends
    said = next(said for said, code in ends.items() if code == 1)
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"Error: Attempt 2 of run '{run}'"), said
    assert "superseded by attempt 3" in last
    assert "Traceback" not in said
    assert [outcome for outcome, _ in federation.attempts(run)] == ["lost", "lost", "completed"]
    federation.assert_finished_and_accounted_for(run)


def test_two_runs_at_once_in_one_fresh_home_both_finish(federation: Federation) -> None:
    processes = [federation.start("simulate", federation.scenario, "--rounds", "4", "--quiet") for _ in range(2)]
    runs = []
    for process in processes:
        printed, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, said
        runs.append(printed.strip())
    assert len(set(runs)) == 2
    for run in runs:
        federation.assert_finished_and_accounted_for(run, rounds=4)


@pytest.mark.slow
def test_a_run_killed_thirty_times_at_random_ends_as_if_it_had_not_been(federation: Federation) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # noqa: T201 - pytest shows it when the test fails
    source = random.Random(seed)  # noqa: S311 - when to kill
    process = federation.start("simulate", federation.scenario, "--rounds", str(MANY_ROUNDS))
    run = federation.newest_run()
    killed = {"loading": 0, "joining": 0, "in a round": 0}
    begun = 0
    for _ in range(MANY_KILLS):
        where = source.choices(list(killed), weights=(1, 2, 7))[0]
        killed[where] += 1
        if where != "loading":
            federation.wait_for(lambda begun=begun: len(federation.attempts(run)) > begun, "attempt")
        if where == "in a round":
            rounds = federation.committed(run) + source.randrange(1, 3)
            federation.wait_for(lambda rounds=rounds: federation.committed(run) >= rounds, "round")
        time.sleep(source.uniform(0, {"loading": 5.0, "joining": 1.5, "in a round": 0.5}[where]))
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        begun = len(federation.attempts(run))
        process = federation.start("simulate", "--resume", run)
    _, said = process.communicate(timeout=10 * PATIENCE)
    assert process.returncode == 0, said
    *lost, last = [outcome for outcome, _ in federation.attempts(run)]
    assert set(lost) == {"lost"}
    assert last == "completed"
    federation.assert_finished_and_accounted_for(run, rounds=MANY_ROUNDS)
    resumed_in = federation.asked("SELECT count(DISTINCT attempt) FROM rounds WHERE run_id = ?", run)[0][0]
    spends = {site: len(federation.spends(run, site)) for site in SITES}
    print(f"killed {killed}: {len(lost) + 1} attempts, {resumed_in} of them with rounds; spends {spends}")  # noqa: T201
