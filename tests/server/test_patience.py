"""A database that is away for a while, or breaks off after it has committed, ends no attempt."""

import sqlite3
import threading
import time
from contextlib import closing

import pytest

from server import patience
from server.history.store import History
from server.patience import PatientHistory, insist
from shared.errors import ConfigError, DatabaseAwayError, RunFailedError


class Away(History):
    """A history whose calls fail for some times: before they are made, or after."""

    before: int = 0
    after: int = 0
    commits: int = 0

    def commit_round(self, round):
        if self.before:
            self.before -= 1
            raise DatabaseAwayError("the server does not answer.")
        self.commits += 1
        super().commit_round(round)
        if self.after:
            self.after -= 1
            raise DatabaseAwayError("the connection broke.")


class Both(PatientHistory, Away):
    pass


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(patience, "FIRST", 0.01)


@pytest.mark.usefixtures("quick")
def test_a_call_is_made_again_until_the_database_is_back(sqlite_url, new_run, new_round):
    with Both.open(sqlite_url) as history:
        new_run(history)
        history.before = 3
        history.commit_round(new_round(1))
        assert [item.number for item in history.rounds("lungs-1")] == [1]
        assert history.commits == 1


@pytest.mark.usefixtures("quick")
def test_a_round_whose_commit_was_cut_off_after_it_was_done_is_not_committed_twice(sqlite_url, new_run, new_round):
    with Both.open(sqlite_url) as history:
        new_run(history)
        history.after = 1
        history.commit_round(new_round(1))
        history.commit_round(new_round(2))
        assert [item.number for item in history.rounds("lungs-1")] == [1, 2]
        assert history.commits == 2


@pytest.mark.usefixtures("quick")
def test_a_round_that_another_attempt_committed_meanwhile_is_refused(sqlite_url, new_run, new_round):
    with Both.open(sqlite_url) as history, History.open(sqlite_url) as other:
        new_run(history)
        other.start_attempt("lungs-1", engine="flower")
        other.commit_round(new_round(1, attempt=2))
        history.before = 1
        with pytest.raises(RunFailedError, match="superseded"):
            history.commit_round(new_round(1))


def test_patience_ends_and_other_errors_have_none():
    tries = []

    def fail(error):
        tries.append(error)
        raise error

    with pytest.raises(DatabaseAwayError):
        insist(lambda: fail(DatabaseAwayError("away")), DatabaseAwayError, patience=1.0)
    assert len(tries) == 2  # at once, and after half a second; a second more would be too long
    with pytest.raises(ConfigError):
        insist(lambda: fail(ConfigError("wrong")), DatabaseAwayError)
    assert len(tries) == 3


def test_a_locked_sqlite_is_away_and_comes_back(sqlite_url, new_run, monkeypatch):
    monkeypatch.setattr("server.history.engine.BUSY_SECONDS", 0.1)
    with PatientHistory.open(sqlite_url) as history, closing(sqlite3.connect(sqlite_url[10:])) as other:
        new_run(history)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DatabaseAwayError):
            History.add_event(history, "lungs-1", "info", "without patience")
        writing = threading.Thread(target=history.add_event, args=("lungs-1", "info", "in the end"))
        writing.start()
        time.sleep(0.5)
        other.rollback()
        writing.join(20)
        assert [event.text for event in history.events("lungs-1")][-1] == "in the end"
