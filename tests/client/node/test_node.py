"""A node as a site runs it: `moonflower client start` beside a real SuperLink, asked, killed and misled."""

import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from client.node.node import check_address
from client.node.runtime import Runtime, RuntimeApiError
from client.site import open_ledger
from shared import models
from shared.errors import ConfigError
from shared.messages import JoinRequest, TrainRequest
from shared.run_config import RunConfig

New = Callable[..., Any]
LONG: dict[str, Any] = {  # minutes of work
    "training": {"local_steps": 2000, "sampling_rate": 1.0},
    "privacy": {"max_noise_multiplier": 1000.0},
}


def join(config: RunConfig, run: str) -> JoinRequest:
    model = models.load(config)
    return JoinRequest(run, config.as_json(), model.base_digest, models.shapes(model.arrays()))


def train(config: RunConfig, run: str, number: int = 1) -> TrainRequest:
    return TrainRequest(run, config.as_json(), number, models.load(config).arrays())


def spent(node: Any) -> int:
    with open_ledger(node.site) as ledger:
        return len(ledger.spends())


def reserved(node: Any) -> int:
    with open_ledger(node.site) as ledger:
        return len(ledger.reservations())


def wait_for(what: Callable[[], Any], why: str, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"{why}: not within {seconds:g} s"
        time.sleep(0.1)


def test_a_hostile_bundle_never_runs_and_its_requests_are_answered_by_the_installed_code(
    running: Any, new_config: New
) -> None:
    reply = running.ask("join", join(new_config(), "hostile"))
    assert reply["values"]["message"] == "JoinReply", reply
    assert reply["values"]["site"] == "clinic"
    assert not running.link.mark.exists(), "the bundle's client code ran"
    held = [path for path in running.file.parent.rglob("*") if path.is_file()]
    assert not [path for path in held if b"HOSTILE_MARK" in path.read_bytes()], "the bundle was written"


def test_the_same_question_gets_the_same_bytes_from_another_worker(running: Any, new_config: New) -> None:
    request = train(new_config(), "again")
    first = running.ask("train", request)
    assert first["values"]["message"] == "TrainReply", first
    before, charged = running.status()["worker"]["pid"], spent(running)
    os.kill(before, signal.SIGKILL)
    second = running.ask("train", request)
    assert running.status()["worker"]["pid"] != before
    assert second["values"] == first["values"]
    for name, array in first["arrays"]["update"].items():
        assert np.array_equal(second["arrays"]["update"][name], array)
    assert spent(running) == charged


def test_a_worker_killed_at_work_is_an_error_reply_at_once_and_the_node_goes_on(running: Any, new_config: New) -> None:
    running.up()
    request = train(new_config(**LONG), "long")
    file = running.link.send(running.id, "train", request)
    worker = running.at_work("long")
    wait_for(lambda: reserved(running), "nothing is reserved")
    os.kill(worker, signal.SIGKILL)
    at = time.monotonic()
    reply = running.link.reply(file, 20)
    assert time.monotonic() - at < 5
    assert reply["values"]["outcome"] == "failed"
    assert reply["values"]["reason"].startswith("the site's worker process died while it was at work")
    assert running.ask("join", join(new_config(), "after"))["values"]["message"] == "JoinReply"
    status = running.status()
    killed = status["last_answers"][-2]
    assert (killed["run"], killed["round"], killed["kind"], killed["outcome"]) == ("long", 1, "train", "failed")
    with closing(sqlite3.connect(running.site.ledger)) as ledger:  # nothing is charged, and that it died is counted
        (died,) = ledger.execute("SELECT state FROM states WHERE run = '' AND kind = 'unpaid'").fetchall()
    assert len(json.loads(died[0])) == 1
    assert "was killed (SIGKILL" in status["last_error"]


@pytest.mark.slow
def test_a_worker_that_hangs_beyond_the_runs_deadline_is_ended_and_reported(running: Any, new_config: New) -> None:
    running.up()
    request = train(new_config(**LONG, federation={"deadline": 1.0}), "hung")
    file = running.link.send(running.id, "train", request)
    worker = running.at_work("hung")
    os.kill(worker, signal.SIGSTOP)
    reply = running.link.reply(file, 20)
    assert reply["values"]["reason"].startswith("the site's worker did not answer within 2 s and was ended")
    assert not psutil.pid_exists(worker)


def test_a_run_of_another_coordinator_is_refused(running: Any, new_config: New) -> None:
    running.up()
    reply = running.ask("join", join(new_config(federation={"coordinator": "other"}), "other"))
    assert reply["values"]["outcome"] == "refused"
    assert "federation.coordinator='other' is not 'coordinator'" in reply["values"]["reason"]


def test_a_message_of_no_kind_is_answered_and_its_text_stays_at_the_site(running: Any, new_config: New) -> None:
    reply = running.ask("train.unheard", join(new_config(), "unheard"))
    assert reply["values"]["outcome"] == "failed"
    assert reply["values"]["reason"] == "the site cannot read the message; its own log says why."
    assert "unheard" in running.log


def test_a_second_start_is_refused_in_one_line(running: Any) -> None:
    second = running.moonflower("start")
    assert second.returncode == 2
    assert len(second.stderr.splitlines()) == 1
    assert f"is in use by process {running.process.pid}" in second.stderr


def runtime_api(node: Any) -> tuple[str, bytes]:
    """Read where the SuperNode's Runtime API is, off its command line, and its authority."""
    words = psutil.Process(node.status()["supernode"]["pid"]).cmdline()
    found = {name: words[words.index(name) + 1] for name in ("--port", "--ssl-ca-certfile")}
    return f"127.0.0.1:{found['--port']}", Path(found["--ssl-ca-certfile"]).read_bytes()


def test_who_does_not_hold_the_secret_gets_no_task(running: Any) -> None:
    address, ca = runtime_api(running)
    runtime = Runtime(address, ca, b"another secret")
    with pytest.raises(RuntimeApiError, match="answers 401") as refused:
        runtime.acquire()
    assert refused.value.status == 401
    runtime.close()
    time.sleep(0.5)
    assert running.status()["connected_since"], "a stranger's try has cost the connection"
    state = running.site.coordinator.state
    for name in ("secret", "server.key"):
        assert (state / "runtime" / name).stat().st_mode & 0o077 == 0
    assert state.stat().st_mode & 0o077 == 0


def test_the_sites_people_read_its_status_without_the_coordinator(running: Any) -> None:
    said = running.moonflower("status")
    assert said.returncode == 0, said.stderr
    assert f"running since {running.status()['started_at'][:10]}" in said.stdout
    assert "connected since" in said.stdout
    assert "requests answered since it was started:" in said.stdout


@pytest.mark.slow
def test_sigterm_stops_a_node_at_work_within_ten_seconds_with_a_last_reply(new_node: New, new_config: New) -> None:
    node = new_node()
    node.start()
    node.up()
    file = node.link.send(node.id, "train", train(new_config(**LONG), "last"))
    node.at_work("last")
    family = node.family()
    at = time.monotonic()
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(15) == 0
    assert time.monotonic() - at < 10
    assert node.link.reply(file, 5)["values"]["reason"].startswith("the site's node was stopped")
    assert not [process for process in family if process.is_running()]
    assert node.moonflower("status").returncode == 1


def test_plaintext_goes_to_this_machine_only(running: Any) -> None:
    coordinator = running.site.coordinator.model_copy(update={"address": "coordinator.example.org:9443"})
    with pytest.raises(ConfigError, match="--insecure is plaintext"):
        check_address(coordinator, insecure=True)


def test_a_node_that_is_killed_at_work_leaves_no_process(running: Any, new_config: New) -> None:
    """The last test of the module's node."""
    running.up()
    running.link.send(running.id, "train", train(new_config(**LONG), "orphans"))
    running.at_work("orphans")
    family = running.family()
    assert len(family) >= 2
    running.process.kill()
    running.process.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
