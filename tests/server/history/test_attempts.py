"""Who owns a run: its newest attempt that has not ended, and nobody else."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from server.history.store import History
from shared.errors import ConfigError, MoonflowerError, NotFoundError, RunFailedError

CRASH = """
import os, sys
from sqlalchemy import Engine, event
from server.history.store import History
from server.history.records import *
from datetime import UTC, datetime

def die(connection, cursor, statement, *_):
    if statement.startswith("INSERT INTO spends "):
        os._exit(42)

event.listen(Engine, "after_cursor_execute", die)
history = History.open(sys.argv[1])
spend = Spend("a", "d", "train", 1.0, 1e-5, 1.0, 0.1, 1, 8.0)
checkpoint = Checkpoint("x", 1)
history.commit_round(Round("lungs-1", 2, 1, "training", datetime.now(UTC), 1.0, checkpoint, spends=(spend,)))
"""


def test_a_run_follows_its_attempts(history, new_run, new_round):
    new_run(history, start=False)
    first = history.start_attempt("lungs-1", engine="flower")
    assert history.attempts("lungs-1") == [first]
    assert history.run("lungs-1").status == "running"
    history.end_attempt("lungs-1", 1, "failed", "out of memory")
    history.finish_run("lungs-1", "failed")
    assert history.run("lungs-1").finished_at is not None
    with pytest.raises(RunFailedError, match=r"Attempt 1 of run 'lungs-1' has ended \(failed\)"):
        history.commit_round(new_round(1))

    second = history.start_attempt("lungs-1", engine="in-process")
    assert second.number == 2
    assert history.run("lungs-1").finished_at is None
    history.commit_round(new_round(1, attempt=2))
    history.end_attempt("lungs-1", 2, "completed")
    history.finish_run("lungs-1", "completed", attempt=2)
    assert history.run("lungs-1").status == "completed"
    assert [(a.number, a.outcome, a.error) for a in history.attempts("lungs-1")] == [
        (1, "failed", "out of memory"),
        (2, "completed", None),
    ]
    assert [event.text for event in history.events("lungs-1")] == [
        "Attempt 1 started (flower).",
        "Attempt 1 failed: out of memory",
        "Attempt 2 started (in-process).",
        "Attempt 2 completed.",
    ]


def test_a_completed_run_takes_no_further_attempt(history, new_run):
    new_run(history)
    history.end_attempt("lungs-1", 1, "completed")
    history.finish_run("lungs-1", "completed")
    with pytest.raises(ConfigError, match="already completed; start a new run"):
        history.start_attempt("lungs-1", engine="flower")
    assert len(history.attempts("lungs-1")) == 1


def test_an_attempt_that_died_is_lost_when_the_next_one_starts(history, new_run):
    new_run(history)
    history.start_attempt("lungs-1", engine="flower")
    first, second = history.attempts("lungs-1")
    assert (first.outcome, second.outcome) == ("lost", None)
    assert first.ended_at is not None
    lost = history.events("lungs-1")[1]
    assert (lost.level, lost.text) == ("warning", "Attempt 1 was lost: it ended without a word.")


def test_a_superseded_attempt_can_neither_commit_nor_end_the_run(history, new_run, new_round):
    new_run(history)
    history.start_attempt("lungs-1", engine="flower")
    with pytest.raises(RunFailedError, match="Attempt 1 of run 'lungs-1' was superseded by attempt 2"):
        history.commit_round(new_round(1, attempt=1))
    with pytest.raises(RunFailedError, match="superseded by attempt 2"):
        history.finish_run("lungs-1", "failed", attempt=1)
    history.end_attempt("lungs-1", 1, "failed", "superseded")
    assert history.attempts("lungs-1")[0].outcome == "lost"
    assert history.run("lungs-1").status == "running"
    assert history.last_round("lungs-1") is None
    history.commit_round(new_round(1, attempt=2))


def test_what_was_never_started_is_refused(history, new_run, new_round):
    new_run(history, start=False)
    with pytest.raises(RunFailedError, match=r"Attempt 1 .* was never started"):
        history.commit_round(new_round(1))
    with pytest.raises(NotFoundError, match="no attempt 3"):
        history.end_attempt("lungs-1", 3, "completed")
    with pytest.raises(NotFoundError, match="no run 'nobody'"):
        history.start_attempt("nobody", engine="flower")
    with pytest.raises(ConfigError, match="status='running' does not finish a run"):
        history.finish_run("lungs-1", "running")


def test_of_two_processes_that_resume_a_run_only_the_later_goes_on(shared_url, new_run, new_round):
    with History.open(shared_url) as one, History.open(shared_url) as two:
        new_run(one)
        one.commit_round(new_round(1))
        attempt = two.start_attempt("lungs-1", engine="flower").number
        two.commit_round(new_round(2, attempt=attempt))
        for number in (2, 3):
            with pytest.raises(RunFailedError, match="superseded by attempt 2"):
                one.commit_round(new_round(number, attempt=1))
        two.commit_round(new_round(3, attempt=attempt))
        assert [each.attempt for each in one.rounds("lungs-1")] == [1, 2, 2]


def together(url, work, times=4):
    """Run `work(history, i)` at the same moment, each with its own connection; give results and errors."""
    barrier = Barrier(times)

    def one(i):
        with History.open(url) as history:
            barrier.wait(timeout=30)
            try:
                return work(history, i)
            except MoonflowerError as error:
                return error

    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(one, range(times)))


def test_of_writers_that_commit_the_same_round_at_once_one_wins(shared_url, new_run, new_round):
    with History.open(shared_url) as history:
        new_run(history)
        for number in range(1, 6):
            results = together(shared_url, lambda mine, _, n=number: mine.commit_round(new_round(n)))
            assert results.count(None) == 1
            assert all(isinstance(result, RunFailedError) for result in results if result is not None)
            assert history.last_round("lungs-1") == new_round(number)


def test_attempts_that_start_at_once_are_numbered_apart_and_one_is_left(shared_url, new_run):
    with History.open(shared_url) as history:
        new_run(history, start=False)
        results = together(shared_url, lambda mine, _: mine.start_attempt("lungs-1", engine="flower").number)
        assert sorted(results) == [1, 2, 3, 4]
        assert [a.outcome for a in history.attempts("lungs-1")] == ["lost", "lost", "lost", None]


def test_a_process_that_dies_inside_a_commit_leaves_nothing(shared_url, new_run, new_round):
    with History.open(shared_url) as history:
        new_run(history)
        history.commit_round(new_round(1))
        done = subprocess.run([sys.executable, "-c", CRASH, shared_url], check=False, timeout=60)
        assert done.returncode == 42
        assert history.last_round("lungs-1") == new_round(1)
        resumed = history.start_attempt("lungs-1", engine="flower").number
        history.commit_round(new_round(2, attempt=resumed))
        assert history.last_round("lungs-1") == new_round(2, attempt=resumed)


def test_threads_may_share_one_history(history, new_run, new_round):
    new_run(history)
    history.commit_round(new_round(1))
    with ThreadPoolExecutor(4) as pool:
        for i in range(20):
            pool.submit(history.add_event, "lungs-1", "info", str(i))
        reads = [pool.submit(history.last_round, "lungs-1") for _ in range(20)]
        assert all(read.result() == new_round(1) for read in reads)
    assert sorted(event.text for event in history.events("lungs-1"))[:20] == sorted(map(str, range(20)))
