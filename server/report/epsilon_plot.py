"""Privacy spent against rounds: each site's epsilon so far beside the run's budget.

Sites whose epsilon runs alike, as equal plans do, share a line. Train and validation records are disjoint,
so each part has its panel and nothing is added.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from server.report import drawing
from server.report.drawing import COLOURS, NAME, SERIES, Plot
from server.report.facts import Facts
from server.report.sites import PARTS
from server.report.words import budget as asked
from server.report.words import cut, epsilon

LINES = 4  # groups of sites that get a line each
Dataset = tuple[str, str]  # site, dataset
Course = dict[int, float]  # epsilon by round


def epsilons(facts: Facts) -> Plot | None:
    """Draw a panel for each part of the data; None where no finite epsilon was reported."""
    held: dict[str, dict[Dataset, Course]] = {part: defaultdict(dict) for part in PARTS}
    budgets: dict[str, set[float]] = {part: set() for part in PARTS}
    final = {(spend.part, spend.site, spend.dataset): number for number, spend in facts.spends}
    shown = set(facts.sampled)
    for number, spend in facts.spends:
        if number in shown or final[spend.part, spend.site, spend.dataset] == number:
            if math.isfinite(spend.epsilon):
                held[spend.part][spend.site, spend.dataset][number] = spend.epsilon
            if math.isfinite(spend.budget):
                budgets[spend.part].add(spend.budget)
    parts = [part for part in PARTS if held[part]]
    if not parts:
        return None
    figure, panels = drawing.canvas(1, len(parts), sharey=True)
    top = 1.14 * max(max(course.values()) for part in parts for course in held[part].values())
    top = max(top, 1.14 * max((max(budgets[part]) for part in parts if budgets[part]), default=0.0))
    said = []
    for axes, part in zip(panels, parts, strict=True):
        drawing.against_rounds(axes, facts.rounds[-1].number)
        axes.set_ylim(0, top)
        drawing.mark_phases(axes, facts.phases, names=False)
        axes.set_title(f"{part} records", color=COLOURS["ink"])
        said.append(f"{part} records: {_panel(axes, held[part], sorted(budgets[part]))}.")
    panels[0].set_ylabel("ε spent in this run")
    alt = "Privacy spent against rounds. " + " ".join(said)
    caption = "A record is in one of the two parts and never in both, so they are not added. Dashed: this run's budget."
    return Plot("epsilon", "Privacy spent", drawing.to_svg(figure, "epsilon", alt), alt, caption)


def _panel(axes: Axes, held: Mapping[Dataset, Course], budgets: Sequence[float]) -> str:
    groups = _alike(held)
    if len(groups) > LINES:
        groups = [groups[0], groups[-1]]
        prefixes = ["largest: ", "smallest: "]
    else:
        prefixes = [""] * len(groups)
    labels = []
    for prefix, group, colour in zip(prefixes, groups, SERIES, strict=False):
        course = held[group[0]]
        drawing.line(axes, *drawing.arrays(course), colour, markersize=2.5)
        name = cut(group[0][0], NAME) if len(group) == 1 else f"{len(group)} sites"
        labels.append((f"{prefix}{name} {epsilon(drawing.last(course))}", colour))
    for each in {budgets[0], budgets[-1]} if budgets else ():
        axes.axhline(each, color=COLOURS["ink"], linestyle=(0, (5, 3)), linewidth=1)
        axes.text(
            0.02,
            each,
            f"budget {asked(each)}",
            transform=axes.get_yaxis_transform(),
            va="bottom",
            fontsize=9.5,
        )
    for place, (text, colour) in enumerate(reversed(labels)):
        axes.text(
            0.97,
            0.03 + 0.08 * place,
            text,
            transform=axes.transAxes,
            ha="right",
            color=COLOURS[colour],
            fontsize=9.5,
        )
    limit = f", of {asked(budgets[-1])}" if budgets else ""
    return ", ".join(text for text, _ in labels) + limit


def _alike(held: Mapping[Dataset, Course]) -> list[list[Dataset]]:
    """Group the datasets whose epsilon starts and ends alike, the largest first."""
    groups: dict[tuple[str, str], list[Dataset]] = defaultdict(list)
    for dataset, course in held.items():
        groups[epsilon(drawing.last(course)), epsilon(course[min(course)])].append(dataset)
    return sorted(groups.values(), key=lambda group: -drawing.last(held[group[0]]))
