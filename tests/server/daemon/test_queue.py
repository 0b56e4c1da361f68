import asyncio
import os
import signal
import subprocess
import time
from pathlib import Path

import psycopg
import pytest
from daemons import Coordinator, stop, wait_for

from server.control import submission
from server.daemon import queue, superlink
from server.daemon.patience import Patience
from server.daemon.queue import Queue
from server.daemon.superlink import SuperLink
from server.history.records import Run
from server.history.store import History
from shared.errors import DatabaseError
from shared.processes import family

RUN = """
name = "tiny"
[model]
name = "{model}"
[task]
labels = ["negative", "positive"]
[training]
rounds = 2
sampling_rate = 0.5
clipping_norm = 1.0
[federation]
min_sites = 2
"""


@pytest.fixture
def submit(tiny_model: Path):
    """Submit a run, whose sites never come: its ServerApp waits for them."""

    def enter(coordinator: Coordinator, request: str = "1") -> Run:
        text = RUN.format(model=tiny_model)
        with coordinator.history() as history:
            return submission.submit(
                coordinator.settings, history, request_id=request, config_toml=text, test_set=None, by="alice"
            )

    return enter


def playing(coordinator: Coordinator) -> dict[str, int]:
    """Give the process of each run's ServerApp."""
    return {each["run"]: each["pid"] for each in coordinator.status().get("playing", []) if each["pid"]}


def attempts(coordinator: Coordinator, run: Run) -> list[str | None]:
    with coordinator.history() as history:
        return [attempt.outcome for attempt in history.attempts(run.id)]


def test_patience_asks_until_the_database_answers_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr("server.daemon.patience.FIRST", 0.01)
    answers = iter([DatabaseError("The database x: no."), DatabaseError("The database x: no."), 3])
    caplog.set_level("INFO")

    def ask() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    patiently = Patience()
    assert asyncio.run(patiently(ask)) == 3
    assert not patiently.gone
    assert [record.getMessage() for record in caplog.records] == [
        "The database x: no. Trying again until it answers.",
        "the database answers again",
    ]


def test_a_database_that_is_gone_for_a_while_does_not_end_the_daemon(coordinator: Coordinator, postgres, postgres_url):
    name = postgres_url.partition("?")[0].rpartition("/")[2]
    text = coordinator.config.read_text(encoding="utf-8")
    coordinator.config.write_text(f'database = "{postgres_url}"\n{text}', encoding="utf-8")
    daemon = coordinator.start()
    with psycopg.connect(postgres, autocommit=True) as server:
        server.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false")
        server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        wait_for(lambda: coordinator.status()["database"] == "away")
        time.sleep(2)
        server.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS true")
    wait_for(lambda: coordinator.status()["database"] == "ok")
    assert daemon.poll() is None
    assert coordinator.log.count("Trying again until it answers") == 1
    assert coordinator.log.count("the database answers again") == 1
    assert "Traceback" not in coordinator.log


def test_a_links_state_that_is_damaged_is_put_aside_and_made_anew(tmp_path: Path, caplog):
    (tmp_path / "link.db").write_bytes(b"no database" * 1000)
    superlink._tidy(tmp_path / "link.db")
    assert not (tmp_path / "link.db").exists()
    assert (tmp_path / "link.damaged").exists()
    assert "is damaged" in caplog.text


@pytest.mark.slow
def test_a_serverapp_that_is_killed_is_seen_at_once_as_a_lost_attempt_and_the_next_one_starts(
    coordinator: Coordinator, daemon: subprocess.Popen[bytes], submit
):
    run = submit(coordinator)
    first = wait_for(lambda: playing(coordinator).get(run.id))
    wait_for(lambda: attempts(coordinator, run) == [None])
    os.kill(first, signal.SIGKILL)
    killed = time.monotonic()
    wait_for(lambda: attempts(coordinator, run) == ["lost"])
    assert time.monotonic() - killed < 4  # under a second on a machine that does nothing else; Flower takes 58
    wait_for(lambda: attempts(coordinator, run) == ["lost", None])
    assert playing(coordinator)[run.id] != first
    with coordinator.history() as history:
        assert history.attempts(run.id)[0].error == "its process ended by signal 9"
        assert history.run(run.id).status == "running"
        history.request_stop(run.id, by="alice")
    wait_for(lambda: attempts(coordinator, run) == ["lost", "stopped"])
    with coordinator.history() as history:
        assert history.run(run.id).status == "stopped"
    wait_for(lambda: not playing(coordinator))
    assert len(coordinator.family()) == 1  # the SuperLink


@pytest.mark.slow
def test_runs_play_one_after_another_and_go_on_when_the_daemon_starts_again(
    coordinator: Coordinator, daemon: subprocess.Popen[bytes], submit
):
    first, second = submit(coordinator, "1"), submit(coordinator, "2")
    wait_for(lambda: attempts(coordinator, first) == [None])
    assert set(playing(coordinator)) == {first.id}
    assert coordinator.status()["waiting"] == 1
    assert stop(daemon) < 10
    assert coordinator.family() == []
    with coordinator.history() as history:
        (attempt,) = history.attempts(first.id)
        assert (attempt.outcome, attempt.error) == ("lost", "the coordinator was shut down")
        assert history.run(first.id).status == "running"

    again = coordinator.start()
    wait_for(lambda: attempts(coordinator, first) == ["lost", None])
    again.kill()  # nobody can close the attempt: the next one does
    again.wait()
    wait_for(lambda: not coordinator.family(), 2)
    coordinator.start()
    wait_for(lambda: attempts(coordinator, first) == ["lost", "lost", None])
    assert attempts(coordinator, second) == []
    with coordinator.history() as history:
        history.request_stop(first.id, by="alice")
    wait_for(lambda: attempts(coordinator, second) == [None])


@pytest.mark.slow
def test_a_superlink_that_dies_takes_the_attempt_along_and_the_run_goes_on(
    coordinator: Coordinator, daemon: subprocess.Popen[bytes], submit
):
    run = submit(coordinator)
    wait_for(lambda: attempts(coordinator, run) == [None])
    os.kill(coordinator.status()["superlink"]["pid"], signal.SIGKILL)
    wait_for(lambda: attempts(coordinator, run) == ["lost", None])
    with coordinator.history() as history:
        assert history.attempts(run.id)[0].error == "the SuperLink ended"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern")  # Flower's own
def test_a_run_that_no_attempt_brings_on_has_failed_and_says_why(coordinator: Coordinator, submit, monkeypatch):
    monkeypatch.setattr(queue, "MOST_TRIES", 2)
    settings = coordinator.settings
    settings.runs.mkdir(parents=True)
    History.open(settings.history).close()
    run = submit(coordinator)
    (settings.run(run.id) / "run.json").unlink()
    mark = f"test {settings.state}"

    async def until_it_has_finished() -> None:
        link = SuperLink(settings.state, insecure=True, mark=mark)
        with coordinator.history() as history:
            runs = Queue(settings, history, Patience(), link, mark)
            tasks = [asyncio.create_task(link.supervise(nothing)), asyncio.create_task(runs.work())]
            while history.run(run.id).finished_at is None:
                await asyncio.sleep(0.1)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await runs.close()
            await link.stop()

    async def nothing() -> None:
        return

    asyncio.run(asyncio.wait_for(until_it_has_finished(), 90))
    assert family(mark) == []
    with coordinator.history() as history:
        assert history.run(run.id).status == "failed"
        last = history.events(run.id)[-1].text
    assert last.startswith(
        "The run failed: 2 attempts in a row brought no new round; the last one ended with: its process"
    )
    assert "is not the folder of a run" in last
