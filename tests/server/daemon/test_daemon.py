import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import zipfile

import psutil
import pytest
from daemons import MOONFLOWER, Coordinator, stop, wait_for

from server.daemon import flower
from server.daemon.settings import load
from server.provision import provisioning
from shared.errors import ConfigError
from shared.processes import MARK, alive


def test_a_second_daemon_on_the_same_state_is_refused_in_one_line_and_the_first_goes_on(
    coordinator: Coordinator, daemon: subprocess.Popen[bytes]
):
    second = subprocess.run(
        [MOONFLOWER, "server", "start", "--config", coordinator.config], capture_output=True, text=True, check=False
    )
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert re.search(rf"state folder .* is in use by process {daemon.pid}; stop that one first", line)
    assert daemon.poll() is None


def test_sigterm_ends_everything_within_ten_seconds_and_leaves_no_process(
    coordinator: Coordinator, daemon: subprocess.Popen[bytes]
):
    processes = [psutil.Process(daemon.pid), *psutil.Process(daemon.pid).children(recursive=True)]
    assert len(processes) == 2  # it and the SuperLink
    assert stop(daemon) < 10
    assert not any(alive(process) for process in processes)
    assert coordinator.family() == []
    assert "Traceback" not in coordinator.log
    said = subprocess.run(
        [MOONFLOWER, "server", "status", "--config", coordinator.config], capture_output=True, text=True, check=False
    )
    assert (said.returncode, said.stdout) == (1, "No daemon runs on this state.\n")


def test_sigkill_of_the_daemon_takes_its_children_along_and_the_next_one_ends_whatever_is_left(
    coordinator: Coordinator, daemon: subprocess.Popen[bytes]
):
    children = psutil.Process(daemon.pid).children(recursive=True)
    assert children
    daemon.kill()
    daemon.wait()
    wait_for(lambda: not any(alive(child) for child in children), 2)

    mark = f"moonflower server {coordinator.settings.state}"
    with subprocess.Popen(["sleep", "60"], env=os.environ | {MARK: f"{mark}#run old"}) as left:
        other = subprocess.Popen(["sleep", "60"], env=os.environ | {MARK: f"{mark}-2#run old"})
        try:
            coordinator.start()
            assert left.poll() == -signal.SIGKILL
            assert other.poll() is None
        finally:
            other.kill()
            other.wait()
    assert f"ending what an earlier daemon left behind: processes {left.pid}" in coordinator.log


def test_a_superlink_that_dies_is_started_again_where_it_was_with_the_nodes_it_had(
    coordinator: Coordinator, daemon: subprocess.Popen[bytes]
):
    before = coordinator.status()["superlink"]
    nodes = node_ids(coordinator)
    assert set(nodes) == {"st-marys", "st-johns"}
    os.kill(before["pid"], signal.SIGKILL)
    wait_for(lambda: coordinator.status()["superlink"]["ended"] == 1 and coordinator.up(daemon))
    after = coordinator.status()["superlink"]
    assert after["pid"] != before["pid"]
    assert after["address"] == before["address"]
    assert node_ids(coordinator) == nodes
    assert "flower-superlink ended (signal 9); it is started again" in coordinator.log


@pytest.mark.slow
def test_a_superlink_that_hangs_is_ended_and_started_again_within_a_minute(
    coordinator: Coordinator, daemon: subprocess.Popen[bytes]
):
    before = coordinator.status()["superlink"]
    os.kill(before["pid"], signal.SIGSTOP)
    wait_for(lambda: coordinator.status()["superlink"]["ended"] == 1, 60)
    wait_for(lambda: coordinator.up(daemon))
    assert coordinator.status()["superlink"]["pid"] != before["pid"]
    assert "flower-superlink has not answered for" in coordinator.log


def test_a_site_that_is_revoked_in_enrolment_json_is_out_within_seconds_and_for_good(
    coordinator: Coordinator, daemon: subprocess.Popen[bytes]
):
    file = coordinator.settings.enrolment
    shutil.copy(file, before := file.with_suffix(".before"))
    (node,) = (id for site, id in node_ids(coordinator).items() if site == "st-marys")
    provisioning.revoke_site(coordinator.folder.parent, "st-marys")
    wait_for(lambda: f"node {node} is unregistered" in coordinator.log, 10)
    assert revoked(coordinator) == {"st-marys"}
    shutil.copy(before, file)
    os.utime(file)
    time.sleep(3)
    assert revoked(coordinator) == {"st-marys"}
    assert coordinator.log.count("is registered as node") == 2
    assert "The sites stay as they were." not in coordinator.log  # the rest of an older file counts
    file.write_text("{", encoding="utf-8")
    wait_for(lambda: "The sites stay as they were." in coordinator.log, 10)
    assert daemon.poll() is None
    assert revoked(coordinator) == {"st-marys"}


def test_insecure_works_on_loopback_without_any_key_and_json_logs_are_an_object_a_line(coordinator: Coordinator):
    text = coordinator.config.read_text(encoding="utf-8")
    coordinator.config.write_text(text.replace('host = "0.0.0.0"', 'host = "127.0.0.1"'), encoding="utf-8")
    for name in ("ca", "certificate", "key"):
        getattr(coordinator.settings.tls, name).unlink()
    stop(coordinator.start("--insecure", "--log-format", "json"))
    events = [json.loads(line) for line in coordinator.log.splitlines()]
    assert not [event for event in events if "error" in event]
    assert {"moonflower.daemon", "superlink"} <= {event["logger"] for event in events}
    assert any("Starting Flower SuperLink" in event["message"] for event in events if event["logger"] == "superlink")


def test_insecure_is_refused_where_a_host_is_not_loopback(coordinator: Coordinator):
    with pytest.raises(ConfigError, match=r"gateway\.host='0\.0\.0\.0' is not loopback; --insecure is plaintext"):
        load(coordinator.config, insecure=True)
    done = subprocess.run(
        [MOONFLOWER, "server", "start", "--config", coordinator.config, "--insecure"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("section", ["gateway", "control"])
def test_a_port_that_is_taken_is_one_line_and_nothing_is_left_running(coordinator: Coordinator, section: str):
    with socket.create_server(("127.0.0.1", getattr(coordinator.settings, section).port)):
        daemon = coordinator.start(ready=False)
        assert daemon.wait(20) == 2
    assert f"{section}" in coordinator.log.splitlines()[-1]
    assert "Traceback" not in coordinator.log
    assert coordinator.family() == []


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern")  # Flower's own
def test_the_bundle_that_is_submitted_holds_a_pyproject_and_no_code():
    link = flower.Flower("127.0.0.1:1", None, b"secret")
    names = zipfile.ZipFile(io.BytesIO(link._bundle.content)).namelist()
    link.close()
    assert [name for name in names if not name.startswith(".info/")] == ["pyproject.toml"]


def node_ids(coordinator: Coordinator) -> dict[str, int]:
    with coordinator.history() as history:
        return {key.site: key.node_id for key in history.site_keys() if key.node_id is not None}


def revoked(coordinator: Coordinator) -> set[str]:
    with coordinator.history() as history:
        return {key.site for key in history.site_keys() if key.revoked_at is not None}
