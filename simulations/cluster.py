"""What a running Ray cluster has: asked before a run is given to it, by a process of its own, for Ray's driver takes signals over.

    python -m simulations.cluster FOLDER      prints the machines of the cluster at $RAY_ADDRESS, as JSON

A simulated site keeps its ledger in the run's folder, and a ledger is one machine's: two of them would not see what the other
has charged, so a ledger refuses a file system of several machines. Flower's engine gives a site's next message to whichever
worker is free. All of a cluster's nodes must therefore be on one machine, the one with the run's folder.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.errors import ConfigError

SECONDS = 60.0  # that a cluster gets to answer
KERNEL = Path("/proc/sys/kernel/random/boot_id")  # the same in every container of a machine, until it starts anew
GUIDE = "docs/guides/flower-engine.md, Several machines"


@dataclass(frozen=True)
class Node:
    """One node of a Ray cluster."""

    address: str
    host: str
    cpus: float
    gpus: float
    kernel: str  # what tells machines apart
    sees: bool  # the run's folder is there


def check(address: str, folder: Path, *, cpus: int, gpus: float) -> None:
    """Refuse a cluster that does not answer, has no room for a site, or is of several machines.

    Raises
    ------
    ConfigError
        In one line.
    """
    nodes = look(address, folder)
    own = KERNEL.read_text(encoding="utf-8").strip()
    for node in nodes:
        if node.kernel != own:
            raise ConfigError(
                f"--ray-address {address}: its node {node.address} ({node.host}) is another machine, and the sites' ledgers, which "
                f"are in the run's folder, are this one's ({GUIDE}); use a cluster whose nodes are all on this machine."
            )
        if not node.sees:
            raise ConfigError(
                f"--ray-address {address}: its node {node.address} ({node.host}) does not see {folder}; start Ray as the same user "
                "and in the same container, or set MOONFLOWER_HOME to a folder that both see."
            )
    if not any(node.cpus >= cpus and node.gpus >= gpus for node in nodes):
        has = "; ".join(f"{node.address}: {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in nodes)
        raise ConfigError(
            f"--cpus-per-site {cpus} and --gpus-per-site {gpus:g} fit on no node of the Ray cluster ({has}); ask for less."
        )


def look(address: str, folder: Path) -> list[Node]:
    """Ask a cluster for its nodes that live.

    Raises
    ------
    ConfigError
        Where none answers.
    """
    no_answer = (
        f"--ray-address {address}: no Ray cluster answers there; start one with `ray start --head`, or leave it out."
    )
    host, colon, port = address.rpartition(":")
    if address != "auto":
        if not (colon and host and port.isdecimal()) or "/" in host:
            raise ConfigError(f"--ray-address {address} is neither HOST:PORT nor auto.")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, OverflowError):
            raise ConfigError(no_answer) from None
    own = dict(os.environ) | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_LOG_TO_STDERR": "0"}
    if address != "auto" or "RAY_ADDRESS" not in own:
        own["RAY_ADDRESS"] = address
    try:
        asked = subprocess.run(  # noqa: S603 - our own module
            [sys.executable, "-m", "simulations.cluster", str(folder)],
            env=own,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
        return [Node(**values) for values in json.loads(asked.stdout.splitlines()[-1])]
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise ConfigError(f"{no_answer} Ray said: {said[0]}") from None
    except (subprocess.TimeoutExpired, ValueError, IndexError, TypeError):
        raise ConfigError(no_answer) from None


def nodes(folder: Path) -> list[Node]:
    """Return the nodes of the cluster at $RAY_ADDRESS, each asked by a task of its own on it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(
        log_to_driver=False,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
    )

    def seen() -> tuple[str, bool]:
        return KERNEL.read_text(encoding="utf-8").strip(), folder.is_dir()

    asking: Any = ray.remote(seen)
    listed: Any = ray.nodes
    alive = [node for node in listed() if node["Alive"]]
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in alive]
    asked = [asking.options(num_cpus=0, scheduling_strategy=place).remote() for place in places]
    found = []
    for node, (kernel, sees) in zip(alive, ray.get(asked), strict=True):
        has = node["Resources"]
        address, host = node["NodeManagerAddress"], node["NodeManagerHostname"]
        found.append(Node(address, host, has.get("CPU", 0.0), has.get("GPU", 0.0), kernel, sees))
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps([asdict(node) for node in nodes(Path(sys.argv[1]))]) + "\n")
