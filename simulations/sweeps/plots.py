"""A sweep as pictures: the score against the first axis of numbers, and by round; bars and bands are 95 % intervals."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from server.report import drawing
from server.report.drawing import COLOURS
from server.report.words import cut
from shared.errors import ConfigError
from simulations.sweeps.plan import number
from simulations.sweeps.results import Results, Row, Score, interval

LOGARITHMIC = ("epsilon", "learning_rate", "delta")  # ends of keys whose values are compared by their ratio
PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#a5508c",
    "#e69f00",
    "#56b4e9",
    "#1d2730",
    "#f0c000",
)  # Okabe and Ito (2008)
MARKS = "os^Dv<>P"
LONGEST = 46  # characters of a line's name
ASIDE = 0.012  # of an axis: from one line's bars to the next one's
BANDS = 4  # lines, at most, that get a band each


def write(results: Results, folder: Path) -> list[Path]:
    """Draw what there is to draw into `folder`, and name the files: none before a run has a score.

    Raises
    ------
    ConfigError
        Where a file cannot be written.
    """
    score = results.score
    if score is None or not any(row.values for row in results.rows):
        return []
    drawn = []
    with drawing.style():
        for name, draw in (("scores.png", _against_axis), ("rounds.png", _by_round)):
            figure, (axes,) = drawing.canvas(height=3.6)
            figure.set_figwidth(6.4)
            draw(axes, results, score)
            axes.set_ylabel(score.title)
            _keep_to_shares(axes, results)
            try:
                figure.savefig(folder / name, facecolor="white", dpi=144)
            except OSError as error:
                raise ConfigError(f"--out: {folder / name} cannot be written: {error.strerror}.") from None
            drawn.append(folder / name)
    return drawn


def axis_of(results: Results) -> str | None:
    """Name the first key of the grid whose values are numbers, two of them finite at least."""
    for key in results.plan.grid:
        places = {number(row.cell.values[key]) for row in results.rows}
        if None not in places and len([place for place in places if place is not None and math.isfinite(place)]) > 1:
            return key
    return None


def _against_axis(axes: Axes, results: Results, score: Score) -> None:
    """Draw a line for each setting of the other keys; what is infinite (no privacy) as a level of its own."""
    key = axis_of(results)
    if key is None:
        _side_by_side(axes, results)
        return
    lines, ratio = _lines(results, key), key.rpartition(".")[2] in LOGARITHMIC
    ticks = sorted({x for row in results.rows if (x := number(row.cell.values[key])) is not None and math.isfinite(x)})
    for place, (name, rows) in enumerate(lines.items()):
        colour, mark = PALETTE[place % len(PALETTE)], MARKS[place % len(MARKS)]
        at = {number(row.cell.values[key]): row for row in rows if row.values}
        finite = [x for x in ticks if x in at]
        if finite:
            means = [at[x].mean or 0.0 for x in finite]
            axes.errorbar(
                _aside(finite, ticks, place - (len(lines) - 1) / 2, ratio=ratio),
                means,
                yerr=[[_bar(at[x], side) for x in finite] for side in (0, 1)],
                color=colour,
                marker=mark,
                markersize=4.5,
                capsize=3,
                label=name or None,
            )
        if math.inf in at:
            axes.axhline(at[math.inf].mean or 0.0, color=colour, linestyle=(0, (5, 3)), linewidth=1.2)
            text = f"{key.rpartition('.')[2]} inf"
            axes.annotate(
                text, (1, at[math.inf].mean or 0.0), xycoords=axes.get_yaxis_transform(), ha="right", va="bottom"
            )
    if ratio:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(key)
    _legend(axes)
    axes.set_title(f"{score.title}: mean over seeds, 95 % interval", color=COLOURS["ink"])


def _side_by_side(axes: Axes, results: Results) -> None:
    """Draw a point a cell, where no axis has numbers."""
    rows = [row for row in results.rows if row.values]
    bars = [[_bar(row, side) for row in rows] for side in (0, 1)]
    axes.errorbar(
        range(len(rows)),
        [row.mean or 0.0 for row in rows],
        yerr=bars,
        color=PALETTE[0],
        marker="o",
        linestyle="",
        capsize=3,
    )
    axes.set_xticks(range(len(rows)), [cut(row.cell.name, LONGEST) for row in rows], rotation=20, ha="right")
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_title("mean over seeds, 95 % interval", color=COLOURS["ink"])


def _by_round(axes: Axes, results: Results, score: Score) -> None:
    """Draw each cell's mean by round, over the seeds that have the round, and its interval as a band."""
    last, drawn = 1, [row for row in results.rows if row.values]
    for place, row in enumerate(drawn):
        courses = [trial.course for trial in row.trials if trial.value is not None]
        rounds = sorted(set.intersection(*(set(course) for course in courses)))
        last = max([last, *rounds])
        colour, name = PALETTE[place % len(PALETTE)], cut(row.cell.name, LONGEST)
        means, bands = _statistics(courses, rounds)
        axes.plot(
            rounds, means, color=colour, label=name, marker="o" if len(rounds) < drawing.DOTS else "", markersize=3
        )
        if bands and len(drawn) <= BANDS:
            axes.fill_between(rounds, *bands, color=colour, alpha=0.18, linewidth=0)
    drawing.against_rounds(axes, last)
    _legend(axes)
    spread = ", 95 % interval" if len(drawn) <= BANDS else ""
    axes.set_title(f"{score.title} by round: mean over seeds{spread}", color=COLOURS["ink"])


def _statistics(
    courses: Sequence[Mapping[int, float]], rounds: Sequence[int]
) -> tuple[list[float], tuple[list[float], list[float]] | None]:
    """Give the mean of each round, and its interval's two ends where there are two courses at least."""
    held = [[course[number] for course in courses] for number in rounds]
    means = [sum(values) / len(values) for values in held]
    ends = [found for values in held if (found := interval(values)) is not None]
    return means, ([low for low, _ in ends], [high for _, high in ends]) if len(ends) == len(rounds) else None


def _lines(results: Results, key: str) -> dict[str, list[Row]]:
    """Sort the rows by what they set besides `key`."""
    lines: dict[str, list[Row]] = {}
    for row in results.rows:
        others = ", ".join(
            f"{name.rpartition('.')[2]} {text}" for name, text in row.cell.settings.items() if name != key
        )
        lines.setdefault(cut(others, LONGEST), []).append(row)
    return lines


def _aside(places: Sequence[float], ticks: Sequence[float], steps: float, *, ratio: bool) -> list[float]:
    """Move places a little, so that the bars of several lines stand beside each other."""
    if ratio:
        return [place * (ticks[-1] / ticks[0]) ** (ASIDE * steps) for place in places]
    return [place + (ticks[-1] - ticks[0]) * ASIDE * steps for place in places]


def _bar(row: Row, side: int) -> float:
    """How far the interval reaches below (0) or above (1) the mean."""
    found, mean = row.interval, row.mean
    return 0.0 if found is None or mean is None else abs(found[side] - mean)


def _keep_to_shares(axes: Axes, results: Results) -> None:
    """Show no place where a share cannot be, however wide an interval is."""
    if all(0 <= value <= 1 for row in results.rows for value in row.values):
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0.0), min(high, 1.0))


def _legend(axes: Axes) -> None:
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(frameon=False, fontsize=8.5)
