"""A real SuperLink, real SuperNodes and the door between them: for tests of whatever stands on these."""

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import tomli_w

from server.gateway.door import Gateway
from server.gateway.identity import Enrolled
from server.gateway.limits import Limits
from shared.certificates import Loopback, loopback, new_node_key
from shared.processes import Child

BIN = Path(sys.executable).parent
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
GENEROUS = Limits(connections_per_second=100_000)  # tests all come from one address


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(what: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise AssertionError(f"not true after {seconds:.0f} s")
        time.sleep(0.05)


@dataclass
class Site:
    """A site's key, in memory and in its file, and the SuperNode that may run with it."""

    name: str
    key: Path
    public: str


def new_site(folder: Path, name: str) -> Site:
    private, public = new_node_key()
    key = folder / f"{name}.key"
    key.write_bytes(private)
    return Site(name, key, public)


@dataclass
class SuperLink:
    """A flower-superlink with TLS and node authentication on loopback. It can be stopped and started again."""

    folder: Path
    tls: Loopback
    port: int
    lines: list[str] = field(default_factory=list)
    child: Child | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, **QUIET, "FLWR_HOME": str(self.folder / "home"), "PATH": path}

    def start(self) -> None:
        (self.folder / "home").mkdir(exist_ok=True)
        command = [
            *(str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port)),
            *("--ssl-ca-certfile", str(self.tls.ca), "--ssl-certfile", str(self.tls.certificate)),
            *("--ssl-keyfile", str(self.tls.key), "--enable-supernode-auth", "--isolation", "subprocess"),
            *("--database", str(self.folder / "link.db"), "--disable-runtime-dependency-installation"),
        ]
        self.child = Child("flower-superlink", command, self.environment, on_line=self.lines.append)
        until(self._answers, 60)

    def stop(self) -> None:
        if self.child is not None:
            self.child.stop(5)
            self.child = None

    def flwr(self, *arguments: str, address: str | None = None, ca: Path | None = None) -> dict[str, Any]:
        """Run a flwr command against it, or against another address, and return its JSON."""
        connection = {"address": address or self.address, "root-certificates": str(ca or self.tls.ca)}
        home = self.folder / "homes" / connection["address"].replace(":", "-")
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": "it", "it": connection}}))
        done = subprocess.run(
            [BIN / "flwr", *arguments, "it", "--format", "json"],
            env={**self.environment, "FLWR_HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def register(self, site: Site) -> int:
        """Make a site's key known to the SuperLink, and return its node id."""
        public = self.folder / f"{site.name}.pub"
        public.write_text(site.public)
        answer = self.flwr("supernode", "register", str(public), "--name", site.name)
        assert answer["success"], answer
        return int(answer["node-id"])

    def online(self) -> set[int]:
        """Return the ids of the nodes that are online."""
        answer = self.flwr("supernode", "list")
        return {int(node["node-id"]) for node in answer["nodes"] if node["status"] == "online"}

    def _answers(self) -> bool:
        try:
            context = ssl.create_default_context(cafile=str(self.tls.ca))
            return httpx.get(f"https://{self.address}/docs", verify=context).status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="session")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    """Give a running SuperLink. Who stops it starts it again."""
    folder = tmp_path_factory.mktemp("superlink")
    link = SuperLink(folder, loopback(folder / "tls"), free_port())
    link.start()
    yield link
    link.stop()


@pytest.fixture(scope="session")
def public_tls(tmp_path_factory: pytest.TempPathFactory) -> Loopback:
    """Give what the door shows to sites: another authority than the SuperLink's own."""
    return loopback(tmp_path_factory.mktemp("public"))


class Door:
    """A gateway in an event loop of its own, in a thread."""

    def __init__(
        self, upstream: str, upstream_ca: Path | None, tls: Loopback | None, enrolled: Enrolled | None, limits: Limits
    ):
        self.tls, self.enrolled = tls, enrolled
        self.gateway = Gateway(
            *("127.0.0.1", 0, tls and tls.certificate, tls and tls.key),
            *(upstream, upstream_ca, limits, enrolled),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self.gateway.start())

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    @property
    def port(self) -> int:
        return self.gateway.port

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def counts(self) -> dict[str, int]:
        async def snapshot() -> dict[str, int]:
            return self.gateway.counts()

        found: dict[str, int] = self.run(snapshot())
        return found

    def stop(self, grace: float = 1.0) -> None:
        self.run(self.gateway.stop(grace))

    def close(self) -> None:
        self.stop(0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def opened(superlink: SuperLink, tls: Loopback, keys: Mapping[str, str], limits: Limits = GENEROUS) -> Iterator[Door]:
    """Open a door in front of a SuperLink."""
    door = Door(superlink.address, superlink.tls.ca, tls, Enrolled(keys), limits)
    try:
        yield door
    finally:
        door.close()


class Node:
    """A flower-supernode of a site, by way of a door."""

    def __init__(self, site: Site, address: str, ca: Path, folder: Path):
        self.lines: list[str] = []
        inner = loopback(folder / f"{site.name}-runtime")
        secret = folder / f"{site.name}-secret"
        secret.write_text("s" * 40)
        command = [
            *(str(BIN / "flower-supernode"), "--superlink", address, "--root-certificates", str(ca)),
            *("--auth-supernode-private-key", str(site.key), "--isolation", "process"),
            *("--host", "127.0.0.1", "--port", str(free_port()), "--superexec-auth-secret-file", str(secret)),
            *("--ssl-ca-certfile", str(inner.ca), "--ssl-certfile", str(inner.certificate)),
            *("--ssl-keyfile", str(inner.key)),
        ]
        environment = {**os.environ, **QUIET, "FLWR_HOME": str(folder / "node-home")}
        self.child = Child("flower-supernode", command, environment, on_line=self.lines.append)

    def text(self) -> str:
        return "\n".join(self.lines)

    def wait(self, seconds: float = 30.0) -> int:
        """Wait until it ends by itself, and return its exit code."""
        until(lambda: self.child.poll() is not None, seconds)
        return self.child.stop(0)

    def stop(self) -> None:
        self.child.stop(5)


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[Callable[[Site, Door], Node]]:
    """Start SuperNodes that end with the test."""
    nodes: list[Node] = []

    def start(site: Site, door: Door) -> Node:
        assert door.tls is not None
        nodes.append(Node(site, door.address, door.tls.ca, tmp_path))
        return nodes[-1]

    yield start
    for node in nodes:
        node.stop()
