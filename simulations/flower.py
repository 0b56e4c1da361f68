"""Run a prepared simulation on Flower's own engine: a SuperLink and a simulation of this run's own, and Ray under it.

Both are children of this process and die with it, however it ends; what they start is known by a mark in its environment.
The SuperLink listens on a free port of the loopback, has its home in the run's folder, and gives its tasks to whoever holds
a secret that is made here: another user of this machine can enter a run there, and nobody plays it.
"""

import os
import re
import secrets
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

import torch
from flwr.proto.federation_config_pb2 import SimulationConfig
from rich.console import Console

from server import ending, job
from server.daemon.flower import Flower
from server.daemon.superlink import environment
from server.history.records import Run
from server.history.store import History
from shared.certificates import write_key
from shared.errors import ConfigError, MachineError, RunFailedError
from shared.paths import home
from shared.processes import Child
from simulations import cluster, prepare, timing
from simulations.following import Follower
from simulations.progress import Live
from simulations.reaper import reaping

POLL = 0.2  # seconds between looks at the history
STARTING = 180.0  # seconds that a SuperLink may take until it answers
LINES = 200  # of the processes' last words that are searched for a reason
FOLDER, LOG = "flower", "flower.log"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
SAID_WHY = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception)\b: .")
WRAPPED = ("Simulation Runtime crashed.", "An error was encountered. Ending simulation.")  # Flower's, around the cause


@dataclass(frozen=True)
class Resources:
    """What a site's turn takes of the machines, and which machines they are.

    Attributes
    ----------
    cpus
        CPUs of a site at work: as many sites work at once as fit.
    gpus
        The same of GPUs: 0.25 puts four sites on one; more than one are whole.
    address
        A running Ray cluster, "HOST:PORT", or "auto" for the one that this machine is part of; None: Ray is started here.
    """

    cpus: int = 1
    gpus: float = 0.0
    address: str | None = None

    def check(self, device: str) -> None:
        """Refuse, before anything is laid out or started, what could not run.

        Raises
        ------
        ConfigError
            In one line.
        """
        if find_spec("ray") is None:
            raise ConfigError(
                "--engine flower needs Ray, which is not installed: pip install 'moonflower[ray]' (or '.[ray]' in a checkout)."
            )
        if self.cpus < 1:
            raise ConfigError(f"--cpus-per-site {self.cpus} is below 1.")
        if not (0 <= self.gpus <= 1 or (self.gpus > 1 and float(self.gpus).is_integer())):
            raise ConfigError(
                f"--gpus-per-site {self.gpus:g} is neither a share from 0 to 1 nor a whole number of GPUs."
            )
        self.check_device(device)
        if self.address is not None:
            cluster.check(self.address, home(), cpus=self.cpus, gpus=self.gpus)
            return
        if self.cpus > (cores := os.cpu_count() or 1):
            raise ConfigError(f"--cpus-per-site {self.cpus} is above the {cores} CPUs of this machine.")
        if self.gpus > (found := torch.cuda.device_count()):
            raise ConfigError(
                f"--gpus-per-site {self.gpus:g}: this machine has {found or 'no'} GPU{'s' * (found > 1)} that torch sees; leave it "
                "out, or name a Ray cluster that has them by --ray-address."
            )

    def check_device(self, device: str) -> None:
        """Refuse a run on a GPU whose sites ask for none."""
        if device.startswith("cuda") and self.gpus == 0:
            raise ConfigError(
                f"device={device!r} and --gpus-per-site 0: Ray hides the GPUs from sites that ask for none; give them a "
                "share, as in --gpus-per-site 0.25."
            )


def play(run: str, database: str, console: Console | None, resources: Resources) -> Run:
    """Play what is left of a prepared run, and return it finished; `console` shows its progress.

    Raises
    ------
    ConfigError
        Where the machines do not have what is asked, before anything is started.
    RunFailedError
        Where it cannot go on; it can be resumed, by this engine or in process.
    """
    if timing.dynamics(run) is not None:
        raise ConfigError(
            "[dynamics] simulates the sites' time, and --engine flower does not; leave out the one or the other."
        )
    folder, sites = prepare.run_folder(run), len(prepare.nodes(run))
    planned = job.load(folder)
    resources.check_device(planned.device)
    with ExitStack() as stack:
        history = stack.enter_context(History.open(database))
        before = len(history.attempts(run))
        live = None if console is None else stack.enter_context(Live(console))
        follower = None if live is None else Follower(history, run, live)
        last_lines = deque[str](maxlen=LINES)
        try:
            with _simulation(folder, sites, database, resources, last_lines) as simulation:
                while (code := simulation.poll()) is None:
                    if follower is not None:
                        follower.look()
                    time.sleep(POLL)
            if follower is not None:
                follower.look()
        except BaseException as error:
            attempts = history.attempts(run)
            if len(attempts) > before and attempts[-1].ended_at is None:
                ending.close(planned, history, attempts[-1].number, error)
            raise
        finished = history.run(run)
        if finished.status != "completed":
            _fail(planned, history, before, code, last_lines)
        return finished


def _fail(planned: job.Job, history: History, before: int, code: int, last_lines: deque[str]) -> None:
    """Say why the simulation has ended before the run, and close the attempt if it has left it open.

    Raises
    ------
    RunFailedError
        Always.
    """
    log = prepare.run_folder(planned.run) / FOLDER / LOG
    attempts = history.attempts(planned.run)
    if len(attempts) > before and attempts[-1].error is not None:
        raise RunFailedError(attempts[-1].error)
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    error = MachineError(f"Flower's simulation ended by {how}: {_reason(last_lines)} ({log} has all that it said).")
    if len(attempts) > before:
        ending.close(planned, history, attempts[-1].number, error)
    raise error


@contextmanager
def _simulation(
    folder: Path, sites: int, database: str, resources: Resources, last_lines: deque[str]
) -> Iterator[Child]:
    """Start a SuperLink and the simulation of a run in it; both, and all that came of them, are gone at the end."""
    state = folder / FOLDER
    state.mkdir(exist_ok=True)
    mark = f"simulation {secrets.token_hex(8)}"
    with ExitStack() as stack:
        # Ray's sockets lie in its folder, and their names may have 107 characters.
        scratch = Path(tempfile.mkdtemp(prefix="moonflower-"))
        stack.enter_context(reaping(mark, scratch))
        log = stack.enter_context((state / LOG).open("a", encoding="utf-8"))
        own = environment(folder) | {"MOONFLOWER_DATABASE": database, "RAY_USAGE_STATS_ENABLED": "0"}
        if resources.address is None:
            # Ray listens on all of the machine's addresses, and runs what it is given: by nobody without the token.
            own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            own |= {"RAY_ADDRESS": "local", "RAY_TMPDIR": str(scratch)}
        elif resources.address == "auto":
            own.setdefault("RAY_ADDRESS", "auto")
        else:
            own["RAY_ADDRESS"] = resources.address
        secret, secret_file = secrets.token_bytes(32), scratch / "secret"
        write_key(secret_file, secret)
        address = f"127.0.0.1:{_free_port()}"
        host, _, port = address.partition(":")
        command = ["flower-superlink", "--simulation", "--insecure", "--disable-runtime-dependency-installation"]
        command += ["--host", host, "--port", port]
        command += ["--isolation", "process", "--superexec-auth-secret-file", str(secret_file)]
        link = Child("flower-superlink", command, own, on_line=_to(log), mark=f"{mark}#superlink")
        stack.callback(link.stop, 0)  # nothing that it keeps is wanted again
        flower = Flower(address, None, secret, client="simulations.nodes:app")
        stack.callback(flower.close)  # before the SuperLink's end, which waits for its connections
        _wait_for(link, flower, state / LOG)
        needs = SimulationConfig(
            num_supernodes=sites,
            client_resources_num_cpus=resources.cpus,
            client_resources_num_gpus=resources.gpus,
            init_args_log_to_driver=False,
        )
        token = scratch / "token"
        write_key(token, flower.simulate(folder, needs).token.encode())
        command = ["flwr-simulation", "--runtime-api-address", address, "--token-file", str(token), "--insecure"]
        take = _to(log, last_lines)
        simulation = Child("flwr-simulation", command, own, on_line=take, mark=f"{mark}#simulation")
        stack.callback(simulation.stop, 0)
        yield simulation


def _wait_for(link: Child, flower: Flower, log: Path) -> None:
    until = time.monotonic() + STARTING
    while not flower.alive():
        if (code := link.poll()) is not None:
            raise MachineError(f"flower-superlink ended as it started, by exit code {code}; {log} says why.")
        if time.monotonic() > until:
            raise MachineError(f"flower-superlink did not answer within {STARTING:g} s; see {log}.")
        time.sleep(POLL / 2)


def _to(log: TextIO, last: deque[str] | None = None) -> Callable[[str], None]:
    """Return what writes lines into the log, without their colours, and keeps the last ones."""

    def take(line: str) -> None:
        text = COLOURS.sub("", line).rstrip()
        if last is not None:
            last.append(text)
        with suppress(ValueError):  # closed: the last lines of a process that was killed
            log.write(f"{text}\n")
            log.flush()

    return take


def _reason(lines: deque[str]) -> str:
    """Return the last line that names an error, else the last line."""
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if SAID_WHY.match(line) and not line.endswith(WRAPPED)]
    return (errors or said or ["it said nothing"])[-1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
