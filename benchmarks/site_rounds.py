"""Site-rounds a minute: a small CNN on 28 x 28 images, 1,000 sites, cohorts of 50; ours beside pfl-research and Flower.

    python benchmarks/site_rounds.py                              all three, 3 turns, as many processes as cores
    python benchmarks/site_rounds.py --pfl /path/to/bin/python    an environment that has pfl; else one is made
    python benchmarks/site_rounds.py --turns 1 --rounds 4 --side ours --side pfl --workers 1

The set-up is that of pfl-research's own image benchmark (benchmarks/image_classification, configs/baseline.yaml and
femnist.yaml): `simple_cnn` with 1.2 million parameters, 50 records a site, one local epoch of batches of 10, plain SGD at 0.1, the
mean of 50 sites a round. All sides begin with the same weights, hold the same records in the same partition, run the same
module (`peers/cnn.py`), the peers in float32 and ours in the precision that `auto` chooses, and evaluate nothing. pfl runs under torchrun where there are several processes, Flower on its Ray
simulation engine with a core a client.

Ours does what a deployment does besides: policy, plan, request digests, a ledger that is charged before each answer, checkpoints
and history. `ours` is without privacy (epsilon inf, no clipping), like the peers, but that a step's batch is drawn by Poisson
sampling of 10 expected records; the ratios are of this one. `ours, epsilon 8` clips and noises each of the 1.2 million values in
every local step.

Each turn runs every side in fresh processes, one after the other. A round's time is from the end of the one before to its own, so
that a turn's first round, with its start-up, is left out. Site-rounds a minute are 60 x cohort / median seconds a round.
"""

import argparse
import io
import itertools
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SIDES = ("ours", "pfl", "flower", "ours, epsilon 8")
PFL = "pfl[pytorch]==0.6.*"
TORCH = "torch>=2.9,<2.14"
RECORDS = 50  # a site
GOALS = {"pfl": 1.5, "flower": 10.0}

if sys.argv[0].endswith(Path(__file__).name):  # our side, and each of its workers, which import this file anew
    sys.path[:0] = [str(HERE), str(HERE / "peers"), str(HERE.parent)]
    import small_cnn


def prepare(work: Path, sites: int) -> None:
    """Write what all sides read, and what ours reads it as: a model's folder, and a pool with a column for the site."""
    import images_data
    import numpy as np
    import PIL.Image
    import pyarrow as pa
    from pyarrow import parquet

    def png(image: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> bytes:
        buffer = io.BytesIO()
        PIL.Image.fromarray(image).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    images_data.make(work, sites, RECORDS)
    small_cnn.make_model(work / "model", work / "initial.pt")
    images, labels = np.load(work / "images.npy"), np.load(work / "labels.npy")
    (work / "data").mkdir()
    rows = range(len(labels))
    table = {
        "id": [f"record-{row}" for row in rows],
        "image": [png(images[row]) for row in rows],
        "label": [str(label) for label in labels],
        "site": [f"s{row // RECORDS:05d}" for row in rows],
    }
    parquet.write_table(pa.table(table), work / "data" / "pool.parquet")


# -- our side ------------------------------------------------------------------------------------------------


def ours(work: Path, rounds: int, cohort: int, epsilon: float, workers: int, profile: Path | None) -> None:
    """Play a run in this process and its workers, and note when each round ended."""
    import cnn
    import rounds_clock

    from simulations.scenario import Scenario

    os.environ["MOONFLOWER_HOME"] = str(work / "home")
    scenario = Scenario.model_validate(
        {
            "name": "cnn",
            "model": {"name": str(work / "model"), "trainable": "full"},
            "task": {"name": "image-classification", "labels": [str(label) for label in range(cnn.LABELS)]},
            "training": {
                "rounds": rounds + 1,  # the last round is evaluated, and never played
                "batch_size": cnn.BATCH,
                "local_steps": RECORDS // cnn.BATCH,
                "learning_rate": cnn.RATE,
                "clipping_norm": 1.0,
                "server_optimizer": "sgd",
                "server_learning_rate": 1.0,
                "server_momentum": 0.0,
            },
            "privacy": {
                "epsilon": epsilon,
                "delta": 1e-5,
                "max_noise_multiplier": 1000.0,
                "clipping": "flat" if epsilon < float("inf") else "none",
            },
            "federation": {"min_sites": cohort, "sites_per_round": cohort, "keep_checkpoints": 1},
            "evaluation": {"every": rounds + 1},
            "data": {"source": "folder", "folder": str(work / "data"), "validation": 0.01},
            "partition": {"kind": "by-column", "column": "site"},
        }
    )
    given = (scenario, work, work / "ours.times", rounds, workers)
    if profile is None:
        rounds_clock.play(*given)
    else:
        import cProfile

        profiler = cProfile.Profile()
        profiler.runcall(rounds_clock.play, *given)
        profiler.dump_stats(profile)


# -- the peers -----------------------------------------------------------------------------------------------


def pfl_python(given: str | None, folder: Path) -> str:
    """Return an interpreter that has pfl; without one given, an environment is made.

    Raises
    ------
    RuntimeError
        With what pip said.
    """
    if given is not None:
        return given
    folder.mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    done = subprocess.run(
        [str(folder / "bin" / "pip"), "install", "--quiet", PFL, TORCH], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"pip install {PFL!r} failed: {done.stderr.strip().splitlines()[-1]}")
    return str(folder / "bin" / "python")


def play_pfl(python: str, work: Path, rounds: int, cohort: int, workers: int) -> None:
    """Run pfl's side to its end."""
    script = [str(HERE / "peers" / "pfl_images.py"), str(work), str(rounds), str(cohort)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"] if workers > 1 else []
    _run([python, *launcher, *script], work / "pfl.log")


def play_flower(work: Path, rounds: int, cohort: int, sites: int) -> None:
    """Run Flower's side to its end."""
    import flower_engine

    settings: dict[str, str | int] = {"rounds": rounds, "cohort": cohort, "sites": sites, "work": str(work)}
    folder = Path(tempfile.mkdtemp(dir=work, prefix="flower-")) / "engine"
    flower_engine.play(HERE / "peers" / "flower_images", folder, settings, work / "flower.times", rounds, sites=sites)


def play_ours(work: Path, options: argparse.Namespace, epsilon: str) -> None:
    """Run our side in a fresh process."""
    asked = [f"--{name}={getattr(options, name)}" for name in ("rounds", "cohort", "workers")]
    _run([sys.executable, __file__, "--play", str(work), f"--epsilon={epsilon}", *asked], work / "ours.log")
    shutil.rmtree(work / "home")


def _run(command: list[str], log: Path) -> None:
    with log.open("wb") as stream:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, stdout=stream, stderr=stream, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(log.read_text(errors="replace")[-4000:])


def turn(side: str, work: Path, options: argparse.Namespace, python: str) -> list[float]:
    """Play one side, and return the seconds of each round but the first."""
    times = work / f"{side.partition(',')[0]}.times"
    times.unlink(missing_ok=True)
    match side:
        case "pfl":
            play_pfl(python, work, options.rounds, options.cohort, options.workers)
        case "flower":
            play_flower(work, options.rounds, options.cohort, options.sites)
        case _:
            play_ours(work, options, "8" if "8" in side else "inf")
    ends = [float(line) for line in times.read_text().split()]
    return [after - before for before, after in itertools.pairwise(ends)]


# -- the table -----------------------------------------------------------------------------------------------


def table(found: dict[str, list[float]], ratios: dict[str, list[float]], cohort: int) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| | seconds a round (quartiles) | site-rounds a minute | ours is x times as fast | goal |",
        "| --- | --- | --- | --- | --- |",
    ]
    for side, seconds in found.items():
        low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        ratio = f"{statistics.median(ratios[side]):.2f}" if side in ratios else ""
        goal = f"{GOALS[side]:g}" if side in GOALS else ""
        lines.append(
            f"| {side} | {middle:.2f} ({low:.2f} to {high:.2f}) | {60 * cohort / middle:,.0f} | {ratio} | {goal} |"
        )
    return "\n".join(lines)


def plot(found: dict[str, list[float]], cohort: int, path: Path) -> None:
    """Draw site-rounds a minute, a bar a side."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 2.4), layout="constrained")
    names = list(found)[::-1]
    rates = [60 * cohort / statistics.median(found[name]) for name in names]
    bars = axes.barh(names, rates, color=["#4c72b0" if "ours" in name else "#b0b0b0" for name in names])
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.set_xlabel("site-rounds a minute")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xmargin(0.12)
    figure.savefig(path, dpi=110)


def measure(options: argparse.Namespace) -> None:
    """Take turns, and print a table."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        work = Path(scratch)
        prepare(work, options.sites)
        sides, python = list(options.side or SIDES), ""
        if "pfl" in sides:
            try:
                python = pfl_python(options.pfl, work / "pfl-environment")
            except RuntimeError as error:
                print(f"pfl is not measured: {error}")
                sides.remove("pfl")
        found: dict[str, list[float]] = {side: [] for side in sides}
        ratios: dict[str, list[float]] = {side: [] for side in GOALS if side in sides and "ours" in sides}
        for number in range(options.turns):
            order = sides if number % 2 == 0 else sides[::-1]
            taken = {side: turn(side, work, options, python) for side in order}
            medians = {side: statistics.median(seconds) for side, seconds in taken.items()}
            for side, seconds in taken.items():
                found[side] += seconds
            for side, each in ratios.items():
                each.append(medians[side] / medians["ours"])
            print(
                f"turn {number + 1}: {', '.join(f'{side} {seconds:.2f} s' for side, seconds in medians.items())}",
                file=sys.stderr,
            )
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, {options.workers} processes of 1 thread; {options.sites} sites, cohort "
        f"{options.cohort}, {options.turns} turns of {options.rounds} rounds\n"
    )
    print(table(found, ratios, options.cohort))
    if options.plot is not None:
        plot(found, options.cohort, options.plot)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--cohort", type=int, default=50)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of ours, and of pfl")
    parser.add_argument("--side", action="append", choices=SIDES)
    parser.add_argument("--pfl", help="an interpreter that has pfl 0.6 and torch")
    parser.add_argument("--plot", type=Path, help="a PNG file")
    parser.add_argument("--scratch", type=Path, help="a folder for what is written meanwhile")
    parser.add_argument("--profile", type=Path, help="with --play: write a cProfile of our side's main process")
    parser.add_argument("--play", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--epsilon", type=float, default=float("inf"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play is None:
        measure(options)
    else:
        ours(options.play, options.rounds, options.cohort, options.epsilon, options.workers, options.profile)


if __name__ == "__main__":
    main()
