"""Is a record's share bounded, on which architectures, with what trained? Every combination is tried.

    python benchmarks/sensitivity_matrix.py                                      all of them, a table on the screen
    python benchmarks/sensitivity_matrix.py --markdown docs/sensitivity-matrix.md
    python benchmarks/sensitivity_matrix.py --only OPT --only T5 --mode auto
    python benchmarks/sensitivity_matrix.py --without-probe                      what only the probe finds: fails

A cell is an architecture (benchmarks/architectures.py), what is trained of it, and how the engine has the gradients.
It is

    right     the clipped sum is within 1e-4 of a loop over single records, at several clipping norms, and no record
              contributes more than 1.0001 x the clipping norm, by the engine's own word and by taking it out
    refused   the engine or its probe said no before any training, with a reason
    wrong     accepted, and neither: the claim would be false. There must be none.
    error     something else was raised: a fault of the engine, and counted as bad as wrong
    none      the architecture has nothing of the kind to train (no bias in all of Llama)

The loop is written here, not taken from the probe: one record at a time, unpadded, plain autograd in double, on
a copy of the module that the engine never sees. The probe runs as in training (its lengths and batches are those of
client/made_up.py), on records of its own.
The program fails where a cell is wrong or an error, or a cell that must be refused is not.
"""

import argparse
import copy
import logging
import re
import textwrap
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from architecture_traps import TRAPS
from architectures import ARCHITECTURES, BATCHES, LENGTHS, Architecture, Batch, Record, collate
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from client import made_up
from client.privacy import probe
from client.privacy.engine import ClippedSum, Clipping, Gradients, Objective, train_only
from shared.errors import ModelError, SensitivityError
from shared.run_config import Gradients as Mode

PARTS = ("full", "lora", "bias", "head")
MODES: tuple[Mode, ...] = ("hooks", "one-pass", "auto")
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


# -- the table -------------------------------------------------------------------------------------------------

MARKS: dict[Outcome, str] = {"right": "✓", "refused": "–", "wrong": "WRONG", "error": "ERROR", "none": "·"}


def counts(cells: Sequence[Cell]) -> str:
    """One line: how many came out how."""
    number = Counter(cell.outcome for cell in cells)
    tried = len(cells) - number["none"]
    share = 100 * number["right"] / tried if tried else 0.0
    right = [cell for cell in cells if cell.outcome == "right"]
    line = (
        f"{tried} cells: {number['right']} right ({share:.1f} %), {number['refused']} refused ({sum(cell.saved for cell in cells)} "
        f"of them wrong without the probe), {number['wrong']} wrong, "
        f"{number['error']} errors; {number['none']} with nothing to train"
    )
    if right:
        gap, most = max(cell.gap for cell in right), max(cell.share for cell in right)
        line += f"; right within {gap:.1g} of the loop, no record above {most:.4f} x the clipping norm"
    return line


def table(rows: Sequence[Architecture], cells: Sequence[Cell], modes: Sequence[str]) -> list[str]:
    """Lines of a Markdown table: in each field one mark a mode."""
    found = {(cell.architecture, cell.part, cell.mode): cell for cell in cells}
    lines = [f"| architecture | {' | '.join(PARTS)} | what is hard about it |", "| --- " * (len(PARTS) + 2) + "|"]
    for row in rows:
        fields = [" ".join(MARKS[found[row.name, part, mode].outcome] for mode in modes) for part in PARTS]
        lines.append(f"| {row.name} | {' | '.join(fields)} | {row.note} |")
    return lines


def refusals(cells: Sequence[Cell]) -> list[str]:
    """Lines of a Markdown list: each reason, and who was refused for it."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    modes: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell.outcome == "refused":
            modes.setdefault((_without_names(cell.reason), f"{cell.architecture} {cell.part}"), []).append(cell.mode)
    for (reason, who), by in modes.items():
        name, _, part = who.rpartition(" ")
        found.setdefault((reason, ", ".join(by)), {}).setdefault(name, []).append(part)
    lines = []
    for (reason, all_modes), rows in sorted(found.items()):
        names = "; ".join(f"{name} ({', '.join(parts)})" for name, parts in rows.items())
        lines += textwrap.wrap(f"- {all_modes}: {reason} *{names}*", 118, subsequent_indent="  ")
    return lines


def _without_names(reason: str) -> str:
    """Leave out which layer, how large a difference, and the rest of a long message."""
    reason = re.sub(r"'[a-z_]+\.[\w.]+'", "…", reason)
    reason = re.sub(r"(differs by|contributes) [\d.e+-]+", r"\1 …", reason)
    return reason if len(reason) <= 160 else reason[:160].rsplit(" ", 1)[0] + " …"


def markdown(cells: Sequence[Cell], modes: Sequence[str], minutes: float) -> str:
    """The page in docs/."""
    names = {row.name for row in ARCHITECTURES}
    zoo = [cell for cell in cells if cell.architecture in names]
    traps = [cell for cell in cells if cell.architecture not in names]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "opacus", "peft"))
    return "\n".join(
        [
            "# The sensitivity matrix",
            "",
            "Is a record's share of the clipped sum bounded, on which architectures, with what trained? Written by",
            "`python benchmarks/sensitivity_matrix.py --markdown docs/sensitivity-matrix.md`, whose first lines say what is",
            f"compared with what. {packages}; {minutes:.1f} minutes on one core.",
            "",
            f"Each field has a mark for each of {', '.join(modes)}: ✓ right, – refused before any training, · nothing to train.",
            "*lora* is rank 4 on all linear layers, A and B; a classifier's new head trains along with every part. A language",
            "model's head is its own, and *head* trains it alone (where it is tied, the embedding with it).",
            "",
            f"## {len(ARCHITECTURES)} architectures",
            "",
            *(f"- {mode}: {counts([cell for cell in zoo if cell.mode == mode])}" for mode in modes),
            f"- all: {counts(zoo)}",
            "",
            *table([row for row in ARCHITECTURES if any(cell.architecture == row.name for cell in cells)], zoo, modes),
            "",
            "## Traps",
            "",
            counts(traps) + ". What couples records must be refused, and is.",
            "",
            *table([row for row in TRAPS if any(cell.architecture == row.name for cell in cells)], traps, modes),
            "",
            "## Refused, and why",
            "",
            *refusals(cells),
            "",
        ]
    )


def quiet() -> None:
    """Silence what libraries say about tiny configurations: it is about their pretrained tokens, not about gradients."""
    transformers_logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")


def _tried(row: Architecture, part: str, mode: Mode, seed: int, probed: bool) -> Cell:
    """Try a cell, and one that the probe refuses without it too, to say what the probe is good for."""
    cell = try_cell(row, part, mode, seed, probed)
    if cell.where != "probe" or cell.outcome != "refused" or mode == "auto":  # without a probe, auto is one-pass
        return cell
    return replace(cell, saved=try_cell(row, part, mode, seed, probed=False).outcome in ("wrong", "error"))


def main() -> int:
    """Run the matrix, print it, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="an architecture or trap; may be repeated")
    parser.add_argument("--part", action="append", choices=PARTS, help="what is trained; may be repeated")
    parser.add_argument("--mode", action="append", choices=(*MODES, "ghost"), help="may be repeated")
    parser.add_argument("--seed", type=int, default=1, help="of the records; 1")
    parser.add_argument("--without-probe", action="store_true", help="let everything in that the engine itself lets in")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    options = parser.parse_args()
    rows = [row for row in (*ARCHITECTURES, *TRAPS) if not options.only or row.name in options.only]
    if options.only and len(rows) < len(set(options.only)):
        parser.error(f"--only={options.only}: known are {', '.join(row.name for row in (*ARCHITECTURES, *TRAPS))}.")
    if options.markdown and (options.only or options.part or options.without_probe):
        parser.error("--markdown writes the whole table; leave out --only, --part and --without-probe.")
    modes, parts = tuple(options.mode or MODES), tuple(options.part or PARTS)
    quiet()
    torch.set_num_threads(1)
    started, cells = time.monotonic(), []
    for row in rows:
        fields = []
        for part in parts:
            tried = [_tried(row, part, mode, options.seed, not options.without_probe) for mode in modes]
            cells += tried
            fields.append(f"{part} " + " ".join(cell.outcome for cell in tried))
        print(f"{row.name:16} {'  '.join(fields)}", flush=True)
    minutes = (time.monotonic() - started) / 60
    coupled = {row.name for row in rows if row.coupled}
    bad = [
        cell
        for cell in cells
        if cell.outcome in ("wrong", "error") or (cell.architecture in coupled and cell.outcome == "right")
    ]
    for mode in modes:
        print(f"{mode}: {counts([cell for cell in cells if cell.mode == mode])}")
    print(f"{minutes:.1f} minutes")
    for cell in bad:
        measured = (
            f"differs by {cell.gap:.2g}, contributes {cell.share:.5f}" if cell.outcome == "wrong" else cell.reason
        )
        print(f"{cell.outcome}: {cell.architecture}, {cell.part}, {cell.mode} {cell.where}: {measured}")
    print("\n".join(["refused:", *refusals(cells)]))
    if options.markdown:
        options.markdown.write_text(markdown(cells, modes, minutes))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
