"""A run's model, tried on made-up records: loaded, probed in every phase, and one step of the widest batch.

A process of its own (`main`), which prints a JSON line a step: name, whether it is right, and what it is or what
to do. Nothing of the site's data is read.
"""

import json
import platform
import resource as usage
import shutil
import subprocess
import sys
from collections.abc import Iterator

import psutil
import torch

from client import made_up
from client.node.check import STEPS
from client.privacy import probe
from client.privacy.engine import ClippedSum, Clipping, Gradients, train_only
from client.resident import Resident
from client.training import EncoderPass, HeadPass
from shared import models
from shared.errors import ModelError, MoonflowerError
from shared.run_config import RunConfig

Line = tuple[str, bool, str]


def main() -> None:
    """Try the configuration and device of the command line; exit code 1 where a step is wrong."""
    config = RunConfig.model_validate_json(sys.argv[1])
    for line in attempt(config, sys.argv[2]):
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        if not line[1]:
            sys.exit(1)


def attempt(config: RunConfig, device: str) -> Iterator[Line]:
    """Yield a line a step; the first that is wrong is the last."""
    step = iter(STEPS)
    name = next(step)
    try:
        chosen = models.pick_device(device)
        yield name, True, _device(chosen)
        name = next(step)
        resident = Resident()
        model = resident.model(config, device)
        sizes = f"{sum(value.numel() for value in model.module.parameters()):,} parameters"
        yield (
            name,
            True,
            f"{config.model.name}: {sizes}, {sum(value.size for value in model.arrays().values()):,} of them travel",
        )
        name = next(step)
        yield name, True, _probe(resident, config, device)
        name = next(step)
        yield name, True, _memory(resident, config, device)
    except MoonflowerError as error:
        yield name, False, str(error)
    except torch.OutOfMemoryError:
        text = "the device has not the memory for one step; lower hardware.micro_batch or task.max_length"
        yield name, False, f"{text}, or set hardware.checkpointing."


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        drivers = shutil.which("nvidia-smi")
        unseen = (
            "; there is an NVIDIA driver, but this torch has no CUDA"
            if drivers and not torch.cuda.is_available()
            else ""
        )
        return f"{device}: {platform.machine()}, {torch.get_num_threads()} threads{unseen}"
    properties = torch.cuda.get_device_properties(device)
    return f"{device}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, driver {_driver()}"


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown (no nvidia-smi)"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - found above
    return (done.stdout.splitlines() or ["unknown"])[0]


def _probe(resident: Resident, config: RunConfig, device: str) -> str:
    """Probe each phase's engine in full, as a round does.

    Raises
    ------
    SensitivityError
        Where no method agrees with the loop.
    """
    model = resident.model(config, device)
    found = []
    for phase in config.phases:
        trained = model.names(phase)
        parameters = train_only(model.module, trained)
        objective: EncoderPass | HeadPass
        if model.cached(trained):
            together, alone = made_up.features(model)
            probe.check_features(together, alone)
            examples = made_up.examples(model, made_up.LENGTHS[: len(together)])
            objective = HeadPass(model, together, examples, config.privacy.records_per_unit)
        else:
            objective = EncoderPass(model, made_up.examples(model), config)
        with Gradients(objective.module, parameters, config.hardware.gradients) as gradients:
            whole = config.privacy.noise == "discrete"
            probe.check(objective.module, gradients, *objective.made_up(), whole=whole)
            found.append(f"{phase} by {gradients.method}")
    return f"a {config.privacy.unit} contributes at most the clipping norm: {', '.join(found)}"


def _memory(resident: Resident, config: RunConfig, device: str) -> str:
    """Take one step of a full micro-batch of the longest texts, and say what it took.

    Raises
    ------
    ModelError
        Where that is more than is free.
    """
    model = resident.model(config, device)
    phase = "training" if "training" in config.phases else next(iter(config.phases))
    rows, width = max(config.hardware.micro_batch, config.privacy.records_per_unit), made_up.longest(model)
    parameters = train_only(model.module, model.names(phase))
    objective = EncoderPass(model, made_up.examples(model, [width] * rows), config)
    cuda = next(iter(parameters.values())).device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with Gradients(objective.module, parameters, config.hardware.gradients) as gradients:
        total = ClippedSum(gradients, Clipping(config.phases[phase].clipping_norm))
        for batch in objective.groups(
            [(row,) for row in range(rows)], whole=config.privacy.noise == "discrete" or gradients.method == "hooks"
        ):
            total.add(batch)
    if cuda:
        peak, have = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    else:
        peak = usage.getrusage(usage.RUSAGE_SELF).ru_maxrss * 1024
        have = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    records = f"{rows} records of {width} tokens" if width else f"{rows} records"
    said = f"{records} take {peak / 2**30:.1f} GiB of {have / 2**30:.1f}"
    if peak > 0.9 * have:
        raise ModelError(f"one step of {said}: too near; lower hardware.micro_batch or task.max_length.")
    return f"one step of {said}"
