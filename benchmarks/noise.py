"""What sampling and noise cost: each kind of noise on sums of 300,000 and 22 million values.

    python benchmarks/noise.py               one process a measure, so that its peak memory is its own

Beside them, for comparison only: torch's own float32 normals, which end at 5.77 deviations and come from a
generator of a 32-bit seed on a CPU. Times are the least of some repetitions; memory is the most that the
process grew by, over the sum itself.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable

import torch

from client.privacy.engine import Clipping
from client.privacy.noise import Continuous, Discrete, Grid, OnDevice
from client.privacy.randomness import Keystream

SIZES = (300_000, 22_000_000)
RECORDS = 8  # whose gradients are summed, side by side
NORM, SHARE, NOISE = 0.05, 0.01, 1.0
Work = Callable[[], object]


def noise_of(kind: str, size: int) -> Work:
    """Give what noises a sum of `size` values."""
    stream = Keystream.from_system()
    if kind == "discrete":
        whole, grid = torch.zeros(size, dtype=torch.int64), Grid.of(NORM, size, SHARE)
        return lambda: Discrete(grid, stream).noised(whole, NOISE)
    total = torch.zeros(size)
    if kind == "torch, float32":
        return lambda: total + NOISE * NORM * torch.randn(size)
    if kind == "device":
        device = torch.device("cuda")
        there, own = total.to(device), OnDevice(NORM, device)

        def on_device() -> None:
            own.noised(there, NOISE)
            torch.cuda.synchronize()

        return on_device
    return lambda: Continuous(NORM, stream).noised(total, NOISE)


def sum_of(kind: str, size: int) -> Work:
    """Give what clips and sums the gradients of some records."""
    samples = torch.randn(RECORDS, size)
    factors = Clipping(NORM).factors(samples.norm(dim=1))
    if kind == "discrete":
        grid = Grid.of(NORM, size, SHARE)
        return lambda: grid.rounded_sum(samples, factors)
    return lambda: torch.tensordot(factors, samples, dims=1)


def sampling_of(_: str, records: int) -> Work:
    """Give what draws a Poisson sample of `records` records."""
    stream = Keystream.from_system()
    return lambda: stream.poisson_sample(records, 0.01)


def measured(make: Callable[[str, int], Work], kind: str, size: int) -> tuple[float, float]:
    """Give the seconds of a piece of work, and the megabytes by which the process grew."""
    torch.set_num_threads(1)
    work = make(kind, size)
    make(kind, 1000)()  # what is loaded and kept at the first time
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(3 if size > 10**6 else 10):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def alone(make: Callable[[str, int], Work], kind: str, size: int) -> tuple[float, float]:
    """Measure in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, (make, kind, size))


def main() -> None:
    """Measure and print one table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    kinds = ["gaussian", "discrete", "torch, float32"] + (["device"] if torch.cuda.is_available() else [])
    print(f"{os.cpu_count()} CPUs, one used, {platform.system()}, Python {platform.python_version()}.\n")
    print("| measure | values | ns a value | seconds | MB |\n| --- | ---: | ---: | ---: | ---: |")

    def row(name: str, make: Callable[[str, int], Work], kind: str, size: int, values: int) -> None:
        took, grown = alone(make, kind, size)
        print(f"| {name} | {values:,} | {took / values * 1e9:.1f} | {took:.4f} | {grown:.0f} |", flush=True)

    for records in (10_000, 1_000_000):
        row("sampling: draw each record or not", sampling_of, "", records, records)
    for size in SIZES:
        for kind in kinds:
            row(f"noise on a sum: {kind}", noise_of, kind, size, size)
    for size in SIZES:
        for kind in ("gaussian", "discrete"):
            row(f"clipped sum of {RECORDS} records: {kind}", sum_of, kind, size, RECORDS * size)


if __name__ == "__main__":
    main()
