"""The sites' released validation score against rounds, with the interval that its noise leaves."""

import math
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from server.history.records import Metric
from server.report import drawing
from server.report.drawing import COLOURS, NAME, Plot
from server.report.facts import Facts
from server.report.words import cut, score
from shared.score_names import title

PANELS = 6  # sites that get a panel each; more are shown as quantiles
QUANTILES = {
    0.0: "lowest site",
    0.1: "10 % of sites",
    0.5: "median site",
    0.9: "90 % of sites",
    1.0: "highest site",
}
Course = Mapping[int, Metric]  # by round


def validation(facts: Facts) -> Plot | None:
    """Draw a panel for each of a few sites, quantiles over many; None where no site released a score."""
    held: dict[str, dict[int, Metric]] = defaultdict(dict)
    for number, metric in facts.metrics:
        if (
            metric.site is not None
            and (metric.scope, metric.name) == ("validation", facts.validated)
            and math.isfinite(metric.value)
        ):
            held[metric.site][number] = metric
    if not held:
        return None
    draw = _panels if len(held) <= PANELS else _quantiles
    figure, alt, caption = draw(facts, dict(sorted(held.items())))
    return Plot(
        "validation",
        f"Validation {title(facts.validated)} of the sites",
        drawing.to_svg(figure, "validation", alt),
        alt,
        caption,
    )


def _panels(facts: Facts, held: Mapping[str, Course]) -> tuple[Figure, str, str]:
    columns = 1 if len(held) == 1 else 2
    rows = math.ceil(len(held) / columns)
    figure, panels = drawing.canvas(rows, columns, height=max(3.1, 0.5 + 1.5 * rows), sharex=True, sharey=True)
    for spare in panels[len(held) :]:
        spare.set_visible(False)
    for place, (name, axes) in enumerate(zip(held, panels, strict=False)):
        for other in held.keys() - {name}:
            axes.plot(*drawing.arrays(_values(held[other])), color=COLOURS["faint"], linewidth=1)
        _band(axes, held[name])
        values = _values(held[name])
        drawing.line(axes, *drawing.arrays(values), "blue", markersize=2.5)
        drawing.against_rounds(axes, facts.rounds[-1].number, label=place >= len(held) - columns)
        axes.tick_params(labelbottom=place >= len(held) - columns)
        drawing.mark_phases(axes, facts.phases, names=False)
        axes.set_title(f"{cut(name, NAME)}  {score(drawing.last(values))}", color=COLOURS["blue"])
        if place % columns == 0:
            axes.set_ylabel(title(facts.validated))
    said = "; ".join(f"{cut(name, NAME)} {_interval(each[max(each)])}" for name, each in held.items())
    noisy = any(metric.low is not None for each in held.values() for metric in each.values())
    caption = "A panel a site, with the others in grey. " if len(held) > 1 else ""
    caption += (
        "The band is the 95 % interval that the privacy noise leaves; chance in which records a site holds comes on top."
        if noisy
        else "No noise was added to these scores, so there is no band."
    )
    return figure, f"Validation {title(facts.validated)} of each site against rounds. At the end: {said}.", caption


def _band(axes: Axes, course: Course) -> None:
    bounded = {
        number: (each.low, each.high)
        for number, each in course.items()
        if each.low is not None and each.high is not None
    }
    if not bounded:
        return
    x = np.array(list(bounded), float)
    low, high = np.array(list(bounded.values()), float).T
    if len(x) > 1:
        axes.fill_between(x, low, high, color=COLOURS["blue"], alpha=0.24, linewidth=0)
    else:
        axes.vlines(x, low, high, color=COLOURS["blue"], alpha=0.35, linewidth=6)


def _quantiles(facts: Facts, held: Mapping[str, Course]) -> tuple[Figure, str, str]:
    numbers = sorted({number for each in held.values() for number in each})
    table = np.array(
        [
            np.quantile([each[number].value for each in held.values() if number in each], list(QUANTILES))
            for number in numbers
        ]
    )
    x, (lowest, tenth, median, ninetieth, highest) = np.array(numbers, float), table.T
    figure, (axes,) = drawing.canvas()
    axes.fill_between(x, tenth, ninetieth, color=COLOURS["blue"], alpha=0.24, linewidth=0)
    for extreme in (lowest, highest):
        drawing.line(axes, x, extreme, "blue", linewidth=0.7, marker=None)
    drawing.line(axes, x, median, "blue")
    drawing.against_rounds(axes, facts.rounds[-1].number)
    drawing.mark_phases(axes, facts.phases)
    axes.set_ylabel(title(facts.validated))
    ends = [f"{name} {score(float(value))}" for name, value in zip(QUANTILES.values(), table[-1], strict=True)]
    drawing.label_ends(axes, [(float(value), text, "blue") for value, text in zip(table[-1], ends, strict=True)])
    newest = [each[max(each)] for each in held.values()]
    widths = [metric.high - metric.low for metric in newest if metric.low is not None and metric.high is not None]
    caption = f"Over {len(held)} sites; the band holds the middle 80 % of them."
    if widths:
        half = score(float(np.median(widths)) / 2)
        caption += f" The noise alone moves the median site's score by up to {half} either way, at 95 %."
    return (
        figure,
        f"Validation {title(facts.validated)} against rounds, over {len(held)} sites. At the end: {', '.join(ends)}.",
        caption,
    )


def _values(course: Course) -> dict[int, float]:
    return {number: metric.value for number, metric in course.items()}


def _interval(metric: Metric) -> str:
    said = score(metric.value)
    return said if metric.low is None else f"{said} ({score(metric.low)} to {score(metric.high)})"
