"""What many sites cost: memory and time of runs of 100, 1,000 and 10,000 sites, every site in every round.

    python benchmarks/many_sites.py                               three sizes, 3 rounds each, one process
    python benchmarks/many_sites.py --sites 10000 --workers 2

A tiny Transformer (two layers of width 32) with LoRA, 20 made-up records a site, one step of 4 expected records a round, epsilon 8;
all sites join, train in each round, and are scored in the last one. Each size runs in fresh processes. Memory is what this run's
processes hold together (proportional set size, so that pages which they share count once), sampled twice a second by a
process beside them; `before` is after the imports and the model, before anything is laid out.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

EVERY = 0.5  # seconds between two samples, which each take some ms of the processor
RECORDS = 20  # a site


def play(work: Path, sites: int, rounds: int, workers: int) -> None:
    """Lay out and play a run; write what it took to `work`/said.json, as `measure` reads it."""
    import tiny
    from made_up_pool import made_up_pool

    from server.history.store import History
    from shared import models
    from simulations import engine, prepare
    from simulations.scenario import Scenario

    os.environ["MOONFLOWER_HOME"] = str(work / "home")
    scenario = Scenario.model_validate(
        {
            "name": "many",
            "model": {"name": str(tiny.make_model(work / "model")), "trainable": "lora"},
            "task": {"labels": ["negative", "positive"], "max_length": 32},
            "training": {"rounds": rounds, "batch_size": 4, "server_optimizer": "sgd"},
            "privacy": {"epsilon": 8.0, "delta": 1e-5, "max_noise_multiplier": 1000.0},
            "federation": {"min_sites": sites, "keep_checkpoints": 1},
            "evaluation": {"every": rounds, "confidence_bins": 1},
            "data": {"source": "folder", "folder": str(made_up_pool(work / "data", sites * RECORDS))},
            "partition": {"kind": "iid", "sites": sites},
        }
    )
    models.load(scenario.run_config())
    said: dict[str, Any] = {"started": time.time()}
    database = f"sqlite:///{work / 'history.db'}"
    with History.open(database) as history:
        run = prepare.prepare(scenario, history, "cpu")
    said["prepared"] = time.time()
    engine.play(run, database, None, workers=workers)
    said["ended"] = time.time()
    with History.open(database) as history:
        said["rounds"] = [round(done.seconds, 3) for done in history.rounds(run)]
        said["spends"] = len(history.spends(run))
    files = [file for file in (work / "home").rglob("*") if file.is_file()]
    said["disk"], said["files"] = sum(file.stat().st_size for file in files), len(files)
    (work / "said.json").write_text(json.dumps(said), encoding="utf-8")


def measure(sites: int, options: argparse.Namespace) -> dict[str, Any]:
    """Play a size in a fresh process, and watch its memory."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        work = Path(scratch)
        command = [sys.executable, __file__, "--play", scratch, "--sites", str(sites)]
        command += [f"--rounds={options.rounds}", f"--workers={options.workers}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (work / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            samples: list[tuple[float, int]] = []
            while process.poll() is None:
                samples.append((time.time(), memory(process.pid)))
                time.sleep(EVERY)
        if process.returncode:
            raise RuntimeError((work / "log").read_text(errors="replace")[-4000:])
        said: dict[str, Any] = json.loads((work / "said.json").read_text(encoding="utf-8"))
    expected = sites * (options.rounds + 1)
    if said["spends"] != expected:
        raise RuntimeError(f"{said['spends']} answers were charged, and {expected} should have been")
    before = [held for moment, held in samples if moment <= said["started"]]
    said["before"], said["peak"] = before[-1] if before else 0, max(held for _, held in samples)
    said["sites"] = sites
    return said


def memory(pid: int) -> int:
    """Bytes that a process and all that it started hold; pages that several share count once."""
    total = 0
    try:
        root = psutil.Process(pid)
        for member in [root, *root.children(recursive=True)]:
            total += member.memory_full_info().pss
    except psutil.Error:  # one has just ended
        return total
    return total


def table(found: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| sites | peak memory, MB | of it before the run | s to lay out | s a round (median) | ms a site-round | files | MB on disk |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in found:
        middle = sorted(each["rounds"][:-1])[len(each["rounds"][:-1]) // 2]  # not the last, in which all are scored
        lines.append(
            f"| {each['sites']:,} | {each['peak'] / 2**20:,.0f} | {each['before'] / 2**20:,.0f} | {each['prepared'] - each['started']:.1f} "
            f"| {middle:.1f} | {1e3 * middle / each['sites']:.1f} | {each['files']:,} | {each['disk'] / 2**20:,.0f} |"
        )
    return "\n".join(lines)


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Draw peak memory and the time of a round by the number of sites."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
    sites = [each["sites"] for each in found]
    left.plot(sites, [each["peak"] / 2**20 for each in found], marker="o", label="peak")
    left.plot(sites, [each["before"] / 2**20 for each in found], marker="o", label="before the run")
    left.set(xscale="log", xlabel="sites", ylabel="MB", ylim=(0, None))
    left.legend(frameon=False)
    right.plot(sites, [min(each["rounds"]) for each in found], marker="o")
    right.set(xscale="log", yscale="log", xlabel="sites", ylabel="seconds a round")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="a PNG file")
    parser.add_argument("--scratch", type=Path, help="a folder for what is written meanwhile")
    parser.add_argument("--play", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play is not None:
        play(options.play, options.sites[0], options.rounds, options.workers)
        return
    found = []
    for sites in options.sites or [100, 1000, 10_000]:
        found.append(measure(sites, options))
        print(f"{sites} sites: {found[-1]['ended'] - found[-1]['started']:.0f} s", file=sys.stderr)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, workers {options.workers}, {options.rounds} rounds\n")
    print(table(found))
    if options.plot is not None:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
