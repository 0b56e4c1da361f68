"""One cell of the sensitivity matrix: attach the engine, probe it, and compare its sums with a loop of our own.

The loop is not the probe's: one record at a time, unpadded, plain autograd in double, on a copy of the module that the
engine never sees. The probe runs as in training (its lengths and batches are those of client/made_up.py), on records of
its own.
"""

import copy
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from architecture_tasks import BATCHES, LENGTHS, Architecture, Batch, Record, collate
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from client import made_up
from client.privacy import probe
from client.privacy.engine import ClippedSum, Clipping, Gradients, Objective, train_only
from shared.errors import ModelError, SensitivityError
from shared.run_config import Gradients as Mode

PARTS = ("full", "lora", "bias", "head")
TOLERANCE = 1e-4  # of the sum, and of a record's share over the clipping norm
FLOOR = 1e-2  # of the whole: a parameter with less is compared on this scale
SLACK = 1e-3  # the engine says that it clips to norm / (1 + SLACK)

Outcome = Literal["right", "refused", "wrong", "error", "none"]
Summed = Callable[[Clipping, Sequence[Batch]], tuple[Tensor, dict[str, Tensor]]]  # -> contributions (N,), the sum


@dataclass(frozen=True)
class Cell:
    """What came of one combination."""

    architecture: str
    part: str
    mode: str
    outcome: Outcome
    where: str = ""  # attach, probe or first step
    reason: str = ""
    gap: float = 0.0  # the sum beside the loop's, relative
    share: float = 0.0  # the largest contribution of a record over the clipping norm
    saved: bool = False  # refused by the probe, and would be wrong without it


# -- what is trained -------------------------------------------------------------------------------------------


def choose(module: Any, part: str) -> dict[str, nn.Parameter]:
    """Add adapters where asked for, and let only the part have gradients; empty where there is nothing.

    A classifier's new head trains along with every part. A language model's head is its own, often its embedding too,
    and trains only under `full` and `head`.
    """
    head = getattr(module, "head", None)
    if part == "lora":
        settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0, bias="none")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fan_in_fan_out of Conv1D, which peft mends
            inject_adapter_in_model(settings, module.backbone)
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:  # it starts at 0, which leaves A without a gradient
                nn.init.normal_(parameter, std=0.1)
    if head is None and part == "head":
        head = module.backbone.get_output_embeddings()
    always = set(head.parameters()) if head is not None else set()
    wanted: dict[str, Callable[[str], bool]] = {
        "full": lambda _: True,
        "lora": lambda name: ".lora_" in name,
        "bias": lambda name: name.endswith("bias"),
        "head": lambda _: False,
    }
    found = {name for name, _ in module.named_parameters() if wanted[part](name)}
    if not found and part != "head":
        return {}
    found |= {name for name, parameter in module.named_parameters() if parameter in always}
    module.train()
    return train_only(module, found)


# -- the loop --------------------------------------------------------------------------------------------------


def loop(module: nn.Module, names: Iterable[str], records: Sequence[Record]) -> list[dict[str, Tensor]]:
    """Gradient of each record by itself, unpadded, in double; 0 for a parameter that the loss does not reach."""
    twin = copy.deepcopy(module).double()
    every = dict(twin.named_parameters())
    parameters = {name: every[name] for name in names}
    found = []
    for record in records:
        (loss,) = twin(*collate([record]))
        each = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        found.append(dict(zip(parameters, each, strict=True)))
    return found


def norm_of(gradient: dict[str, Tensor]) -> float:
    """L2 norm over all parameters."""
    return float(torch.stack([part.double().norm() for part in gradient.values()]).norm())


def clipped(singles: list[dict[str, Tensor]], clipping: Clipping) -> list[dict[str, Tensor]]:
    """What each record should contribute."""
    norms = [norm_of(single) * (1 + SLACK) for single in singles]
    if clipping.mode == "flat":
        factors = [min(1.0, clipping.norm / norm) if norm > 0 else 1.0 for norm in norms]
    else:
        factors = [clipping.norm / (norm + 0.01 * clipping.norm) for norm in norms]
    return [
        {name: part * factor for name, part in single.items()} for single, factor in zip(singles, factors, strict=True)
    ]


def difference(found: dict[str, Tensor], expected: list[dict[str, Tensor]]) -> float:
    """Largest relative difference of a parameter's sum, beside what the records contribute to it one by one."""
    scales = {name: sum(float(each[name].norm()) for each in expected) for name in found}
    least = max(FLOOR * max(scales.values()), 1e-30)
    return max(
        float((value.double() - sum(each[name] for each in expected)).norm()) / max(scales[name], least)
        for name, value in found.items()
    )


def judge(summed: Summed, records: Sequence[Record], singles: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Return the largest relative difference from the loop, and the largest share of a record over the norm.

    Norms are chosen so that no record, half of them and all are clipped. A share is what the engine says, and what the
    sum loses when the record is taken out: the one of the largest gradient, and the longest, which pads its neighbours.
    """
    norms = [norm_of(single) for single in singles]
    middle = sorted(norms)[len(norms) // 2]
    gaps, shares = [], []
    for clipping in (
        Clipping(2 * max(norms)),
        Clipping(middle),
        Clipping(min(norms) / 4),
        Clipping(middle, "normalise"),
    ):
        batches = [collate([records[number] for number in numbers]) for numbers in BATCHES]
        contributed, total = summed(clipping, batches)
        gaps.append(difference(total, clipped(singles, clipping)))
        shares.append(float(contributed.max()) / clipping.norm)
    clipping = Clipping(min(norms) / 4)
    _, total = summed(clipping, [collate([records[number] for number in numbers]) for numbers in BATCHES])
    longest = max(range(len(records)), key=lambda number: sum(part.numel() for part in records[number].values()))
    for absent in {norms.index(max(norms)), longest}:
        kept = [[number for number in numbers if number != absent] for numbers in BATCHES]
        _, rest = summed(clipping, [collate([records[number] for number in numbers]) for numbers in kept if numbers])
        shares.append(norm_of({name: total[name].double() - rest[name].double() for name in total}) / clipping.norm)
    return max(gaps), max(shares)


# -- a cell ----------------------------------------------------------------------------------------------------


def try_cell(architecture: Architecture, part: str, mode: Mode, seed: int = 1, probed: bool = True) -> Cell:
    """Attach, probe, sum, compare. The records follow from `seed`; without the probe, `auto` is one-pass."""
    place, where = (architecture.name, part, mode), "attach"
    try:
        module = architecture.build()
        parameters = choose(module, part)
        if not parameters:
            return Cell(*place, "none", reason=f"nothing to train but a head in {architecture.name} under {part!r}")
        records = architecture.examples(LENGTHS, torch.Generator().manual_seed(seed))
        singles = loop(module, parameters, records)
        others = architecture.examples(made_up.LENGTHS, torch.Generator().manual_seed(-seed))
        with Gradients(module, parameters, mode) as gradients:
            if probed:
                where = "probe"
                together = [
                    (numbers, Objective(collate([others[number] for number in numbers], width), module))
                    for numbers, width in made_up.TOGETHER
                ]
                probe.check(module, gradients, together, [Objective(collate([one]), module) for one in others])

            def summed(clipping: Clipping, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
                nonlocal where
                total = ClippedSum(gradients, clipping)
                contributed = torch.cat([total.add(Objective(batch, module)) for batch in batches])
                where = "later step"
                return contributed, total.sums()

            where = "first step"
            gap, share = judge(summed, records, singles)
    except (SensitivityError, ModelError) as error:
        outcome: Outcome = "error" if where == "later step" else "refused"
        return Cell(*place, outcome, where, str(error))
    except Exception as error:  # whatever else the engine lets through is a fault of the engine
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = (str(error).strip().splitlines() or [""])[0]
        return Cell(
            *place, "error", where, f"{type(error).__name__}: {said} ({Path(last.filename).name}:{last.lineno})"
        )
    right = gap <= TOLERANCE and share <= 1 + TOLERANCE
    return Cell(*place, "right" if right else "wrong", gap=gap, share=share)
