"""Buffered rounds over real processes that are killed: no update counts twice, and the ledgers agree with the history."""

import signal
import sqlite3
import subprocess
import time
from collections import Counter
from typing import Any, Protocol

import pytest

SITES = ("north", "south", "west")
ROUNDS, PATIENCE = 16, 120.0
SETTINGS = {
    "training.rounds": str(ROUNDS),
    "federation.mode": "buffered",
    "federation.buffer_size": "2",
    "federation.min_sites": "1",
    "evaluation.every": "8",
    "dynamics.speed.step": "10.0",
    "dynamics.speed.sigma": "1.0",
    "dynamics.speed.jitter": "0.5",
}


class Federation(Protocol):
    """The fixture's type: the tests' folders are no packages."""

    def __getattr__(self, name: str) -> Any: ...


def kill_with_an_answer_that_no_round_has(federation: Federation, process: subprocess.Popen[str], run: str) -> None:
    """Kill the process when a site has charged an answer that is in no committed round."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        assert process.poll() is None, process.communicate()
        if federation.committed(run) >= 2:
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.01)
            try:
                told = {(spend[0], spend[1]) for spend in spends(federation, run)}
                charged = {
                    (site, row.round) for site in SITES for row in federation.spends(run, site) if row.part == "train"
                }
            except sqlite3.OperationalError:  # it stopped with a database's lock in its hand
                told = charged = set()
            if charged - told:
                process.kill()
                process.wait()
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.005)
    pytest.fail("no answer was ever between its charge and its commit")


def spends(federation: Federation, run: str) -> list[tuple[str, int]]:
    """Give site and question's round of each training's spend that the history has."""
    query = (
        "SELECT site, coalesce(spends.asked, number) FROM spends JOIN rounds ON rounds.id = round_id "
        "WHERE run_id = ? AND part = 'train'"
    )
    return [(site, number) for site, number in federation.asked(query, run)]


@pytest.mark.slow
def test_a_buffered_run_that_is_killed_counts_each_update_once_and_charges_each_question_once(
    federation: Federation,
) -> None:
    settings = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    process = federation.start("simulate", federation.scenario, *settings)
    run = federation.newest_run()
    for killed in range(2):
        kill_with_an_answer_that_no_round_has(federation, process, run)
        process = federation.start("simulate", "--resume", run)
        federation.wait_for(lambda killed=killed: len(federation.attempts(run)) > killed + 1, "next attempt")
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert [outcome for outcome, _ in federation.attempts(run)] == ["lost", "lost", "completed"]
    assert federation.committed(run) == ROUNDS
    told = Counter(spends(federation, run))
    assert max(told.values()) == 1
    for site in SITES:
        rows = federation.spends(run, site)
        asked = [row.round for row in rows if row.part == "train"]
        assert asked == sorted(set(asked))  # each question once, none older than one that was answered
        assert {number for name, number in told if name == site} <= set(asked)
    query = (
        "SELECT site, coalesce(participations.asked, number) FROM participations JOIN rounds ON rounds.id = round_id "
        "WHERE run_id = ? AND kind = 'train' AND outcome = ? AND number >= ?"
    )
    counted = Counter(federation.asked(query, run, "ok", 0))
    at_work = set(federation.asked(query, run, "pending", ROUNDS))
    charged = {(site, row.round) for site in SITES for row in federation.spends(run, site) if row.part == "train"}
    assert charged - told.keys() <= at_work  # what was answered when the process died was sent again, and counts
    assert max(counted.values()) == 1
    assert sum(counted.values()) == 2 * ROUNDS
    rounds = federation.listed("rounds", run)
    assert all(row["simulated_seconds"] > 0 for row in rounds)
