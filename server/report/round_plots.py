"""Time and data of each round."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from server.report import drawing
from server.report.drawing import Plot, Values
from server.report.facts import POINTS, Facts
from server.report.sites import Traffic
from server.report.words import duration, size

Series = tuple[str, Values, str]  # name, values by round, colour
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def seconds(facts: Facts, traffic: Mapping[int, Traffic]) -> Plot:
    """Draw how long each round took, and how long its slowest site trained."""
    whole = np.array([each.seconds for each in facts.rounds], float)
    slowest = np.array([traffic[each.number].slowest for each in facts.rounds], float)
    series: list[Series] = [("whole round", whole, "blue")]
    if slowest.any():
        series.append(("slowest training", slowest, "vermilion"))
    alt = f"Seconds a round: median {duration(float(np.median(whole)))}, longest {duration(float(whole.max()))}."
    return _plot(facts, "seconds", "Time a round", "seconds", series, alt, duration)


def transfer(facts: Facts, traffic: Mapping[int, Traffic]) -> Plot | None:
    """Draw what each round sent to the sites and got from them; None where no byte was counted."""
    down, up = (
        np.array([getattr(traffic[each.number], way) for each in facts.rounds], float) for way in ("down", "up")
    )
    top = max(down.max(), up.max())
    if top == 0:
        return None
    scale, unit = next(((scale, unit) for scale, unit in UNITS if top >= scale), (1.0, "bytes"))
    series: list[Series] = [
        ("to the sites", down / scale, "blue"),
        ("from the sites", up / scale, "vermilion"),
    ]
    alt = f"Data a round over all sites: at most {size(float(down.max()))} to the sites and {size(float(up.max()))} from them."
    return _plot(
        facts,
        "transfer",
        "Data a round, over all sites",
        unit,
        series,
        alt,
        lambda value: size(value * scale),
    )


def _plot(
    facts: Facts,
    name: str,
    title: str,
    unit: str,
    series: Sequence[Series],
    alt: str,
    words: Callable[[float], str],
) -> Plot:
    x = np.array([each.number for each in facts.rounds], float)
    figure, (axes,) = drawing.canvas()
    for _, values, colour in series:
        drawing.line(axes, x, values, colour)
    drawing.against_rounds(axes, facts.rounds[-1].number)
    axes.set_ylim(0, 1.1 * max(float(values.max()) for _, values, _ in series) or 1.0)
    drawing.mark_phases(axes, facts.phases)
    axes.set_ylabel(f"{unit} a round")
    drawing.label_ends(
        axes,
        [
            (float(values[-1]), f"{label},\nmedian {words(float(np.median(values)))}", colour)
            for label, values, colour in series
        ],
    )
    caption = "Each point is the mean of several rounds; the band is their range." if len(x) > POINTS else ""
    return Plot(name, title, drawing.to_svg(figure, name, alt), alt, caption)
