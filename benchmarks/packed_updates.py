"""What packing an update takes, and what it costs in accuracy: bytes, time, error, and private runs with each encoding.

    python benchmarks/packed_updates.py              sizes and times, and a head on frozen features, five seeds
    python benchmarks/packed_updates.py --lora       low-rank adapters, too: minutes on two cores
    python benchmarks/packed_updates.py --sizes      sizes and times alone
    python benchmarks/packed_updates.py --plot FILE  accuracy against bytes, as an image

Sizes are those of MiniLM: the head alone, the built-in scenario's low-rank adapters, and the whole model. An update is made
of normal numbers, as noise is. The encodings take turns; the peer is the raw float32 update, written and read as it is, which
is all that stock Flower offers beside its own serialisation: it has no such encodings built in.

A run is a real one (VADER's four domains, a site each; epsilon 8), and all are paired by seed: the difference to `none` is given
with a t interval of 95 %. Noise comes from the operating system and is another in each run.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import accuracy
import corpora
import numpy as np
import numpy.typing as npt
from accuracy import Asked, Encoded, said
from corpora import Federation

import client.resident
import server.evaluation
from client.privacy.randomness import Keystream
from shared import compression, models
from shared.arrays import Arrays, nbytes
from shared.run_config import Compression, RunConfig
from simulations import scenario

ENCODINGS = {
    "none": Compression(),
    "float16": Compression(update="float16"),
    "int8": Compression(update="int8"),
    "top-k 0.25": Compression(update="top-k", keep=0.25),
    "top-k 0.1": Compression(update="top-k", keep=0.1),
    "top-k 0.01": Compression(update="top-k", keep=0.01),
}
SEEDS = (201, 202, 203, 204, 205)
TURNS = 7
LORA = {"rank": 4, "alpha": 4, "targets": ["value", "intermediate.dense"], "layers": [0, 1, 2], "init": "svd"}


def shapes() -> dict[str, Arrays]:
    """Give normal numbers in the shapes of what is trained."""
    config = scenario.load("vader", {})
    values = {name: getattr(config, name) for name in RunConfig.model_fields}
    model = models.load(RunConfig(**values))
    trained = model.arrays()
    draw = np.random.default_rng(0)

    def made(arrays: Arrays) -> Arrays:
        return {name: draw.normal(size=array.shape).astype(np.float32) for name, array in arrays.items()}

    whole = {name: array.detach().numpy() for name, array in model.module.named_parameters() if "lora" not in name}
    return {
        "head": made({name: trained[name] for name in model.names("warm_start")}),
        "adapters and head": made({name: trained[name] for name in model.names("training")}),
        "whole model": made(whole),
    }


def raw(update: Arrays) -> npt.NDArray[np.uint8]:
    """Write an update's values down as they are: the peer."""
    return np.concatenate([array.ravel() for array in update.values()]).view(np.uint8)


def read_raw(written: npt.NDArray[np.uint8], like: Arrays) -> Arrays:
    """Read them."""
    parts = np.split(written.view(np.float32).copy(), np.cumsum([array.size for array in like.values()])[:-1])
    return {name: part.reshape(like[name].shape) for name, part in zip(like, parts, strict=True)}


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long work takes, and what it gives."""
    start = time.perf_counter()
    done = work()
    return time.perf_counter() - start, done


def sizes(updates: dict[str, Arrays]) -> None:
    """Print bytes, times and errors of each size and encoding."""
    print("| what is trained | encoding | bytes | float32 over it | pack, ms | unpack, ms | error, of the update |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, update in updates.items():
        residual = {key: np.zeros_like(array) for key, array in update.items()}
        took: dict[str, list[tuple[float, float]]] = {}
        held: dict[str, tuple[int, float]] = {}
        for _ in range(TURNS):
            up, written = seconds(partial(raw, update))
            down, _ = seconds(partial(read_raw, written, update))
            took.setdefault("raw float32 (peer)", []).append((up, down))
            held["raw float32 (peer)"] = written.nbytes, 0.0
            for encoding, chosen in list(ENCODINGS.items())[1:]:
                words = Keystream.from_system().words
                left = residual if chosen.update == "top-k" else {}
                up, (packed, _) = seconds(partial(compression.compress, update, left, chosen, words))
                down, back = seconds(partial(compression.decompress, packed, update, chosen))
                took.setdefault(encoding, []).append((up, down))
                held[encoding] = packed.nbytes, error(back, update)
        for encoding, times in took.items():
            up, down = (1000 * statistics.median(each) for each in zip(*times, strict=True))
            size, off = held[encoding]
            cells = (
                name,
                encoding,
                f"{size:,}",
                f"{nbytes(update) / size:.2f}",
                f"{up:.2f}",
                f"{down:.2f}",
                f"{off:.2g}",
            )
            print("| " + " | ".join(cells) + " |", flush=True)


def error(back: Arrays, update: Arrays) -> float:
    """Give the root mean square of what packing changed, over that of the update."""
    apart = sum(float(((back[name] - array) ** 2).sum()) for name, array in update.items())
    return (apart / sum(float((array**2).sum()) for array in update.values())) ** 0.5


def settings(kind: str, encoding: str, seed: int, sites: int, rounds: int | None) -> dict[str, Any]:
    """Give a run's configuration: the head on frozen features, or adapters after such a head."""
    chosen = accuracy.settings("text-classification", 8.0, seed, sites, Asked(None, {}))
    chosen["compression"] = ENCODINGS[encoding].model_dump()
    chosen["privacy"]["delta"] = 1e-5
    if kind == "adapters and head":
        chosen["warm_start"] = chosen["training"] | {"rounds": 5, "noise_ratio": 12}
        chosen["training"] = {"rounds": 12, "sampling_rate": 0.14, "clipping_norm": 1.5, "server_learning_rate": 1.6e-2}
        chosen["training"] |= {"server_schedule": "decay", "server_average": 0.7}
        chosen["model"] |= {"trainable": "lora", "lora": LORA}
        chosen["hardware"] = {"micro_batch": 128}
    if rounds is not None:
        chosen["training"] |= {"rounds": rounds}
    chosen["evaluation"] = {"every": 100, "quick_records": 100}
    return chosen


def runs(where: Federation, kind: str, seeds: Sequence[int], rounds: int | None) -> dict[str, list[float]]:
    """Play each seed with each encoding, in turns; return the accuracies."""
    found: dict[str, list[float]] = {encoding: [] for encoding in ENCODINGS}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            for encoding, scores in found.items():
                chosen = settings(kind, encoding, seed, where.sites, rounds)
                scores.append(accuracy.played(where.split(seed), where.scored, chosen, Path(scratch, "run")))
                print(f"{kind}, {encoding}, seed {seed}: {scores[-1]:.4f}", file=sys.stderr, flush=True)
    return found


def table(kind: str, found: dict[str, list[float]], update: Arrays) -> None:
    """Print the accuracies with each encoding, and what an update takes."""
    for encoding, scores in found.items():
        size = compression.size(update, ENCODINGS[encoding])
        against = "" if encoding == "none" or len(scores) < 2 else said(np.subtract(scores, found["none"]))
        print(f"| {kind} | {encoding} | {size:,} | {100 * np.mean(scores):.2f} | {against} |", flush=True)


def plot(every: dict[str, dict[str, list[float]]], updates: dict[str, Arrays], file: Path) -> None:
    """Draw accuracy against an update's bytes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for kind, found in every.items():
        places = [compression.size(updates[kind], ENCODINGS[encoding]) for encoding in found]
        means = [100 * float(np.mean(scores)) for scores in found.values()]
        spread = [100 * float(np.std(scores)) for scores in found.values()]
        axes.errorbar(places, means, spread, fmt="o", capsize=3, label=kind)
        for encoding, place, mean in zip(found, places, means, strict=True):
            axes.annotate(encoding, (place, mean), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="bytes of an update", ylabel="accuracy, %", title="Private runs, epsilon 8")
    axes.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", action="store_true", help="Play no run.")
    parser.add_argument("--lora", action="store_true", help="Play runs of low-rank adapters, too.")
    parser.add_argument("--most", type=int, default=1000, help="Records of each site, at most.")
    parser.add_argument("--rounds", type=int, help="Of the training; by default 10 of a head, 12 of adapters.")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    updates = shapes()
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, {TURNS} turns, medians.\n")
    sizes(updates)
    if asked.sizes:
        return
    encoded = Encoded(None)
    client.resident.features = server.evaluation.features = encoded.features
    where = next(each for each in corpora.federations(None, test=True, most=asked.most) if each.data == "VADER")
    print(f"\nVADER, {where.sites} sites of at most {asked.most} records, epsilon 8, seeds {asked.seeds}.\n")
    print(
        "| what is trained | encoding | bytes of an update | accuracy, % | - none |\n| --- | --- | ---: | ---: | --- |"
    )
    every: dict[str, dict[str, list[float]]] = {}
    for kind in ("head", "adapters and head") if asked.lora else ("head",):
        every[kind] = runs(where, kind, asked.seeds, asked.rounds)
        table(kind, every[kind], updates[kind])
    if asked.plot:
        plot(every, updates, asked.plot)


if __name__ == "__main__":
    main()
