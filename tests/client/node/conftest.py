"""A real SuperLink with TLS and node authentication, a run on it that asks what a test wants, and real nodes.

The run's bundle is hostile: its client code writes a file wherever it is imported. Its server code, which runs at the
coordinator, sends the requests that a test puts into a folder, and puts the replies there.
"""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest

from client import site as sites
from client.site import Site
from shared import certificates

BIN = Path(sys.executable).parent
ASKER = """
import os, pickle, time
from pathlib import Path
from flwr.app import Message
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    from shared.messages import FLOWER_TYPES, to_record
    folder, sent = Path(os.environ["ASKER"]), {}
    while not (folder / "stop").exists():
        for order in sorted(folder.glob("*.order")):
            node, kind, request = pickle.loads(order.read_bytes())
            order.unlink()
            type = FLOWER_TYPES.get(kind, kind)
            message = Message(content=to_record(request), dst_node_id=node, message_type=type, group_id="1")
            sent[next(iter(grid.push_messages([message])))] = order
        for reply in grid.pull_messages(list(sent)):
            order = sent.pop(reply.metadata.reply_to_message_id)
            record, values = [], {}
            if reply.has_content():
                values = dict(reply.content.config_records["values"])
                record = {key: {n: a.numpy() for n, a in arrays.items()} for key, arrays in reply.content.array_records.items()}
            said = {"error": reply.error.reason if reply.has_error() else None, "values": values, "arrays": record}
            fresh = order.with_suffix(".new")
            fresh.write_bytes(pickle.dumps(said))
            fresh.rename(order.with_suffix(".reply"))
        (folder / "nodes.new").write_text(" ".join(str(node) for node in grid.get_node_ids()))
        (folder / "nodes.new").rename(folder / "nodes")
        time.sleep(0.05)
"""
HOSTILE = """
import os
from pathlib import Path
from flwr.clientapp import ClientApp

Path(os.environ["HOSTILE_MARK"]).write_text(f"imported by {os.getpid()}")
app = ClientApp()
"""
BUNDLE = """
[project]
name = "hostile"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "nobody"

[tool.flwr.app.components]
serverapp = "asker:app"
clientapp = "hostile:app"

[tool.flwr.app.config]
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for(what: Callable[[], Any], why: str, seconds: float = 60.0) -> Any:
    """Wait until `what` gives something true, and return it."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, f"{why}: not within {seconds:g} s"
        time.sleep(0.05)
    return found


class Link:
    """A SuperLink on a free port of the loopback, and one run on it that asks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark, self.orders = folder, folder / "hostile.txt", folder / "asker"
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.tls = certificates.loopback(folder / "tls")
        self.orders.mkdir()
        home = folder / "flower"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink.test]\naddress = "{self.address}"\nroot-certificates = "{self.tls.ca}"\n', encoding="utf-8"
        )
        self.env = dict(os.environ) | {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "HOSTILE_MARK": str(self.mark),
            "ASKER": str(self.orders),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        self.numbers = count()

    def start(self) -> None:
        command = [BIN / "flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--ssl-ca-certfile", self.tls.ca, "--ssl-certfile", self.tls.certificate]
        command += ["--ssl-keyfile", self.tls.key, "--enable-supernode-auth", "--isolation", "subprocess"]
        command += ["--database", self.folder / "link.db", "--disable-runtime-dependency-installation"]
        self.log = (self.folder / "superlink.log").open("ab")
        self.process = subprocess.Popen(command, env=self.env, stdout=self.log, stderr=self.log, cwd=self.folder)
        wait_for(self._answers, "the SuperLink does not answer")

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def run(self) -> None:
        bundle = self.folder / "bundle"
        bundle.mkdir()
        (bundle / "pyproject.toml").write_text(BUNDLE, encoding="utf-8")
        (bundle / "asker.py").write_text(ASKER, encoding="utf-8")
        (bundle / "hostile.py").write_text(HOSTILE, encoding="utf-8")
        self.flwr("run", str(bundle), "test")

    def flwr(self, *words: str) -> str:
        done = subprocess.run(
            [BIN / "flwr", *words], env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def register(self, public: str, name: str) -> int:
        file = self.folder / f"{name}.pub"
        file.write_text(public, encoding="utf-8")
        said = json.loads(self.flwr("supernode", "register", str(file), "test", "--name", name, "--format", "json"))
        assert said["success"], said
        return int(said["node-id"])

    def nodes(self) -> set[int]:
        with suppress(OSError):
            return {int(node) for node in (self.orders / "nodes").read_text().split()}
        return set()

    def send(self, node: int, kind: str, request: Any) -> Path:
        """Send a request; the file that its reply will be in."""
        order = self.orders / f"{next(self.numbers):06}.order"
        order.with_suffix(".draft").write_bytes(pickle.dumps((node, kind, request)))
        order.with_suffix(".draft").rename(order)
        return order.with_suffix(".reply")

    def reply(self, file: Path, seconds: float = 60.0) -> Any:
        wait_for(file.exists, "no reply", seconds)
        return pickle.loads(file.read_bytes())  # noqa: S301 - our own

    def stop(self) -> None:
        (self.orders / "stop").touch()
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.log.close()


@pytest.fixture(scope="session")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    made = Link(tmp_path_factory.mktemp("link"))
    made.start()
    try:
        made.run()
        yield made
    finally:
        made.stop()


@dataclass
class NodeProcess:
    """A started node: `moonflower client start`."""

    site: Site
    file: Path
    link: Link
    id: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def log(self) -> str:
        return (self.file.parent / "node.log").read_text(encoding="utf-8")

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.processes[-1]

    def command(self, *words: str) -> list[str]:
        return [str(BIN / "moonflower"), "client", *words, "--config", str(self.file)]

    def start(self, *words: str, **env: str) -> None:
        with (self.file.parent / "node.log").open("ab") as log:
            self.processes.append(
                subprocess.Popen(self.command("start", *words), env=self.link.env | env, stdout=log, stderr=log)
            )

    def status(self) -> dict[str, Any]:
        assert self.site.coordinator is not None
        with suppress(OSError, ValueError):
            found = json.loads((self.site.coordinator.state / "status.json").read_text(encoding="utf-8"))
            return dict(found)
        return {}

    def up(self, seconds: float = 60.0) -> None:
        """Wait until the node is connected and its worker is warm."""

        def look() -> bool:
            assert self.process.poll() is None, self.log
            status = self.status()
            mine = status.get("pid") == self.process.pid and status["connected_since"] and status["worker"]["ready"]
            return bool(mine) and self.id in self.link.nodes()

        wait_for(look, "the node is not up", seconds)

    def ask(self, kind: str, request: Any, seconds: float = 60.0) -> Any:
        return self.link.reply(self.link.send(self.id, kind, request), seconds)

    def family(self) -> list[psutil.Process]:
        """Give the node's children, and theirs."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def at_work(self, run: str) -> int:
        """Wait until the worker is at work on a run, and give its process id."""
        wait_for(lambda: (self.status().get("task") or {}).get("run") == run, "the worker is not at work")
        return int(self.status()["worker"]["pid"])

    def moonflower(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one of the node's commands to its end."""
        return subprocess.run(self.command(*words), env=self.link.env, capture_output=True, text=True, timeout=120)

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


Make = Callable[..., NodeProcess]


@pytest.fixture(scope="session")
def make_node(link: Link, new_rows: Callable[..., list[dict[str, Any]]]) -> Make:
    """Make a site in a folder, with a key that the SuperLink knows; `start` starts its node. Who makes it stops it."""

    def make(folder: Path, *, register: bool = True, **changes: Any) -> NodeProcess:
        private, public = certificates.new_node_key()
        values: dict[str, Any] = {
            "name": "clinic",
            "device": "cpu",
            "dataset": {
                "id": "notes",
                "path": "records.jsonl",
                "records": 100,
                "validation": 0.2,
                "labels": ["bad", "good"],
            },
            "privacy": {"max_epsilon": 200.0, "delta": 1e-3, "models": ["*"]},
            "coordinator": {"name": "coordinator", "address": link.address},
        }
        for section, values_of in changes.items():
            values[section] = values[section] | values_of
        folder.mkdir(exist_ok=True)
        sites.save(Site.model_validate(values), folder / "site.toml")
        rows = "".join(json.dumps(row) + "\n" for row in new_rows())
        (folder / "records.jsonl").write_text(rows, encoding="utf-8")
        shutil.copy(link.tls.ca, folder / "ca.pem")
        certificates.write_key(folder / "site.key", private)
        number = link.register(public, f"site-{next(link.numbers)}") if register else 0
        return NodeProcess(sites.load(folder / "site.toml"), folder / "site.toml", link, number)

    return make


@pytest.fixture
def new_node(make_node: Make, tmp_path: Path) -> Iterator[Make]:
    """Make a site for one test; its node is stopped after it."""
    made: list[NodeProcess] = []

    def make(**changes: Any) -> NodeProcess:
        made.append(make_node(tmp_path / f"site-{len(made)}", **changes))
        return made[-1]

    yield make
    for node in made:
        node.stop()


@pytest.fixture(scope="module")
def running(make_node: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node that is up, for the tests of one module that leave it so."""
    node = make_node(tmp_path_factory.mktemp("running"))
    node.start()
    try:
        node.up()
        yield node
    finally:
        node.stop()
