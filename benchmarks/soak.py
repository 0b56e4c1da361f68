"""A long run over real processes with random kills, and whether anything grows meanwhile.

    python benchmarks/soak.py                          200 rounds, 3 sites, a tiny model, a kill in one round of eight
    python benchmarks/soak.py --rounds 60 --seed 7

A federation from its kits plays one run. Now and then a process is killed at a random moment: SuperLink, ServerApp, and
at two of the sites SuperNode or worker. The daemon, its gateway and control service, and the whole third site live through it all. After
each round every process's resident memory, open files and sockets are read. For each process that lived long enough the
table has a slope by least squares over the second half of its life, once caches are warm, with its standard error: flat is
a slope within two standard errors of zero, or of less than LIMIT over the whole soak.
"""

import argparse
import os
import platform
import random
import secrets
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import machines as federations
import numpy as np
import psutil
from machines import Machines
from tiny import make_model

SITES = {"north": 60, "south": 80, "west": 100}
KILLED = ("superlink", "serverapp", "supernode:north", "worker:north", "supernode:south", "worker:south")
LIMIT = 16.0  # MiB over the whole soak
LONG_ENOUGH = 30  # readings, of which the second half is fitted
Reading = tuple[float, float, int, int]  # seconds since the start, MiB, files, sockets


def read(process: psutil.Process, since: float) -> Reading:
    """Read a process."""
    with process.oneshot():
        memory, files = process.memory_info().rss / 2**20, process.num_fds()
        return time.monotonic() - since, memory, files, len(process.net_connections())


def slope(seconds: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Return the slope by least squares, and its standard error, both an hour."""
    hours = (seconds - seconds.mean()) / 3600
    spread = float((hours**2).sum())
    steep = float((hours * (values - values.mean())).sum()) / spread
    left = values - values.mean() - steep * hours
    return steep, float(np.sqrt((left**2).sum() / (len(values) - 2) / spread))


def play(machines: Machines, run: str, draw: random.Random, rate: float) -> dict[tuple[str, int], list[Reading]]:
    """Read every process after each round, and kill one now and then."""
    readings: dict[tuple[str, int], list[Reading]] = defaultdict(list)
    started, seen, kills = time.monotonic(), 0, 0
    with machines.history() as history:
        while history.run(run).status not in {"completed", "failed", "stopped"}:
            done = history.run(run).rounds_done
            if done == seen:
                time.sleep(0.2)
                continue
            seen = done
            for name, process in federations.processes_of(machines):
                with suppress(psutil.NoSuchProcess):
                    readings[name, process.pid].append(read(process, started))
            if draw.random() < rate:
                time.sleep(draw.random() * 6)
                role = draw.choice(KILLED)
                found = machines.found(role)
                if found is not None:
                    found.kill()
                    kills += 1
                    print(f"round {seen}: {role} killed", file=sys.stderr, flush=True)
    minutes = (time.monotonic() - started) / 60
    print(f"{machines.run(run).status} after {seen} rounds in {minutes:.0f} min, {kills} kills")
    return readings


def main() -> None:
    """Play the soak and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1 / 8, help="Share of rounds after which something is killed.")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    asked = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, {asked.rounds} rounds, {len(SITES)} sites, seed {asked.seed}")
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch, "model"))
        machines = federations.provisioned(Path(scratch, "federation"), SITES, model=str(model))
        try:
            machines.start_all()
            config = machines.folder / "run.toml"
            wild = 'min_sites = 1\ndeadline = 60.0\non_shortfall = "wait"'
            text = federations.tiny_run(str(model), rounds=asked.rounds, sites=1).replace("min_sites = 1", wild)
            config.write_text(text.replace("epsilon = 8", "epsilon = 50"), encoding="utf-8")
            run = machines.submit(config)
            readings = play(machines, run, random.Random(asked.seed), asked.rate)  # noqa: S311 - what is killed
            with machines.history() as history:
                attempts, rounds = history.attempts(run), history.rounds(run)
        finally:
            machines.end()
    print(f"{len(rounds)} rounds committed in {len(attempts)} attempts")
    print()
    print("| process | readings | MiB first, last | MiB an hour ± s.e. | files | sockets | flat |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, _), taken in sorted(readings.items()):
        if len(taken) < LONG_ENOUGH:
            continue
        seconds, memory, files, sockets = (np.array(column, dtype=float) for column in zip(*taken, strict=True))
        half = len(taken) // 2
        steep, error = slope(seconds[half:], memory[half:])
        flat = abs(steep) < 2 * error or abs(steep) * seconds[-1] / 3600 < LIMIT
        spans = [f"{int(column[half:].min())} to {int(column[half:].max())}" for column in (files, sockets)]
        cells = (name, len(taken), f"{memory[0]:.0f}, {memory[-1]:.0f}", f"{steep:+.1f} ± {error:.1f}", *spans)
        print("| " + " | ".join(map(str, cells)) + f" | {'yes' if flat else '**no**'} |")


if __name__ == "__main__":
    main()
