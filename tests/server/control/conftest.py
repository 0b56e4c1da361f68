"""A coordinator's control service with real TLS and tokens, in a thread of the tests or in a process of its own."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from server.control import service, tokens
from server.control.client import Client
from server.control.registrar import Seen
from server.control.target import Target
from server.daemon import settings as daemon_settings
from server.daemon.settings import Settings
from server.history.store import History
from shared import certificates
from shared.certificates import Pair

MOONFLOWER = str(Path(sys.executable).parent / "moonflower")
RUN = """
name = "lungs"
[model]
name = "any"
[task]
labels = ["negative", "positive"]
[training]
rounds = 3
sampling_rate = 0.5
"""
TEST_SET = b'{"text": "a good film", "label": "positive"}\n'


@dataclass
class Registrar:
    """A daemon's part, which remembers that it was asked."""

    changes: int = 0
    known: dict[str, Seen] = field(default_factory=dict)

    async def changed(self) -> None:
        self.changes += 1

    async def seen(self) -> Mapping[str, Seen]:
        return self.known


@dataclass
class Coordinator:
    """A coordinator's files, and its control service while one runs."""

    folder: Path
    settings: Settings
    authority: Pair
    secrets: dict[str, str]  # of tokens, by who has them
    registrar: Registrar = field(default_factory=Registrar)
    port: int = 0
    history: History = field(init=False)

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def client(self, who: str = "ann") -> Client:
        """Give a client in this process."""
        return Client(Target(self.address, self.authority.certificate, self.secrets[who], "ca.pem"))

    def environment(self, who: str = "ann", **others: str) -> dict[str, str]:
        """Give the environment in which somebody calls it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MOONFLOWER_")}
        own = {"MOONFLOWER_SERVER": self.address, "MOONFLOWER_CA": str(self.folder / "ca.pem")}
        return {**kept, **own, "MOONFLOWER_TOKEN": self.secrets[who], **others}

    def call(self, *arguments: str, who: str = "ann", **others: str) -> "subprocess.CompletedProcess[str]":
        """Run the command line in a process of its own."""
        return subprocess.run(
            [MOONFLOWER, *arguments],
            env=self.environment(who, **others),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def submit(self, request_id: str = "one", who: str = "ann", **others: Any) -> Any:
        """Submit a small run by one call."""
        from server.control import coordinator_pb2 as pb

        request = pb.SubmitRunRequest(request_id=request_id, **{"config_toml": RUN, "test_set": TEST_SET, **others})
        with self.client(who) as client:
            return client.call("SubmitRun", request).run

    @contextmanager
    def running(self, *, insecure: bool = False) -> Iterator["Coordinator"]:
        """Serve in a thread."""
        with History.open(str(self.settings.database)) as self.history, _loop() as loop:

            def wait(what: Any) -> Any:
                return asyncio.run_coroutine_threadsafe(what, loop).result(timeout=30)

            served = wait(service.start(self.settings, self.history, self.registrar, insecure=insecure))
            self.port = served.port
            try:
                yield self
            finally:
                wait(served.stop(1))

    def serve(self) -> "subprocess.Popen[str]":
        """Serve in a process of its own, on the port of before."""
        script = str(Path(__file__).with_name("serve.py"))
        command = [sys.executable, script, str(self.folder / "server.toml"), str(self.port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        self.port = int(process.stdout.readline())
        return process


@contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=30)
        loop.close()


@pytest.fixture(scope="session")
def authority() -> Pair:
    return certificates.authority("north", 100)


@pytest.fixture
def make(tmp_path: Path, authority: Pair) -> Any:
    """Lay out a coordinator's folder around a database."""

    def lay_out(database: str, certificate: Pair | None = None) -> Coordinator:
        pair = certificate or certificates.issue(authority, "north", ["localhost", "127.0.0.1"], 10)
        for name, content in (
            ("ca.pem", authority.certificate),
            ("server.pem", pair.certificate),
            ("server.key", pair.key),
        ):
            (tmp_path / name).write_bytes(content)
        then = datetime.now(UTC) - timedelta(days=30)
        made = {
            "ann": tokens.new("ann", "admin", 10),
            "vic": tokens.new("vic", "viewer", 10),
            "old": tokens.new("old", "admin", 10, then),
        }
        file = tokens.TokenFile(tokens=tuple(token for token, _ in made.values()))
        (tmp_path / "tokens.json").write_text(file.model_dump_json(), encoding="utf-8")
        config = f'name = "north"\ndatabase = "{database}"\n[control]\nport = 0\n'
        (tmp_path / "server.toml").write_text(config, encoding="utf-8")
        settings = daemon_settings.load(tmp_path / "server.toml")
        settings.state.mkdir()
        secrets = {name: secret for name, (_, secret) in made.items()} | {"nobody": "moonflower_of-no-server"}
        return Coordinator(tmp_path, settings, authority, secrets)

    return lay_out


@pytest.fixture
def coordinator(make: Any, sqlite_url: str) -> Iterator[Coordinator]:
    """Give a coordinator that serves, on SQLite."""
    with make(sqlite_url).running() as running:
        yield running


@pytest.fixture
def any_coordinator(make: Any, shared_url: str) -> Iterator[Coordinator]:
    """Give a coordinator that serves, on each database."""
    with make(shared_url).running() as running:
        yield running
