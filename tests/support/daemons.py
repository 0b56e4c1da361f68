"""A coordinator on this machine: what `moonflower provision` makes for it, and the daemon as a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from server.daemon import settings
from server.daemon.settings import Settings
from server.history.store import History
from shared.processes import family, kill

MOONFLOWER = Path(sys.executable).parent / "moonflower"
PATIENCE = 180.0  # seconds, for anything that is sure to come
T = TypeVar("T")


def wait_for(condition: Callable[[], T], seconds: float = PATIENCE) -> T:
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.02)
    return found


@dataclass
class Coordinator:
    """A coordinator's kit, and the daemons that a test starts on it."""

    folder: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.folder / "server.toml"

    @property
    def settings(self) -> Settings:
        return settings.load(self.config)

    @property
    def log(self) -> str:
        return (self.folder / "daemon.log").read_text(encoding="utf-8")

    def start(self, *arguments: str, ready: bool = True) -> subprocess.Popen[bytes]:
        """Start a daemon; give it when its SuperLink is up."""
        with (self.folder / "daemon.log").open("ab") as log:
            command = [MOONFLOWER, "server", "start", "--config", self.config, *arguments]
            environment = {key: value for key, value in os.environ.items() if key != "MOONFLOWER_DATABASE"}
            daemon = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.daemons.append(daemon)
        if ready:
            wait_for(lambda: daemon.poll() is not None or self.up(daemon))
            assert daemon.poll() is None, self.log
        return daemon

    def up(self, daemon: subprocess.Popen[bytes]) -> bool:
        values = self.status()
        return values.get("pid") == daemon.pid and bool(values["superlink"]["up"])

    def status(self) -> dict[str, Any]:
        try:
            values: dict[str, Any] = json.loads((self.settings.state / "status.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return values

    def family(self) -> list[psutil.Process]:
        return family(f"moonflower server {self.settings.state}")

    def history(self) -> History:
        return History.open(self.settings.history, create=False)

    def end(self) -> None:
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()
        kill(self.family())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(daemon: subprocess.Popen[bytes]) -> float:
    """End a daemon as systemd does; give the seconds that it took."""
    started = time.monotonic()
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(15) == 0
    return time.monotonic() - started
