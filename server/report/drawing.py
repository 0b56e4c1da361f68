"""How the report draws: an SVG that sits in the page, takes its colours, and loads nothing.

Colours are the colour-blind-safe ones of Okabe and Ito (2008). In the SVG each stands as a CSS variable, so
that the page can give it a lighter twin where the reader prefers a dark screen. Text stays text.
"""

import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from server.report.facts import POINTS
from server.report.words import cut

Values = npt.NDArray[np.float64]

COLOURS = {
    "ink": "#1d2730",
    "muted": "#5a6772",
    "faint": "#c3cbd2",
    "blue": "#0072b2",
    "vermilion": "#d55e00",
    "green": "#009e73",
    "purple": "#a5508c",
}
SERIES = ("blue", "vermilion", "green", "purple")
STYLE: dict[Any, Any] = {  # the stubs name every key in a Literal
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "text.usetex": False,
    "text.color": COLOURS["ink"],
    "text.parse_math": False,  # a site may be called $x^
    "axes.edgecolor": COLOURS["faint"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.formatter.useoffset": False,
    "grid.color": COLOURS["faint"],
    "grid.linewidth": 0.5,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
}
WIDTH = 5.4  # inches of 72 points
DOTS = 30  # values, at most, that get a dot each
NAME = 22  # characters of a site's name in a plot
LETTERS = 46  # of small text that fit across a panel


@dataclass(frozen=True)
class Plot:
    """A drawing with its words: `alt` says what it shows to a reader who cannot see it."""

    name: str
    title: str
    svg: Markup
    alt: str
    caption: str = ""


@contextmanager
def style() -> Iterator[None]:
    """Draw in the report's style, whatever the user's own is."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        for name, value in STYLE.items():
            matplotlib.rcParams[name] = value
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's browser has its own
        yield


def canvas(rows: int = 1, columns: int = 1, height: float = 3.1, **options: Any) -> tuple[Figure, list[Axes]]:
    """Make a figure and its panels, row by row; to be called within `style`."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def to_svg(figure: Figure, name: str, alt: str) -> Markup:
    """Write a figure as an inline SVG without ids of its own, addresses, or a style sheet."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    width, height = figure.get_size_inches() * 72
    body = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"<>]*"', "<g", body).replace(" xlink:href=", " href=")
    body = re.sub(r">\s+<", "><", body)
    for colour, value in COLOURS.items():
        body = body.replace(f": {value}", f": var(--{colour})")
    label = html.escape(alt, quote=True)
    return Markup(f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">{body}')  # noqa: S704 - matplotlib escapes text


def against_rounds(axes: Axes, last: int, *, label: bool = True) -> None:
    """Set the axis of rounds, from 1."""
    axes.set_xlim(*((0.5, 1.5) if last == 1 else (1, last)))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.margins(y=0.12)
    if label:
        axes.set_xlabel("round")


def mark_phases(axes: Axes, phases: Sequence[tuple[int, str]], *, names: bool = True) -> None:
    """Draw a line where a phase begins, and name the phases above, where there is room for a name."""
    start, end = axes.get_xlim()
    edges = [start, *(first - 0.5 for first, _ in phases[1:]), end]
    for edge in edges[1:-1]:
        axes.axvline(edge, color=COLOURS["muted"], linewidth=0.8, linestyle=(0, (2, 2)))
    if not names or len(phases) < 2:
        return
    for place, (_, name) in enumerate(phases):
        text = cut(name.replace("_", " "), NAME)
        narrow = (edges[place + 1] - edges[place]) / (end - start) < (len(text) + 1) / LETTERS
        if narrow and 0 < place < len(phases) - 1:
            continue
        # A short first phase is named up to its end, a short last one up to the panel's.
        at, side, offset = (edges[place + 1], "right", -4) if narrow else (edges[place], "left", 4 if place else 0)
        axes.annotate(
            text,
            (at, 1.04),
            xycoords=axes.get_xaxis_transform(),
            xytext=(offset, 0),
            textcoords="offset points",
            ha=side,
            color=COLOURS["muted"],
            fontsize=9,
        )


def line(axes: Axes, x: Values, y: Values, colour: str, **options: Any) -> None:
    """Draw a line, with a dot a value where there are few; a long one as its mean and range over bins."""
    if len(x) > POINTS:
        parts = [np.array(part) for part in np.array_split(np.arange(len(x)), POINTS)]
        low, high = ([f(y[part]) for part in parts] for f in (np.nanmin, np.nanmax))
        x, y = (np.array([values[part].mean() for part in parts]) for values in (x, y))
        axes.fill_between(x, low, high, color=COLOURS[colour], alpha=0.22, linewidth=0)
    if len(x) <= DOTS:
        options = {"marker": "o", "markersize": 3.5, "clip_on": False} | options
    else:
        options.pop("markersize", None)
    axes.plot(x, y, color=COLOURS[colour], **options)


def arrays(values: Mapping[int, float]) -> tuple[Values, Values]:
    """Give rounds and values as arrays, shape (rounds,) each."""
    return np.array(list(values), float), np.array(list(values.values()), float)


def last(values: Mapping[int, float]) -> float:
    """Give the value of the last round."""
    return values[max(values)]


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write (value, text, colour) at the right of the panel, each at its value but clear of the others."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    inches = axes.get_window_extent().height / axes.figure.dpi
    gap = (high - low) * 0.17 / max(inches, 0.5) * max((text.count("\n") + 1 for _, text, _ in ends), default=1)
    places: list[float] = []
    for value, _, _ in sorted(ends):
        places.append(max(value, places[-1] + gap) if places else value)
    over = places[-1] - high if places else 0
    if over > 0:
        for place in reversed(range(len(places))):
            top = high if place == len(places) - 1 else places[place + 1] - gap
            places[place] = min(places[place], top)
    for height, (_, text, colour) in zip(places, sorted(ends), strict=True):
        axes.text(
            1.02,
            height,
            text,
            transform=axes.get_yaxis_transform(),
            color=COLOURS[colour],
            va="center",
            fontsize=9.5,
        )
