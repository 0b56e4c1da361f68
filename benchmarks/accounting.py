"""How long epsilon takes, asked after every round of a long run, and a calibration.

    python benchmarks/accounting.py                 1,000 rounds
    python benchmarks/accounting.py --rounds 100

Each run's history grows by a round and epsilon is asked after each: as a site does before every reply.
Beside it, at some rounds: the same figure with nothing kept, and the time in which dp-accounting's own
PLDAccountant composes that one round more and answers, at its default interval of 1e-4.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import groupby

from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from shared import composition
from shared.accounting import PlannedSteps, Release, calibrate, epsilon

DELTA = 1e-5
SAMPLED = (1, 10, 100, 1000)
HISTORIES: dict[str, Callable[[int], Release]] = {
    "one phase": lambda _: Release(0.032, 1.0, 1),
    "one phase, 31 steps a round, epsilon 57": lambda _: Release(0.032, 1.0, 31),
    "three phases": lambda n: (
        Release(0.1, 8.0, 1) if n < 250 else Release(0.032, 2.0, 3) if n < 750 else Release(0.1, 4.0, 1)
    ),
    "another noise every round": lambda n: Release(0.032, 1.0 + n / 1000, 1),
}
PLANS = {
    "training": [(0.032, 1600)],
    "training, low rate": [(0.001, 10_000)],
    "histograms": [(1.0, 60)],
    "three phases": [(0.1, 250), (0.032, 1500), (0.1, 250)],
}


def forget() -> None:
    """Forget every composition, so that the next is made anew."""
    composition._kept.clear()
    for cached in (composition.pld_epsilon, composition._steps, composition._one_step):
        cached.cache_clear()


def milliseconds(work: Callable[[], object]) -> float:
    """Give the time that `work` takes."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def event(release: Release) -> DpEvent:
    """Give a release as dp-accounting names it."""
    return SelfComposedDpEvent(
        PoissonSampledDpEvent(release.sampling_rate, GaussianDpEvent(release.noise_multiplier)), release.steps
    )


def peer(history: list[Release]) -> float:
    """Give the time in which dp-accounting's accountant takes one round more and answers."""
    accountant = PLDAccountant()
    if len(history) > 1:
        for release, equal in groupby(history[:-1]):
            accountant.compose(event(release), len(list(equal)))
        accountant.get_epsilon(DELTA)
    return milliseconds(lambda: accountant.compose(event(history[-1])).get_epsilon(DELTA))


def histories(rounds: int) -> None:
    """Print the times of asking after each round."""
    sampled = [number for number in SAMPLED if number <= rounds]
    print(
        f"| milliseconds of a query, {rounds} rounds | kept: median | last 20 rounds | largest | above 50 ms |", end=""
    )
    print("".join(f" anew, round {number} |" for number in sampled), end="")
    print("".join(f" PLDAccountant, round {number} |" for number in sampled))
    print("| --- |" + " ---: |" * (4 + 2 * len(sampled)))
    for name, make in HISTORIES.items():
        forget()
        history: list[Release] = []
        times = []
        for number in range(rounds):
            history.append(make(number))
            times.append(milliseconds(lambda history=history: epsilon(history, DELTA)))
        anew = []
        for number in sampled:
            forget()
            anew.append(milliseconds(lambda number=number, history=history: epsilon(history[:number], DELTA)))
        # Of many different rounds the peer would take many minutes to come to the last.
        theirs = [f"{peer(history[:n]):.0f}" if n <= 100 or len(set(history[:n])) < 4 else "-" for n in sampled]
        kept = [statistics.median(times), statistics.median(times[-20:]), max(times)]
        slow = f"{sum(took > 50 for took in times)} of {rounds}"
        cells = [*(f"{took:.1f}" for took in kept), slow, *(f"{took:.1f}" for took in anew), *theirs]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def calibrations() -> None:
    """Print the times of finding the noise, and how much more of it the discrete Gaussian needs."""
    print("\n| calibration | epsilon | Gaussian: noise | ms | discrete: noise | ms | discrete over Gaussian |")
    print("| --- |" + " ---: |" * 6)
    for name, plan in PLANS.items():
        for target in (1.0, 3.0, 8.0):
            cells, noises = [], []
            for mechanism in ("gaussian", "discrete-gaussian"):
                steps = [PlannedSteps(rate, count, 1.0, mechanism) for rate, count in plan]
                forget()
                start = time.perf_counter()
                noises.append(calibrate(steps, target, DELTA))
                cells += [f"{noises[-1]:.4g}", f"{(time.perf_counter() - start) * 1e3:.0f}"]
            print(f"| {name} | {target:g} | " + " | ".join(cells) + f" | {noises[1] / noises[0]:.3f} |", flush=True)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    options = parser.parse_args()
    machine = f"{os.cpu_count()} CPUs, {platform.system()}, Python {platform.python_version()}"
    code = "import time; t = time.perf_counter(); import dp_accounting.pld; print(time.perf_counter() - t)"
    runs = [float(subprocess.check_output([sys.executable, "-c", code], text=True)) for _ in range(3)]
    print(f"{machine}. Importing dp_accounting.pld: {statistics.median(runs):.2f} s.\n")
    epsilon([Release(0.5, 1.0, 2)], DELTA)  # the import is not timed below
    histories(options.rounds)
    calibrations()


if __name__ == "__main__":
    main()
