"""A run that is watched: all of it, once, over as many connections as it takes."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from server.control import coordinator_pb2 as pb
from server.control import service, watching
from server.control.client import Lost
from server.history.store import History
from shared.errors import NotFoundError

MOONFLOWER = str(Path(sys.executable).parent / "moonflower")


def play(history, run, rounds, *, pause=0.0):
    """Tell of rounds as a ServerApp does: two sites, of which one refuses and one is late at times."""
    for number in rounds:
        history.add_progress(run, number, "round", None, "started", "training")
        history.add_progress(run, number, "train", ["aku", "st-marys"], "asked")
        history.add_progress(run, number, "train", "st-marys", "ok")
        history.add_progress(run, number, "train", "aku", "refused", "max_epsilon=8 is spent\x1b[31m")
        history.add_progress(run, number, "round", None, "committed", "accuracy 0.9")
        time.sleep(pause)


def finish(history, run, outcome):
    history.end_attempt(run, 1, outcome)
    history.finish_run(run, outcome)


def texts(events):
    return [(each.progress.round, each.progress.kind, each.progress.state, each.progress.site) for each in events]


def told(history, run):
    return [(each.round, each.kind, each.state, each.site or "") for each in history.progress(run)]


def start(coordinator, *arguments, who="vic"):
    return subprocess.Popen(
        [MOONFLOWER, *arguments],
        env=coordinator.environment(who),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_watcher_is_told_everything_once_and_in_order(any_coordinator, monkeypatch):
    monkeypatch.setattr(service, "PAGE", 7)  # so that much of it comes in pages
    coordinator = any_coordinator
    history, run = coordinator.history, coordinator.submit().id
    history.start_attempt(run, engine="flower")
    player = threading.Thread(target=play, args=(history, run, range(1, 11)), kwargs={"pause": 0.02})
    player.start()
    threading.Timer(1.0, lambda: (player.join(), finish(history, run, "completed"))).start()
    with coordinator.client("vic") as client:
        events = list(client.watch("last"))
    progress = [event for event in events if event.HasField("progress")]
    assert texts(progress) == told(history, run)
    assert [each.progress.id for each in progress] == [each.id for each in history.progress(run)]
    states = [event.run.status for event in events if event.HasField("run")]
    assert (states[0], states[-1]) == ("running", "completed")
    assert events[-1].HasField("run")


def test_what_happens_between_two_looks_is_told_before_the_end(coordinator, monkeypatch):
    history, run = coordinator.history, coordinator.submit().id
    history.start_attempt(run, engine="flower")
    read, looks = history.progress, []

    def and_then(*arguments, **named):
        page = read(*arguments, **named)
        looks.append(page)
        if len(looks) == 1:
            play(history, run, [1])
            finish(history, run, "completed")
        return page

    monkeypatch.setattr(history, "progress", and_then)
    with coordinator.client() as client:
        events = list(client.watch(run))
    assert texts(event for event in events if event.HasField("progress")) == [
        (each.round, each.kind, each.state, each.site or "") for each in read(run)
    ]
    assert events[-1].run.status == "completed"


def test_a_watcher_that_comes_back_with_its_cursor_gets_the_rest(coordinator):
    history, run = coordinator.history, coordinator.submit().id
    history.start_attempt(run, engine="flower")
    play(history, run, [1, 2])
    finish(history, run, "failed")
    everything = history.progress(run)
    with coordinator.client() as client:
        for cursor in (0, everything[3].id, everything[-1].id):
            got = [event.progress.id for event in client.watch(run, cursor) if event.HasField("progress")]
            assert got == [each.id for each in everything if each.id > cursor]
        with pytest.raises(NotFoundError, match="no run 'nobody' here; `moonflower run list` lists them"):
            list(client.watch("nobody"))


def test_a_watch_survives_a_server_that_is_killed_and_misses_and_repeats_nothing(make, postgres_url):
    coordinator = make(postgres_url)
    with History.open(postgres_url) as history:
        server = coordinator.serve()
        try:
            run = coordinator.submit().id
            history.start_attempt(run, engine="flower")
            play(history, run, [1, 2])
            watcher = start(coordinator, "run", "watch", run, "--format", "json")
            lines = [json.loads(watcher.stdout.readline()) for _ in range(6)]
            server.send_signal(signal.SIGKILL)
            server.communicate(timeout=30)
            play(history, run, [3, 4])  # while nobody serves
            while lines[-1]["told"] != "lost":
                lines.append(json.loads(watcher.stdout.readline()))
            server = coordinator.serve()
            play(history, run, [5])
            finish(history, run, "completed")
            rest, complaint = watcher.communicate(timeout=60)
        finally:
            server.kill()
            server.communicate()
        lines += [json.loads(line) for line in rest.splitlines()]
        assert (watcher.returncode, complaint) == (0, "")
        assert [each["id"] for each in lines if each["told"] == "progress"] == [
            each.id for each in history.progress(run)
        ]
        assert lines[-1]["told"] == "run"
        assert lines[-1]["status"] == "completed"
        assert any(each["told"] == "lost" and "does not answer" in each["text"] for each in lines)


def test_a_watch_writes_lines_into_a_pipe_and_exits_with_the_runs_outcome(coordinator):
    history, run = coordinator.history, coordinator.submit().id
    history.start_attempt(run, engine="flower")
    play(history, run, [1])
    finish(history, run, "failed")
    done = coordinator.call("run", "watch", run, who="vic")
    assert (done.returncode, done.stderr) == (1, "")
    lines = [line[9:] for line in done.stdout.splitlines()]  # without the time
    assert lines == [
        f"{run}: failed, 0 of 3 rounds",
        "Attempt 1 started (flower).",
        "round 1 started: training",
        "round 1, train: aku trains",
        "round 1, train: st-marys trains",
        "round 1, train: st-marys sent its update",
        "round 1, train: aku refused: max_epsilon=8 is spent\N{REPLACEMENT CHARACTER}[31m",
        "round 1 committed: accuracy 0.9",
        "Attempt 1 failed.",
        f"{run}: failed, 0 of 3 rounds",
    ]


def test_a_watch_that_never_reached_its_server_is_an_error(make, sqlite_url):
    with make(sqlite_url).running() as coordinator:
        pass
    done = coordinator.call("run", "watch", "last")
    assert (done.returncode, done.stdout) == (1, "")
    assert "does not answer" in done.stderr


def test_a_service_that_stops_ends_its_watchers_at_once(make, sqlite_url):
    with make(sqlite_url).running() as coordinator:
        run = coordinator.submit().id
        client = coordinator.client()
        events = client.watch(run)
        assert next(events).run.status == "pending"
        clock = time.monotonic()
    assert time.monotonic() - clock < 3
    lost = next(event for event in events if isinstance(event, Lost))
    assert "stopping" in lost.why or "does not answer" in lost.why
    events.close()


def progress(number, state, site=None, text=None, kind="train"):
    made = pb.Progress(id=number, round=2, kind=kind, state=state, site=site, text=text)
    made.at.GetCurrentTime()
    return pb.WatchRunResponse(progress=made)


def test_the_panel_shows_who_trains_who_is_late_and_who_refused_and_why():
    board = watching.Board()
    run = pb.Run(id="lungs-1", status="running", rounds_done=1, rounds_planned=3)
    for event in (
        pb.WatchRunResponse(run=run),
        progress(1, "asked", "st-marys"),
        progress(2, "asked", "charite"),
        progress(3, "refused", "aku", "max_epsilon=8 is spent"),
        progress(4, "late", "charite"),
        Lost("localhost:1 does not answer.", 2.0),
    ):
        board.take(event)
    console = Console(file=io.StringIO(), width=120)
    console.print(board.render())
    shown = console.file.getvalue()
    assert "lungs-1: running, 1 of 3 rounds, WITHOUT PRIVACY (epsilon inf)" in shown
    rows = {line.split()[0]: " ".join(line.split()) for line in shown.splitlines() if line.strip()}
    assert rows["st-marys"] == "st-marys 2 trains 0 s"
    assert rows["charite"] == "charite 2 answered too late, and was not used 0 s"
    assert rows["aku"].startswith("aku 2 refused 0 s max_epsilon=8 is spent")
    assert "Trying again in 2 s." in shown


def test_a_terminal_gets_the_panel_and_the_outcome(coordinator):
    history, run = coordinator.history, coordinator.submit().id
    history.start_attempt(run, engine="flower")
    play(history, run, [1])
    finish(history, run, "stopped")
    ours, theirs = pty.openpty()
    watcher = subprocess.Popen(
        [MOONFLOWER, "run", "watch", run],
        env={**coordinator.environment(), "TERM": "xterm", "COLUMNS": "120"},
        stdout=theirs,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(ours)
    assert watcher.wait(timeout=60) == 3
    assert watcher.stderr.read() == b""
    watcher.stderr.close()
    assert b"max_epsilon=8 is spent" in seen
    assert f"{run}: stopped".encode() in seen
