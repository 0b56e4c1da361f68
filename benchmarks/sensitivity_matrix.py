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

The program fails where a cell is wrong or an error, or a cell that must be refused is not.
"""

import argparse
import logging
import re
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from architecture_tasks import Architecture
from architecture_traps import TRAPS
from architectures import ARCHITECTURES
from sensitivity_cell import PARTS, Cell, Outcome, try_cell
from transformers.utils import logging as transformers_logging

from shared.run_config import Gradients as Mode

MODES: tuple[Mode, ...] = ("hooks", "one-pass", "auto")
MARKS: dict[Outcome, str] = {"right": "✓", "refused": "–", "wrong": "WRONG", "error": "ERROR", "none": "·"}


def counts(cells: Sequence[Cell]) -> str:
    """One line: how many came out how."""
    number = Counter(cell.outcome for cell in cells)
    tried = len(cells) - number["none"]
    share = 100 * number["right"] / tried if tried else 0.0
    kept = sum(cell.saved for cell in cells)
    saved = f" ({kept} of them wrong or failing without the probe)" if kept else ""
    right = [cell for cell in cells if cell.outcome == "right"]
    line = (
        f"{tried} cells: {number['right']} right ({share:.1f} %), {number['refused']} refused{saved}, {number['wrong']} wrong, "
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
