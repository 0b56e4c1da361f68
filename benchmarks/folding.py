"""Folding updates of 22 million parameters into their mean: ours against Flower's FedAvg, as messages arrive.

    python benchmarks/folding.py                              10, 30 and 100 updates
    python benchmarks/folding.py --updates 10 100 1000 --plot folding.png

Each measure is a process of its own, ours and Flower's in turn. Ours is given a reply, folds it in and lets it go, as the
coordinator does; Flower's `FedAvg.aggregate_train` is given all replies of a round at once, as its own loop does, so that it is
measured up to what fits into the memory that is free. Messages are made outside of the time that is taken; the memory is
what the process grew by, messages included. The arrays have the shapes of MiniLM (101 of them).
"""

import argparse
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.serverapp.strategy import FedAvg

from server.aggregation import Fold, kernel
from shared.arrays import Arrays
from shared.ledger_chain import NO_HEAD
from shared.messages import TrainReply, from_record, to_record

SPREAD = 0.01  # deviation of an update's values
KINDS = 3  # of updates that differ; each message has bytes of its own
LAYER = [(384, 384), (384,)] * 4 + [(384,), (384,), (1536, 384), (1536,), (384, 1536), (384,), (384,), (384,)]
SHAPES = [(30522, 384), (512, 384), (2, 384), (384,), (384,), *LAYER * 6]
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)
MEGABYTE = 2**20
Measured = tuple[float, float, float]  # seconds, seconds of processors, megabytes


def updates() -> list[Arrays]:
    """Make a few updates."""
    random = np.random.default_rng(0)
    return [
        {f"layer.{n}": SPREAD * random.standard_normal(shape, dtype=np.float32) for n, shape in enumerate(SHAPES)}
        for _ in range(KINDS)
    ]


def message(content: RecordDict, number: int) -> Message:
    """Make a site's reply."""
    empty = {"message_id": str(number), "group_id": "1", "reply_to_message_id": str(number), "message_type": "train"}
    return make_message(
        metadata=Metadata(run_id=1, src_node_id=number, dst_node_id=1, created_at=time.time(), ttl=3600.0, **empty),
        content=content,
    )


def ours(update: Arrays, number: int) -> Message:
    """Make a reply as our sites send it."""
    reply = TrainReply(
        site="site", round=1, update=update, sampling_rate=0.1, noise_multiplier=1.0, steps=1, epsilon=1.0,
        mechanism="gaussian", noise_source="aes-256-ctr", gradients="one-pass", ledger_id="0" * 32, ledger_number=1,
        ledger_head=NO_HEAD,
    )  # fmt: skip
    return message(to_record(reply), number)


def theirs(update: Arrays, number: int) -> Message:
    """Make a reply as Flower's sites send it."""
    arrays = ArrayRecord({name: Array(array) for name, array in update.items()})
    return message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), number)


def fold(kinds: list[Arrays], count: int) -> tuple[float, float]:
    """Fold replies one by one; give the seconds, and the processors' seconds."""
    wall, busy = 0.0, 0.0

    def timed(work: Callable[[], Any]) -> Any:
        nonlocal wall, busy
        start, cpu = time.perf_counter(), time.process_time()
        done = work()
        wall, busy = wall + time.perf_counter() - start, busy + time.process_time() - cpu
        return done

    made: Fold = timed(lambda: Fold(kinds[0], SPREAD))
    for number in range(count):
        reply = ours(kinds[number % KINDS], number)
        timed(lambda reply=reply: made.add(from_record(reply.content, TrainReply).update))
    timed(made.mean)
    return wall, busy


def average(kinds: list[Arrays], count: int) -> tuple[float, float]:
    """Average replies at once, as Flower does."""
    replies = [theirs(kinds[number % KINDS], number) for number in range(count)]
    strategy = FedAvg()
    start, cpu = time.perf_counter(), time.process_time()
    strategy.aggregate_train(1, replies)
    return time.perf_counter() - start, time.process_time() - cpu


def measured(work: Callable[[list[Arrays], int], tuple[float, float]], count: int) -> Measured:
    """Measure in this process."""
    kinds = updates()
    kernel.compiled()  # a process does it once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, busy = work(kinds, count)
    return wall, busy, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def alone(work: Callable[[list[Arrays], int], tuple[float, float]], count: int) -> Measured:
    """Measure in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, (work, count))


def medians(of: list[Measured]) -> Measured:
    """Give the median of each measure."""
    wall, busy, grown = (statistics.median(each) for each in zip(*of, strict=True))
    return wall, busy, grown


def rows(counts: list[int], repetitions: int) -> Iterator[tuple[int, Measured, Measured | None]]:
    """Measure both in turn, for growing numbers of updates."""
    for count in counts:
        fits = 1.15 * 4 * SIZE * (count + KINDS + 3) < psutil.virtual_memory().available
        own: list[Measured] = []
        peer: list[Measured] = []
        for _ in range(repetitions):
            own.append(alone(fold, count))
            if fits:
                peer.append(alone(average, count))
        yield count, medians(own), medians(peer) if peer else None


def plot(found: list[tuple[int, Measured, Measured | None]], file: Path) -> None:
    """Draw time and memory over the number of updates."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for at, place, name in ((0, 0, "seconds"), (1, 2, "MB that the process grew by")):
        axis = axes[at]
        axis.plot([row[0] for row in found], [row[1][place] for row in found], "o-", label="Moonflower")
        peer = [(count, other[place]) for count, _, other in found if other is not None]
        axis.plot(*zip(*peer, strict=True), "s--", label="Flower FedAvg") if peer else None
        axis.set(xscale="log", yscale="log", xlabel="updates of a round", ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    how = "numpy alone" if kernel.compiled() is None else "numba"
    print(
        f"{cores} processors, {platform.system()}, Python {platform.python_version()}, numpy {np.__version__}; ours with {how}."
    )
    print(f"{SIZE:,} parameters in {len(SHAPES)} arrays; medians of {given.repetitions}; ms of an update.\n")
    print(
        "| updates | ours ms | Flower ms | ratio | ours, processors' ms | Flower, processors' ms | ours MB | Flower MB |"
    )
    print("| ---: " * 8 + "|")
    found = []
    for count, own, peer in rows(given.updates, given.repetitions):
        found.append((count, own, peer))
        mine = [f"{1000 * own[0] / count:.1f}", f"{1000 * own[1] / count:.1f}", f"{own[2]:.0f}"]
        held = f"does not fit: {4 * SIZE * count / 1e9:.0f} GB"
        other = (
            ["", "", held]
            if peer is None
            else [f"{1000 * peer[0] / count:.1f}", f"{1000 * peer[1] / count:.1f}", f"{peer[2]:.0f}"]
        )
        ratio = "" if peer is None else f"{peer[0] / own[0]:.2f}"
        print(
            f"| {count} | {mine[0]} | {other[0]} | {ratio} | {mine[1]} | {other[1]} | {mine[2]} | {other[2]} |",
            flush=True,
        )
    if given.plot is not None:
        plot(found, given.plot)


if __name__ == "__main__":
    main()
