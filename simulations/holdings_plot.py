"""Who holds what, as a picture: each site's labels, and how many sites are of which size.

A few sites are bars of records, stacked by label. Many are a map of shares, a column a site, sorted by the label that a site
has most of; of more than `COLUMNS` an even sample of that order is shown.
"""

import html
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from server.report import drawing, output
from server.report.drawing import COLOURS
from server.report.words import cut, plain
from shared.errors import ConfigError
from simulations.holdings import Holdings

SUFFIXES = (".png", ".svg", ".html")
BARS, COLOURED = 100, 8  # the most sites, and values, that are shown as bars
COLUMNS = 400  # of the map
NAMED = 24  # sites or values that are named on an axis
BINS = 30  # of sizes
PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#a5508c",
    "#e69f00",
    "#56b4e9",
    "#5a6772",
    "#f0c000",
)  # Okabe and Ito (2008)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>{css}</style></head>
<body><main><h1>{title}</h1><figure>{svg}</figure><table>{rows}</table></main></body></html>
"""


def check(path: Path) -> None:
    """Refuse a file that cannot be drawn into.

    Raises
    ------
    ConfigError
        Naming the file.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot {path} must end in {', '.join(SUFFIXES)}.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: its folder does not exist; make it, or write elsewhere.")


def write(held: Holdings, facts: dict[str, str], path: Path) -> None:
    """Draw into a file; an older one is replaced. A page has `facts` as a table.

    Raises
    ------
    ConfigError, ReportError
        Where it cannot be written.
    """
    with drawing.style():
        figure = draw(held)
        if path.suffix == ".html":
            output.write(path, _page(figure, held, facts))
            return
        dates = {"Date": None} if path.suffix == ".svg" else None
        try:
            figure.savefig(path, format=path.suffix[1:], facecolor="white", dpi=144, metadata=dates)
        except OSError as error:
            raise ConfigError(f"--plot {path} cannot be written: {error.strerror}.") from None


def draw(held: Holdings) -> Figure:
    """Draw both panels; to be called within `drawing.style`."""
    bars = len(held.names) <= BARS and len(held.values) <= COLOURED
    if bars and len(held.names) <= NAMED:  # the bars' heights are the sizes
        figure, (who,) = drawing.canvas(height=3.6)
    else:
        figure, (who, sizes) = drawing.canvas(2, 1, height=5.0, height_ratios=(5, 2))
        _sizes(sizes, held)
    figure.set_figwidth(7.2)
    if bars:
        _bars(who, held)
    else:
        _map(figure, who, held)
    return figure


def order(held: Holdings) -> list[int]:
    """Sites by the value that they have most of, and those of one value by how much of it, the most first."""
    most = held.shares.argmax(axis=1)
    return list(np.lexsort((-held.shares.max(axis=1), most)))


def sample(places: list[int], most: int) -> list[int]:
    """Return at most so many, evenly spread, the first and the last among them."""
    if len(places) <= most:
        return places
    return [places[place] for place in np.linspace(0, len(places) - 1, most).round().astype(int)]


def _bars(axes: Axes, held: Holdings) -> None:
    sites, below = np.arange(len(held.names)), np.zeros(len(held.names))
    for place in range(held.counts.shape[1]):
        name = _text(held.values[place]) if held.values else "records"
        axes.bar(sites, held.counts[:, place], 0.86, below, color=PALETTE[place], label=name, linewidth=0)
        below = below + held.counts[:, place]
    axes.set_title("records of each site" + (f", by {_text(held.column)}" if held.column else ""), color=COLOURS["ink"])
    axes.set_xlim(-0.6, len(sites) - 0.4)
    if len(sites) <= NAMED:
        axes.set_xticks(
            sites,
            [_text(name) for name in held.names],
            rotation=35 if len(sites) > 6 else 0,
            ha="right" if len(sites) > 6 else "center",
        )
    else:
        axes.set_xlabel(f"{len(sites)} sites")
    if held.values:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9, reverse=True)


def _map(figure: Figure, axes: Axes, held: Holdings) -> None:
    shown = sample(order(held), COLUMNS)
    shares = held.shares[shown].T  # (values, sites)
    colours = LinearSegmentedColormap.from_list("shares", ["#ffffff", "#56b4e9", "#0072b2", COLOURS["ink"]])
    image = axes.imshow(shares, aspect="auto", interpolation="nearest", cmap=colours, vmin=0, vmax=float(shares.max()))
    values = held.values or ("records",)
    rows = sample(list(range(len(values))), NAMED)
    axes.set_yticks(rows, [_text(values[row]) for row in rows], fontsize=9)
    axes.grid(visible=False)
    of = f"{len(held.names):,} sites" if len(shown) == len(held.names) else f"{len(shown)} of {len(held.names):,} sites"
    axes.set_xticks([])
    axes.set_xlabel(f"{of}, by the {_text(held.column or 'label')} they have most of")
    axes.set_title(f"share of a site's records, by {_text(held.column or 'label')}", color=COLOURS["ink"])
    figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03).outline.set_visible(False)


def _sizes(axes: Axes, held: Holdings) -> None:
    low, high = int(held.units.min()), int(held.units.max())
    if high > 20 * low:
        edges = list(np.geomspace(low, high, BINS + 1))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    else:
        step = -(-(high - low + 1) // BINS)  # as many sizes in each bin
        edges = list(np.arange(low, high + step + 1, step) - 0.5)
    axes.hist(held.units, bins=edges, color=COLOURS["muted"])
    axes.set_xlabel(f"{held.unit}s of a site")
    axes.set_title("sites of each size", color=COLOURS["ink"])


def _text(name: str | None) -> str:
    return cut(plain(name or "").replace("\n", " "), drawing.NAME)


def _page(figure: Figure, held: Holdings, facts: dict[str, str]) -> str:
    css = (Path(drawing.__file__).parent / "report.css").read_text(encoding="utf-8")
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(said)}</td></tr>" for name, said in facts.items())
    svg: Markup = drawing.to_svg(figure, "holdings", f"What each of {len(held.names)} sites holds, and their sizes")
    return PAGE.format(title="Who holds what", css=css, svg=svg, rows=rows)
