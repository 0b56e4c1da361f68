"""`flwr run .` on Flower's own simulation engine, with real processes: SuperLink, simulation and Ray's actors."""

import json
import os
import pickle
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import tomli_w

from client.resident import Resident
from server.history.store import History
from shared.processes import Child, family

ROOT = Path(__file__).parents[2]
SITES = ("north", "south", "west")


class Federation(Protocol):
    """The fixture's type: the tests' folders are no packages."""

    def __getattr__(self, name: str) -> Any: ...


class SuperLink:
    """A SuperLink for simulations on a free port of the loopback, and all the processes that come of it."""

    def __init__(self, environment: dict[str, str], home: Path) -> None:
        self.environment = {**environment, "FLWR_HOME": str(home)}
        self.mark = f"FLWR_HOME={home}\0".encode()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        home.mkdir()
        connection = f'[superlink.moonflower]\naddress = "{self.address}"\ninsecure = true\n'
        (home / "config.toml").write_text(connection, encoding="utf-8")
        self.log = home / "superlink.log"

    def start(self) -> None:
        host, port = self.address.split(":")
        command = ["flower-superlink", "--simulation", "--insecure", "--disable-runtime-dependency-installation"]
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [*command, "--host", host, "--port", port], env=self.environment, stdout=log, stderr=log
            )
        until = time.monotonic() + 120
        while True:
            with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
                return
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            assert time.monotonic() < until, "the SuperLink does not answer"
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill the SuperLink, then what it started: Ray's processes leave its tree, so they are known by their home."""
        self.process.kill()
        self.process.wait()  # the others go with it, or are ended here
        until = time.monotonic() + 60
        while alive := self.alive():
            for process in alive:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            assert time.monotonic() < until, f"processes {alive} do not end"
            time.sleep(0.1)

    def alive(self) -> list[int]:
        """Give the ids of this user's processes that have this home in their environment."""
        found = []
        for folder in Path("/proc").iterdir():
            with suppress(OSError):
                if folder.name.isdigit() and self.mark in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found


@pytest.fixture
def superlink(federation: Federation, tmp_path: Path) -> Iterator[SuperLink]:
    binaries = Path(sys.executable).parent
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    found = f"{binaries}{os.pathsep}{federation.environment['PATH']}"
    made = SuperLink({**federation.environment, **quiet, "PATH": found}, tmp_path / "flower")
    made.start()
    yield made
    made.kill()


def flwr_run(superlink: SuperLink, command: str) -> None:
    """Run a printed command as a person does: in a shell, at the repository's root."""
    shell = shutil.which("bash")
    assert shell is not None
    done = subprocess.run(
        [shell, "-c", command], cwd=ROOT, env=superlink.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass
class Cluster:
    """Two Ray nodes on this machine, each a raylet with workers of its own: 2 CPUs each, and one of them says it has a GPU."""

    address: str
    environment: dict[str, str]
    hosts: tuple[str, str]

    def messages(self, since: float) -> list[dict[str, Any]]:
        """Give what Ray says of each message that a site answered: on which node ("pid"), in which worker ("tid"), and when."""
        script = "import json, ray; ray.init(log_to_driver=False); print(json.dumps(ray.timeline()))"
        asked = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        events: list[dict[str, Any]] = json.loads(asked.stdout.splitlines()[-1])
        return [event for event in events if event["name"] == "run" and event["ts"] / 1e6 >= since]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: a socket's name has 107 characters
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    traced = {"RAY_PROFILING": "1", "RAY_task_events_report_interval_ms": "100"}
    environment = dict(os.environ) | quiet | secret | traced | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    ray = str(Path(sys.executable).with_name("ray"))
    said: list[str] = []

    def start(*arguments: str) -> Child:
        own = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
        return Child("ray", [ray, "start", "--block", "--num-cpus", "2", *arguments], own, on_line=said.append)

    head = ("--head", "--port", str(port), "--num-gpus", "1", "--include-dashboard", "false", "--temp-dir", str(folder))
    started = [start(*head)]
    try:
        until = time.monotonic() + 120
        while not any("runtime started" in line for line in said):
            assert started[0].poll() is None, said
            assert time.monotonic() < until, said
            time.sleep(0.1)
        started.append(start("--address", f"127.0.0.1:{port}", "--node-ip-address", "127.0.0.2", "--num-gpus", "0"))
        while sum("runtime started" in line for line in said) < 2:
            assert all(child.poll() is None for child in started), said
            assert time.monotonic() < until, said
            time.sleep(0.1)
        first = next(line.split("IP: ")[1].strip() for line in said if "node IP: " in line)
        yield Cluster(f"127.0.0.1:{port}", environment, (first, "127.0.0.2"))
    finally:
        marks = [child.mark for child in started]
        for child in reversed(started):
            child.stop(5)
        assert [process for mark in marks for process in family(mark)] == []
        shutil.rmtree(folder, ignore_errors=True)


def on_cluster(federation: Federation, cluster: Cluster, *arguments: str) -> dict[str, Any]:
    """Simulate on the cluster, and give what the command printed."""
    access = {name: value for name, value in cluster.environment.items() if name.startswith("RAY_AUTH")}
    federation.environment.update(access)
    options = ("--engine", "flower", "--ray-address", cluster.address, "--format", "json")
    printed: dict[str, Any] = json.loads(federation.moonflower("simulate", federation.scenario, *options, *arguments))
    return printed


def test_what_is_warm_survives_the_pickling_of_the_app_for_each_message() -> None:
    sent = pickle.dumps(Resident())
    first, second = pickle.loads(sent), pickle.loads(sent)  # noqa: S301 - our own
    assert first is second


@pytest.mark.slow
def test_the_printed_command_runs_a_prepared_run_on_ray_and_again_after_everything_was_killed(
    federation: Federation, superlink: SuperLink
) -> None:
    prepared = json.loads(federation.moonflower("simulate", federation.scenario, "--prepare", "--format", "json"))
    run = prepared["run"]
    flwr_run(superlink, prepared["command"])
    federation.wait_for(lambda: federation.committed(run) >= 4, "fourth round")
    superlink.kill()
    killed_after = federation.committed(run)
    assert killed_after < 12
    superlink.start()
    flwr_run(superlink, prepared["command"])
    federation.wait_for(lambda: federation.attempts(run)[-1][0] == "completed", "end of the run")
    with_engines = federation.asked("SELECT engine, outcome FROM attempts WHERE run_id = ? ORDER BY number", run)
    assert with_engines == [("flower", "lost"), ("flower", "completed")]
    by_attempt = federation.asked("SELECT attempt, number FROM rounds WHERE run_id = ? ORDER BY number", run)
    assert by_attempt == [(1 if number <= killed_after else 2, number) for number in range(1, 13)]
    sites = {row["site"] for row in federation.listed("participations", run) if row["outcome"] == "ok"}
    assert sites == set(SITES)
    federation.assert_finished_and_accounted_for(run)


@pytest.mark.slow
def test_one_command_runs_a_scenario_on_both_nodes_of_a_ray_cluster(federation: Federation, two_nodes: Cluster) -> None:
    since, rounds = time.time(), 3
    finished = on_cluster(federation, two_nodes, "--rounds", str(rounds), "--cpus-per-site", "2")
    messages = two_nodes.messages(since)
    assert len(messages) == len(SITES) * (1 + 2 * rounds)  # joined once; trained and evaluated in each round
    assert {event["pid"] for event in messages} == set(two_nodes.hosts)
    assert len({event["tid"] for event in messages}) == 2  # a worker a node
    federation.assert_finished_and_accounted_for(finished["run"], rounds)
    assert federation.asked("SELECT engine, outcome FROM attempts WHERE run_id = ?", finished["run"]) == [
        ("flower", "completed")
    ]


@pytest.mark.slow
def test_sites_of_half_a_gpu_each_run_two_at_a_time_on_the_node_that_has_one(
    federation: Federation, two_nodes: Cluster
) -> None:
    """There are CPUs for four at once, on both nodes: it is the GPU's share that Ray goes by. The sites are of a pool."""
    pooled(federation, sites=6)
    since = time.time()
    finished = on_cluster(federation, two_nodes, "--rounds", "2", "--gpus-per-site", "0.5")
    messages = two_nodes.messages(since)
    assert len(messages) == 6 * (1 + 2 * 2)
    assert {event["pid"] for event in messages} == {two_nodes.hosts[0]}
    workers = sorted({event["tid"] for event in messages})
    assert len(workers) == 2
    spans = [[(e["ts"], e["ts"] + e["dur"]) for e in messages if e["tid"] == worker] for worker in workers]
    assert any(begin < until and since < end for begin, end in spans[0] for since, until in spans[1])
    with History.open(federation.database, create=False) as history:
        told = history.spends(finished["run"])
    with closing(sqlite3.connect(federation.run(finished["run"]) / "pool" / "study.db")) as study:
        charged = study.execute("SELECT dataset, round, part, noise_multiplier FROM spends").fetchall()
    assert len(told) == len(charged) == 6 * 2 * 2
    assert sorted((f"tiny.{item.site}", number, item.part, item.noise_multiplier) for number, item in told) == sorted(
        charged
    )


@pytest.mark.slow
def test_a_killed_command_leaves_nobody_an_interrupted_one_ends_its_attempt_and_the_run_goes_on(
    federation: Federation,
) -> None:
    """The same run on Ray of its own three times: killed, interrupted, and played to its end."""
    command = federation.start("simulate", federation.scenario, "--engine", "flower", "--rounds", "9")
    run = federation.newest_run()
    federation.wait_for(lambda: federation.committed(run) >= 2, "second round")
    started = processes_of(federation.run(run))
    assert started
    scratch = {read_environment(process).get("RAY_TMPDIR") for process in started} - {None}
    command.kill()
    federation.wait_for(lambda: not processes_of(federation.run(run)), "end of Ray's processes")
    federation.wait_for(lambda: not any(Path(str(folder)).exists() for folder in scratch), "end of Ray's folder")
    killed_after = federation.committed(run)

    resumed = federation.start("simulate", "--resume", run, "--engine", "flower")
    federation.wait_for(lambda: federation.committed(run) > killed_after, "next round")
    resumed.send_signal(signal.SIGINT)
    assert resumed.wait(60) == 130
    assert processes_of(federation.run(run)) == []

    federation.moonflower("simulate", "--resume", run, "--engine", "flower")
    outcomes = [outcome for outcome, _ in federation.attempts(run)]
    assert outcomes == ["lost", "stopped", "completed"]
    federation.assert_finished_and_accounted_for(run, 9)


def processes_of(run: Path) -> list[int]:
    """Give the ids of the processes that Flower and Ray run for this run: its folder is Flower's home."""
    home = str(run / "flower")
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return [pid for pid in pids if read_environment(pid).get("FLWR_HOME") == home]


def read_environment(pid: int) -> dict[str, str]:
    try:
        block = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.decode(errors="replace").partition("=") for entry in block.split(b"\0"))
    return {name: value for name, _, value in pairs}


def pooled(federation: Federation, sites: int) -> None:
    """Make the scenario's sites of one pool of all their records."""
    files = sorted(path for path in (federation.folder / "data").glob("*.jsonl") if path.stem in SITES)
    (federation.folder / "data" / "pool.jsonl").write_text(
        "".join(path.read_text(encoding="utf-8") for path in files), encoding="utf-8"
    )
    values = tomllib.loads(Path(federation.scenario).read_text(encoding="utf-8"))
    del values["sites"]
    values["partition"] = {"kind": "iid", "sites": sites}
    Path(federation.scenario).write_text(tomli_w.dumps(values), encoding="utf-8")
