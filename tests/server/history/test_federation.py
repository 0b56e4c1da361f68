"""What a daemon keeps in the history: its queue, requests to stop, the sites' keys, and progress for watchers."""

import threading
import time
from contextlib import suppress

import pytest

from server.history import writes
from server.history.store import History
from shared.errors import ConfigError, NotFoundError

OLD, NEW, OTHER = (f"ecdsa-sha2-nistp384 AAAA{name}" for name in ("old", "new", "other"))


@pytest.fixture
def submit():
    """Enter a run as a daemon does."""

    def enter(history, run_id, origin="daemon"):
        values = {"name": "x", "config": {}, "config_digest": "c0ffee", "rounds_planned": 3, "version": "0"}
        return history.create_run(run_id, **values, private=True, origin=origin, submitted_by="ann")

    return enter


def live(history):
    return {key.site: key.public_key for key in history.site_keys() if key.revoked_at is None}


def test_the_queue_holds_the_daemons_unfinished_runs_oldest_first(history, submit, new_run):
    new_run(history, "simulated")
    for run in ("c", "a", "b", "d"):
        submit(history, run)
    history.start_attempt("c", engine="flower")
    history.start_attempt("d", engine="flower")
    history.finish_run("d", "completed")
    assert [(run.id, run.status, run.origin, run.submitted_by) for run in history.queue()] == [
        ("c", "running", "daemon", "ann"),
        ("a", "pending", "daemon", "ann"),
        ("b", "pending", "daemon", "ann"),
    ]
    assert history.run("simulated").origin == "simulate"


def test_a_pending_run_is_stopped_at_once_and_never_starts(history, submit):
    submit(history, "a")
    stopped = history.request_stop("a", by="ann")
    assert (stopped.status, stopped.finished_at) == ("stopped", stopped.stop_requested_at)
    assert history.queue() == []
    with pytest.raises(ConfigError, match="was asked to stop; submit it again"):
        history.start_attempt("a", engine="flower")
    assert history.events("a")[0].text == "A stop was requested by ann."
    assert history.progress("a")[-1].state == "stopped"


def test_a_running_run_stays_in_the_queue_until_it_has_stopped(history, submit):
    submit(history, "a")
    history.start_attempt("a", engine="flower")
    asked = history.request_stop("a")
    assert (asked.status, asked.finished_at) == ("running", None)
    assert history.request_stop("a") == asked  # asked again, nothing changes
    assert [run.stop_requested_at for run in history.queue()] == [asked.stop_requested_at]
    with pytest.raises(ConfigError, match="was asked to stop"):
        history.start_attempt("a", engine="flower")
    history.end_attempt("a", 1, "stopped")
    history.finish_run("a", "stopped", attempt=1)
    assert history.queue() == []
    with pytest.raises(ConfigError, match="is stopped already; there is nothing to stop"):
        history.request_stop("a")


def test_what_a_daemon_does_not_play_it_does_not_stop(history, new_run):
    new_run(history)
    with pytest.raises(ConfigError, match="was not submitted to a coordinator"):
        history.request_stop("lungs-1")
    with pytest.raises(NotFoundError):
        history.request_stop("nobody")


def test_a_site_has_one_live_key_and_a_renewal_revokes_the_older(history):
    history.enrol("st-marys", OLD + " root@st-marys")
    history.enrol("st-marys", OLD)  # again: nothing changes
    assert live(history) == {"st-marys": OLD}
    with pytest.raises(ConfigError, match="has a key already; renew it, or revoke it first"):
        history.enrol("st-marys", NEW)
    history.enrol("st-marys", NEW, renew=True)
    assert live(history) == {"st-marys": NEW}
    old, new = history.site_keys()
    assert old.revoked_at == new.enrolled_at
    assert old.enrolled_at <= new.enrolled_at


def test_a_revoked_key_never_comes_back(history):
    history.enrol("st-marys", OLD)
    history.revoke("st-marys")
    history.revoke("st-marys")  # again: nothing changes
    for renew in (False, True):
        with pytest.raises(ConfigError, match=r"was revoked on 20.*, which is final; make a new key"):
            history.enrol("st-marys", OLD, renew=renew)
        with pytest.raises(ConfigError, match="which is final"):
            history.enrol("charite", OLD, renew=renew)
    assert live(history) == {}
    history.enrol("st-marys", NEW)
    assert live(history) == {"st-marys": NEW}
    with pytest.raises(NotFoundError, match="no site 'aku'"):
        history.revoke("aku")


def test_a_key_belongs_to_one_site_and_a_site_has_a_proper_name(history):
    history.enrol("st-marys", OLD)
    with pytest.raises(ConfigError, match="enrolled for site 'st-marys'"):
        history.enrol("charite", OLD, renew=True)
    with pytest.raises(ConfigError, match=r"site='St Mary\\'s' must match|site=\"St Mary's\" must match"):
        history.enrol("St Mary's", NEW)


def test_a_node_id_of_64_bits_is_kept(history):
    history.enrol("st-marys", OLD)
    assert history.site_keys()[0].node_id is None
    for node in (2**64 - 1, 2**63, 0):
        history.set_node(OLD, node)
        assert history.site_keys()[0].node_id == node
    with pytest.raises(NotFoundError):
        history.set_node(OTHER, 1)


def test_renewals_at_the_same_moment_leave_one_live_key(shared_url):
    with History.open(shared_url) as history:
        history.enrol("st-marys", OLD)
    barrier = threading.Barrier(4)

    def renew(number):
        with History.open(shared_url) as mine:
            barrier.wait(timeout=30)
            with suppress(ConfigError):  # another was faster: as good an answer
                mine.enrol("st-marys", f"{NEW}{number}", renew=True)

    threads = [threading.Thread(target=renew, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    with History.open(shared_url) as history:
        assert len(live(history)) == 1
        assert len([key for key in history.site_keys() if key.revoked_at is None]) == 1


def test_progress_is_read_on_from_a_cursor(history, submit):
    submit(history, "a")
    submit(history, "b")
    history.add_progress("a", 1, "train", ["x", "y"], "asked")
    history.add_progress("b", 1, "train", "z", "asked")
    history.add_progress("a", 1, "train", "y", "refused", "max_epsilon=8 is spent\0")
    history.add_progress("a", 1, "round", None, "committed")
    told = history.progress("a")
    assert [(each.site, each.state) for each in told] == [
        ("x", "asked"),
        ("y", "asked"),
        ("y", "refused"),
        (None, "committed"),
    ]
    assert told[2].text == "max_epsilon=8 is spent\N{REPLACEMENT CHARACTER}"
    assert history.progress("a", limit=2) == told[:2]
    assert history.progress("a", after=told[1].id) == told[2:]
    assert history.progress("a", after=told[1].id, limit=1) == told[2:3]
    assert history.progress("a", after=told[-1].id) == []
    with pytest.raises(NotFoundError):
        history.add_progress("nobody", 1, "round", None, "started")


def test_watchers_are_told_of_each_attempt(history, submit):
    submit(history, "a")
    history.start_attempt("a", engine="flower")
    history.start_attempt("a", engine="flower")
    history.end_attempt("a", 2, "failed", "out of memory")
    assert [(each.kind, each.state, each.text) for each in history.progress("a")] == [
        ("run", "started", "Attempt 1 started (flower)."),
        ("run", "lost", "Attempt 1 was lost: it ended without a word."),
        ("run", "started", "Attempt 2 started (flower)."),
        ("run", "failed", "Attempt 2 failed: out of memory"),
    ]


def test_a_later_id_is_never_there_before_an_earlier_one(shared_url, submit):
    with History.open(shared_url) as history, History.open(shared_url) as other:
        submit(history, "a")
        later = threading.Thread(target=other.add_progress, args=("a", 1, "train", "second", "asked"))
        with history._session(writing=True) as session:  # an earlier one that is not committed yet
            writes.add_progress(session, "a", 1, "train", ["first"], "asked", None)
            session.flush()
            later.start()
            later.join(timeout=0.5)
            with History.open(shared_url) as reader:
                assert reader.progress("a") == []
        later.join(timeout=30)
        assert [each.site for each in history.progress("a")] == ["first", "second"]


def test_a_reader_that_goes_on_from_its_cursor_misses_nothing_of_many_writers(shared_url, submit):
    """Ids must grow in the order of the commits: PostgreSQL hands them out before."""
    with History.open(shared_url) as history:
        submit(history, "a")
    writers, each = 4, 15

    def write(name):
        with History.open(shared_url) as mine:
            for number in range(each):
                mine.add_progress("a", number, "train", [f"{name}-{part}" for part in range(8)], "asked")

    threads = [threading.Thread(target=write, args=(name,)) for name in range(writers)]
    for thread in threads:
        thread.start()
    seen, until = [], time.monotonic() + 60
    with History.open(shared_url) as history:
        while len(seen) < writers * each * 8 and time.monotonic() < until:
            alive = any(thread.is_alive() for thread in threads)
            page = history.progress("a", after=seen[-1].id if seen else 0)
            seen += page
            if not alive and not page:
                break
        for thread in threads:
            thread.join(timeout=60)
        assert seen == history.progress("a")
    assert len(seen) == writers * each * 8
