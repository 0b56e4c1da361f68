"""A real SuperLink, real SuperNodes and the door between them, for the tests of whatever stands on these."""

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

import httpx
import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

from server.gateway.door import Gateway
from server.gateway.identity import Enrolled
from server.gateway.limits import Limits
from shared.certificates import Loopback, loopback, new_node_key
from shared.processes import Child

BIN = Path(sys.executable).parent
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
# Tests all come from one address, and few of them wait for a message.
GENEROUS = Limits(connections_per_second=100_000, wait_seconds=0)


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
    isolation: tuple[str, ...] = ("--isolation", "subprocess")

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
            *("--ssl-keyfile", str(self.tls.key), "--enable-supernode-auth", *self.isolation),
            *("--database", str(self.folder / "link.db"), "--disable-runtime-dependency-installation"),
        ]
        self.child = Child("flower-superlink", command, self.environment, on_line=self.lines.append)
        until(self._answers, 60)

    def stop(self) -> None:
        if self.child is not None:
            self.child.stop(5)
            self.child = None

    def command(self, *arguments: str, address: str | None = None, ca: Path | None = None) -> dict[str, Any]:
        """Run a flwr command against it, or against another address, and return its JSON.

        Raises
        ------
        ValueError
            Where it failed, which `flwr` says in words or in JSON.
        """
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
        try:
            found: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            found = {"success": False}
        if not found["success"]:
            raise ValueError(f"flwr {' '.join(arguments)}: {done.stdout} {done.stderr}")
        return found

    def register(self, site: Site) -> int:
        """Make a site's key known to the SuperLink, and return its node id."""
        public = self.folder / f"{site.name}.pub"
        public.write_text(site.public)
        answer = self.command("supernode", "register", str(public), "--name", site.name)
        return int(answer["node-id"])

    def online(self) -> set[int]:
        """Return the ids of the nodes that are online."""
        answer = self.command("supernode", "list")
        return {int(node["node-id"]) for node in answer["nodes"] if node["status"] == "online"}

    def _answers(self) -> bool:
        try:
            context = ssl.create_default_context(cafile=str(self.tls.ca))
            return httpx.get(f"https://{self.address}/docs", verify=context).status_code == 200
        except httpx.TransportError:
            return False


class Door:
    """A gateway in an event loop of its own, in a thread."""

    def __init__(
        self,
        upstream: str,
        upstream_ca: Path | None,
        tls: Loopback | None,
        enrolled: Enrolled | None,
        limits: Limits,
        disk: Path | None = None,
    ):
        self.tls, self.enrolled = tls, enrolled
        self.trust = ssl.create_default_context(cafile=str(tls.ca)) if tls else None
        self.gateway = Gateway(
            *("127.0.0.1", 0, tls and tls.certificate, tls and tls.key),
            *(upstream, upstream_ca, limits, enrolled, disk),
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


class Sink:
    """A plain HTTP server behind the door that counts what arrives, for what a SuperLink would hold in memory."""

    def __init__(self, reply_bytes: int = 0, seconds_to_read: float = 0.0) -> None:
        self.heads: list[tuple[str, list[tuple[str, str]]]] = []
        self.received = 0
        sink = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                sink.heads.append((self.requestline, self.headers.items()))
                left = int(self.headers["content-length"])
                time.sleep(seconds_to_read)
                while left and (data := self.rfile.read1(min(left, 1 << 20))):
                    left -= len(data)
                    sink.received += len(data)
                self.send_response(200)
                self.send_header("Content-Length", str(reply_bytes))
                self.send_header("Set-Cookie", "a=b")
                self.end_headers()
                with suppress(ConnectionError):
                    for start in range(0, reply_bytes, 1 << 20):
                        self.wfile.write(bytes(min(1 << 20, reply_bytes - start)))

            def log_message(self, *arguments: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def opened_before_sink(sink: Sink, tls: Loopback, keys: Mapping[str, str], limits: Limits = GENEROUS) -> Iterator[Door]:
    """Open a door in front of a sink."""
    door = Door(sink.address, None, tls, Enrolled(keys), limits)
    try:
        yield door
    finally:
        door.close()
        sink.close()


def signed(site: Site, at: datetime | None = None) -> dict[str, str]:
    """Return the headers by which a SuperNode shows who it is."""
    key = load_ssh_private_key(site.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    timestamp = (at or datetime.now(UTC)).isoformat()
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return {
        "flwr-public-key": b64encode(public).decode(),
        "flwr-timestamp": timestamp,
        "flwr-signature": b64encode(key.sign(timestamp.encode(), ec.ECDSA(SHA256()))).decode(),
    }


def head(method: str, target: str, headers: Mapping[str, str], version: str = "1.1") -> bytes:
    """Write a request's head by hand."""
    lines = [
        f"{method} {target} HTTP/{version}",
        "host: door",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


class Reachable(Protocol):
    """A door that can be dialled, in this process or in one of its own."""

    trust: ssl.SSLContext | None

    @property
    def port(self) -> int:
        """Where it listens."""


def dial(door: Reachable, source: str = "127.0.0.1", timeout: float = 10.0) -> socket.socket:
    """Connect to a door, by TLS if it has it, from an address of this machine."""
    raw = socket.create_connection(("127.0.0.1", door.port), timeout, source_address=(source, 0))
    if door.trust is None:
        return raw
    try:
        return door.trust.wrap_socket(raw, server_hostname="127.0.0.1")
    except OSError:
        raw.close()
        raise


def read_all(client: socket.socket) -> bytes:
    """Read until the other side ends, in whatever way."""
    received = b""
    with suppress(ConnectionError, ssl.SSLError):
        while data := client.recv(65536):
            received += data
    return received


def exchange(door: Reachable, request: bytes, source: str = "127.0.0.1") -> bytes:
    """Send bytes, and return all that comes back until the door closes; b"" where it resets."""
    with dial(door, source) as client:
        with suppress(ConnectionError, ssl.SSLError):
            client.sendall(request)
        return read_all(client)


def status(answer: bytes) -> int:
    """Return the status of an answer, 0 where there is none."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


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
