"""A federation of machines on one: `moonflower provision`, a daemon and its nodes as real processes on loopback.

For the tests of the whole, `round_overhead.py` and `soak.py`. Everything is done as an operator would, with commands; what
processes do is looked at from outside: their files, the history, the process table.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil

from server.history.records import Progress, Round, Run
from server.history.store import History

T = TypeVar("T")
PATIENCE = 120.0  # seconds, for anything that is sure to come
GOOD, BAD = ("good", "great", "fine", "lovely", "bright"), ("bad", "awful", "poor", "dull", "grim")
FILLING = ("the", "a", "film", "book", "song", "was", "is", "really", "so", "we", "found", "it", "and", "very")
LABELS = ("negative", "positive")


@dataclass
class Machines:
    """A provisioned federation under `folder`; `site_records` is what each site declares, and holds."""

    folder: Path
    site_records: Mapping[str, int]
    database: str
    environment: dict[str, str]
    gateway: int
    control: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def kits(self) -> Path:
        """All parties' kits."""
        return self.folder / "kits"

    @property
    def server(self) -> Path:
        """The coordinator's kit, where its state lies."""
        return self.kits / "coordinator"

    @property
    def state(self) -> Path:
        """The daemon's own folder."""
        return self.server / "state"

    def site(self, name: str) -> Path:
        """A site's kit, where its state and ledger lie."""
        return self.kits / "sites" / name

    def log(self, name: str) -> str:
        """Give what a process wrote."""
        file = self.folder / f"{name}.log"
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    # Commands

    def moonflower(self, *arguments: str, user: str = "alice", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `moonflower ARGUMENTS` to its end as a user with an operator's kit."""
        done = subprocess.run(
            [_moonflower(), *arguments],
            env=self.environment | {"MOONFLOWER_HOME": str(self.kits / "users" / user)},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=5 * PATIENCE,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"moonflower {' '.join(arguments)}: exit {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def submit(self, config: Path, *arguments: str) -> str:
        """Submit a run, and give its id."""
        printed = self.moonflower("run", "submit", str(config), *arguments, "--format", "json").stdout
        return str(json.loads(printed)["id"])

    # Processes

    def start(self, name: str, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[bytes]:
        """Start `moonflower ARGUMENTS`; it writes into `name`.log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [_moonflower(), *arguments],
                stdout=log,
                stderr=log,
                env=self.environment | environment,
                cwd=cwd or self.folder,
                preexec_fn=hear_interrupts,
            )
        self.processes[name] = process
        return process

    def start_server(self, **environment: str) -> None:
        """Start the daemon; give when its control port answers."""
        self.start("server", "server", "start", "--config", "server.toml", cwd=self.server, **environment)
        self.wait_for(lambda: self._alive("server") and _answers(self.control), "control port")

    def start_site(self, name: str, **environment: str) -> None:
        """Start a site's node."""
        self.start(name, "client", "start", "--config", "site.toml", cwd=self.site(name), **environment)

    def start_all(self) -> None:
        """Start the daemon and every site."""
        self.start_server()
        for name in self.site_records:
            self.start_site(name)

    def _alive(self, name: str) -> bool:
        if (code := self.processes[name].poll()) is not None:
            raise RuntimeError(f"{name} ended with {code}: {self.log(name)[-2000:]}")
        return True

    def found(self, role: str) -> psutil.Process | None:
        """Give the process of a role, or None where there is none now.

        daemon, superlink, serverapp; and node, supernode, worker as in `worker:north`.
        """
        kind, _, site = role.partition(":")
        root = self.processes.get(site or "server")
        if root is None or root.poll() is not None:
            return None
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(root.pid)
            if kind in {"daemon", "node"}:
                return top
            mark = {
                "superlink": "flower-superlink",
                "serverapp": "flwr-serverapp",
                "supernode": "flower-supernode",
                "worker": "client.node.worker",
            }[kind]
            for process in top.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if any(mark in part for part in process.cmdline()):
                        return process
        return None

    def kill(self, role: str) -> int:
        """SIGKILL a role's process once it is there; give its pid."""
        process = self.wait_for(lambda: self.found(role), role)
        process.send_signal(signal.SIGKILL)
        kind, _, site = role.partition(":")
        if kind in {"daemon", "node"}:
            self.processes[site or "server"].wait()
        return int(process.pid)

    def family(self, name: str) -> list[psutil.Process]:
        """Give a started process and all that come from it."""
        top = psutil.Process(self.processes[name].pid)
        return [top, *top.children(recursive=True)]

    def leftovers(self) -> list[str]:
        """Give the command lines of processes that belong to this federation, by their environment's mark."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("MOONFLOWER_TEST") == str(self.folder) and process.status() != "zombie":
                    found.append(" ".join(process.cmdline()))
        return found

    def end(self) -> None:
        """End everything that still runs, children included."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("MOONFLOWER_TEST") == str(self.folder):
                    process.kill()
        for started in self.processes.values():
            started.wait()

    # What happened

    def history(self) -> History:
        """Open the history, as another process."""
        return History.open(self.database, create=False)

    def run(self, run: str) -> Run:
        """Give a run."""
        with self.history() as history:
            return history.run(run)

    def rounds(self, run: str) -> list[Round]:
        """Give a run's committed rounds."""
        with self.history() as history:
            return history.rounds(run)

    def progress(self, run: str, after: int = 0) -> list[Progress]:
        """Give what a run's watcher is told."""
        with self.history() as history:
            return history.progress(run, after=after)

    def ledger(self, name: str) -> list[tuple[str, str, int, str]]:
        """Give (run, request, round, part) of each spend in a site's ledger file, read without Moonflower."""
        file = self.site(name) / "ledger.db"
        if not file.exists():
            return []
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
            try:
                return connection.execute("SELECT run, request, round, part FROM spends ORDER BY id").fetchall()
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):
                    return []
                raise

    def wait_for(self, look: Callable[[], T | None], what: str, patience: float = PATIENCE, every: float = 0.01) -> T:
        """Look until something is there, and give it."""
        until = time.monotonic() + patience
        while not (found := look()):
            if time.monotonic() > until:
                logs = "\n".join(f"--- {name}\n{self.log(name)[-3000:]}" for name in self.processes)
                raise TimeoutError(f"no {what} within {patience:g} s\n{logs}")
            time.sleep(every)
        return found

    def wait_until_finished(self, run: str, patience: float = 5 * PATIENCE) -> Run:
        """Give the run once it is completed, failed or stopped."""

        def look() -> Run | None:
            now = self.run(run)
            return now if now.status in {"completed", "failed", "stopped"} else None

        return self.wait_for(look, f"end of {run}", patience, every=0.25)


def provisioned(
    folder: Path,
    sites: Mapping[str, int],
    *,
    model: str,
    database: str = "",
    texts: Callable[[str, int], list[dict[str, str]]] | None = None,
    max_epsilon: float = 1000.0,
) -> Machines:
    """Lay out `folder`: federation.toml, its kits, and each site's made-up records."""
    gateway, control = free_ports(2)
    url = database or f"sqlite:///{folder / 'kits' / 'coordinator' / 'state' / 'history.db'}"
    blocks = "".join(
        f"""
        [[sites]]
        name = "{name}"
        dataset = {{ id = "texts.{name}", path = "records.jsonl", records = {count}, labels = {json.dumps(LABELS)} }}
        privacy = {{ max_epsilon = {max_epsilon}, max_run_epsilon = 100.0, delta = 1e-4, models = [{json.dumps(model)}] }}
        """
        for name, count in sites.items()
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "federation.toml").write_text(
        f"""
        name = "loopback"
        [coordinator]
        hosts = ["127.0.0.1", "localhost"]
        gateway_port = {gateway}
        control_port = {control}
        database = "{url}"
        {blocks}
        [[users]]
        name = "alice"
        role = "admin"
        [[users]]
        name = "victor"
        role = "viewer"
        """,
        encoding="utf-8",
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("MOONFLOWER_", "FLWR_"))},
        "MOONFLOWER_TEST": str(folder),
        "MOONFLOWER_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    machines = Machines(folder, sites, url, environment, gateway, control)
    done = subprocess.run(
        [_moonflower(), "provision", "federation.toml", "--out", "kits"],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"provision: exit {done.returncode}: {done.stdout}{done.stderr}")
    for name, count in sites.items():
        rows = texts(name, count) if texts else made_up(count, name)
        write_rows(machines.site(name) / "records.jsonl", rows)
    return machines


def tiny_run(model: str, *, rounds: int, sites: int, trainable: str = "full", extra: str = "") -> str:
    """Give a run.toml that a tiny model learns from `made_up` texts."""
    return f"""
        name = "tiny"
        [model]
        name = {json.dumps(model)}
        trainable = "{trainable}"
        [task]
        labels = {json.dumps(LABELS)}
        max_length = 16
        [training]
        rounds = {rounds}
        local_steps = 2
        sampling_rate = 0.5
        clipping_norm = 1.0
        server_learning_rate = 0.01
        [privacy]
        epsilon = 8
        delta = 1e-4
        [federation]
        min_sites = {sites}
        {extra}"""


def made_up(count: int, prefix: str) -> list[dict[str, str]]:
    """Give texts that a word count tells apart: three words of their label's kind among a few others."""
    source, rows = random.Random(prefix), []  # noqa: S311 - made-up texts
    for number in range(count):
        words = source.choices(GOOD if number % 2 else BAD, k=3) + source.choices(FILLING, k=source.randrange(2, 6))
        source.shuffle(words)
        rows.append({"id": f"{prefix}-{number}", "text": " ".join(words), "label": LABELS[number % 2]})
    return rows


def write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    """Write JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def free_ports(count: int) -> list[int]:
    """Give ports of loopback that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def hear_interrupts() -> None:
    """Undo what a shell does to its background jobs, which ignore Ctrl-C, and so would their children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _answers(port: int) -> bool:
    with closing(socket.socket()) as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _moonflower() -> str:
    command = shutil.which("moonflower", path=str(Path(sys.executable).parent))
    if command is None:
        raise RuntimeError("moonflower is not installed beside this Python")
    return command


class Cable:
    """A cable between sites and coordinator: a TCP relay on loopback that can be cut and mended."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._whole = threading.Event()
        self._whole.set()
        self._ends: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break every connection, and take no new one."""
        self._whole.clear()
        for end in list(self._ends):
            _close(end)

    def mend(self) -> None:
        """Let connections through again."""
        self._whole.set()

    def close(self) -> None:
        """Take the cable away."""
        self.cut()
        _close(self._listener)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if not self._whole.is_set():
                    _close(near)
                    continue
                try:
                    far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
                except OSError:
                    _close(near)
                    continue
                far.settimeout(None)
                self._ends |= {near, far}
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._relay, args=(source, sink), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            self._ends.discard(end)
            _close(end)


def _close(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


def point_at(machines: Machines, site: str, port: int) -> None:
    """Let a site connect to another port of loopback: to a `Cable`."""
    file = machines.site(site) / "site.toml"
    text = file.read_text(encoding="utf-8")
    file.write_text(re.sub(rf"(address = \"[^\"]*:){machines.gateway}\"", rf'\g<1>{port}"', text), encoding="utf-8")


def processes_of(machines: Machines) -> Iterator[tuple[str, psutil.Process]]:
    """Give each process of a federation with a name for it."""
    for name in list(machines.processes):
        for process in machines.family(name):
            with suppress(psutil.NoSuchProcess):
                command = process.cmdline()
                said = next((Path(part).name for part in command[:2] if "flower" in part or "flwr" in part), command[0])
                yield f"{name}/{said}", process
