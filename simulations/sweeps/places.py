"""Where a sweep keeps its locks and its runs' output, and what of the machine its runs may use."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from shared.paths import home

CGROUP = Path("/sys/fs/cgroup")
SMI = ("nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits")  # a line a GPU, in MiB
A_RUN = (
    3 * 2**30
)  # bytes of memory, and of a GPU's, for one run: a small Transformer with its optimiser and a site's batch


def folder(sweep: str) -> Path:
    """Where a sweep's files are: sweep.lock, and for each run CELL-SEED.lock and CELL-SEED.log."""
    return (home() / "sweeps" / sweep).absolute()


def cores() -> int:
    """How many cores this process may use, by its affinity and its container's share."""
    found = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # no container's limits, or "max"
        quota, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()
        found = min(found, max(1, int(quota) // int(period)))
    return found


def memory() -> int:
    """How many bytes are free to use, on the machine and in the container."""
    found: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        most, used = (int((CGROUP / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        found = min(found, most - used)
    return found


def gpus(device: str) -> dict[int, int]:
    """Give the free bytes of each GPU that runs on `device` may use, by its number; none without NVIDIA's driver."""
    if not device.startswith(("auto", "cuda")):
        return {}
    try:
        asked = subprocess.run(SMI, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603 - our own words
    except (OSError, subprocess.SubprocessError):
        return {}
    free = {
        number: int(line) * 2**20 for number, line in enumerate(asked.stdout.splitlines()) if line.strip().isdigit()
    }
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = list(free) if shown is None else [int(each) for each in shown.split(",") if each.strip().isdigit()]
    visible = [number for number in visible if number in free]
    named = device.partition(":")[2]
    if named.isdigit():
        visible = visible[int(named) : int(named) + 1]
    return {number: free[number] for number in visible}


def jobs(runs: int, device: str, asked: int | None = None) -> int:
    """How many runs at once: as asked, or one a core where memory allows, the GPUs' too."""
    held = gpus(device)
    room = min(cores(), memory() // A_RUN, *([sum(free // A_RUN for free in held.values())] if held else []))
    return max(1, min(asked or room, runs))
