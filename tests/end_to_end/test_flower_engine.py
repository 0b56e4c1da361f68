"""`flwr run .` on Flower's own simulation engine, with real processes: SuperLink, simulation and Ray's actors."""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import pytest

from client.resident import Resident

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
