"""Where a sweep keeps its locks and its runs' output, and what of the machine its processes may use."""

import os
from contextlib import suppress
from pathlib import Path

import psutil

from shared.paths import home

CGROUP = Path("/sys/fs/cgroup")
A_RUN = 3 * 2**30  # bytes of memory for one run: a small Transformer with its optimiser and a site's batch


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


def jobs(runs: int, asked: int | None = None) -> int:
    """How many runs at once: as asked, or one a core where memory allows."""
    at_once = asked or min(cores(), memory() // A_RUN)
    return max(1, min(at_once, runs))
