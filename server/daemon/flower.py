"""What is asked of a SuperLink: who its nodes are, a run's start and end, and the task of a ServerApp or a simulation.

Flower's Control and Runtime APIs, by Flower's own clients; nothing else knows them. Every call may block for `SECONDS`
and belongs in a thread.
"""

import ssl
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.federation_config_pb2 import SimulationConfig
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from shared.errors import MoonflowerError

SECONDS = 30.0  # of any call; the clients' own limit
SOON = 10.0  # seconds in which a SuperLink that works answers `alive`
FINISHED = "finished"
T = TypeVar("T")

# A bundle of these lines alone: both apps are the installed ones, by name.
CLIENT = "client.app:app"
BUNDLE = """
[project]
name = "moonflower"
version = "0.1.0"

[tool.flwr.app]
publisher = "moonflower"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "{client}"

[tool.flwr.app.config]
run = ""
database = ""
engine = "flower"
authenticated = true
"""


class SuperLinkError(MoonflowerError):
    """The SuperLink does not answer, or refuses what the daemon asks of it."""


@dataclass(frozen=True)
class Node:
    """A node that the SuperLink knows."""

    id: int
    key: str  # its public key, the OpenSSH line
    online: bool
    heard_at: datetime | None  # within its last heartbeats; None: never


@dataclass(frozen=True)
class Started:
    """A Flower run whose process waits to be started, and the token with which that takes up its task."""

    id: int
    token: str


class Flower:
    """The APIs of the SuperLink at `address`.

    Parameters
    ----------
    address : str
        "127.0.0.1:port".
    ca : Path | None
        The authority of its certificate; None: plaintext.
    secret : bytes
        What it was started with, for whoever takes tasks.
    client : str
        The ClientApp of its runs, "module:name"; sites' own processes run theirs, whatever is named here.
    """

    def __init__(self, address: str, ca: Path | None, secret: bytes, client: str = CLIENT) -> None:
        root, insecure = None if ca is None else ca.read_bytes(), ca is None
        self._authenticated = not insecure  # --insecure: nodes without keys that anyone has enrolled
        version = RuntimeVersionHttpInterceptor(component_name="moonflower")
        acquiring = SuperExecAuthHttpInterceptor(
            master_secret=secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
        )
        self._control = ControlHttpClient.from_server_address(address, insecure, root, [version])
        scheme, verify = ("http", True) if ca is None else ("https", ssl.create_default_context(cafile=ca))
        self._probe = ControlHttpClient(f"{scheme}://{address}", interceptors=[version], verify=verify, timeout=SOON)
        self._runtime = RuntimeHttpClient.from_server_address(address, insecure, root, [version, acquiring])
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "pyproject.toml").write_text(BUNDLE.format(client=client), encoding="utf-8")
            content = build_fab_from_disk(Path(folder))
        self._bundle = fab_to_proto(Fab(sha256(content).hexdigest(), content, {}))

    def close(self) -> None:
        """Let go of the connections: a SuperLink waits for them when it is to end."""
        for client in (self._control, self._probe, self._runtime):
            client.close()

    def alive(self) -> bool:
        """Whether it does its part: a look into its state, answered within `SOON` seconds."""
        try:
            _asked(lambda: self._probe.ListNodes(ListNodesRequest()))
        except SuperLinkError:
            return False
        return True

    def nodes(self) -> list[Node]:
        """Give the nodes that are registered."""
        found = _asked(lambda: self._control.ListNodes(ListNodesRequest())).nodes_info
        nodes = []
        for info in found:
            if not info.public_key or info.unregistered_at:
                continue
            key = load_pem_public_key(info.public_key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
            online = info.status == "online"
            silent = HEARTBEAT_PATIENCE * info.heartbeat_interval if online else 0.0
            heard = datetime.fromtimestamp(info.online_until - silent, UTC) if info.online_until else None
            nodes.append(Node(info.node_id, key, online, heard))
        return nodes

    def register(self, key: str, site: str) -> int:
        """Let the node that holds this key in, and give its id."""
        pem = load_ssh_public_key(key.encode()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return int(_asked(lambda: self._control.RegisterNode(RegisterNodeRequest(public_key=pem, name=site))).node_id)

    def unregister(self, node: int) -> None:
        """Shut a node out; its key can be registered again, and only whoever asks knows that it must not."""
        _asked(lambda: self._control.UnregisterNode(UnregisterNodeRequest(node_id=node)))

    def start(self, folder: Path) -> Started:
        """Enter a Flower run for the Moonflower run in `folder`, and take its ServerApp's task."""
        config = user_config_to_proto({"run": str(folder), "authenticated": self._authenticated})
        return self._start(StartRunRequest(fab=self._bundle, override_config=config), TaskType.SERVER_APP)

    def simulate(self, folder: Path, resources: SimulationConfig) -> Started:
        """Enter a Flower run that plays all sites of `folder` itself, and take its task; for a SuperLink of simulations."""
        config = user_config_to_proto({"run": str(folder), "authenticated": False})
        request = StartRunRequest(fab=self._bundle, override_config=config, override_federation_config=resources)
        return self._start(request, TaskType.SIMULATION)

    def _start(self, request: StartRunRequest, kind: TaskType) -> Started:
        run = int(_asked(lambda: self._control.StartRun(request)).run_id)
        if not run:
            raise SuperLinkError("the SuperLink did not start a Flower run.")
        tasks = AcquireTaskRequest(supported_task_types=[kind])
        while (taken := _asked(lambda: self._runtime.AcquireTask(tasks))).token:
            if taken.task.run_id == run:
                return Started(run, taken.token)
            self.stop(taken.task.run_id)  # of a daemon that died between the two calls
        raise SuperLinkError(f"the SuperLink gives no task for its run {run}.")

    def stop(self, run: int) -> None:
        """End a Flower run; one that has ended already is left as it is."""
        with suppress(SuperLinkError):
            _asked(lambda: self._control.StopRun(StopRunRequest(run_id=run)))

    def unfinished(self) -> list[int]:
        """Give the Flower runs that have not ended."""
        runs = _asked(lambda: self._control.ListRuns(ListRunsRequest())).run_dict
        return [run.run_id for run in runs.values() if run.status.status != FINISHED]


def _asked(call: Callable[[], T]) -> T:
    try:
        return call()
    except httpx.HTTPStatusError as error:
        said = " ".join(error.response.text.split())[:200]
        raise SuperLinkError(f"the SuperLink answers {error.response.status_code}: {said}") from error
    except (httpx.HTTPError, ValueError) as error:
        raise SuperLinkError(f"the SuperLink does not answer: {type(error).__name__}: {error}") from error
