"""The command `moonflower partition`: who holds what in a scenario, before anything is run."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import numpy.typing as npt

    from simulations.holdings import Holdings

ROWS = 12  # sites that are shown one by one
CELLS = 6  # values that are shown with their numbers


@click.command()
@click.argument("scenario", default="vader")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a setting; KEY= takes it out. Can be given again.",
)
@click.option("--by", metavar="COLUMN", help="What to count at each site; by default the label.")
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw it too, as .png, .svg or .html.")
@click.option(
    "--format", "style", type=click.Choice(["table", "json"]), default="table", show_default=True, help="How to print."
)
def partition(
    scenario: str, settings: tuple[str, ...], by: str | None, plot: Path | None, style: Literal["table", "json"]
) -> None:
    """Show who holds what: sizes and labels of a scenario's sites, before anything is run.

    SCENARIO is a built-in scenario or a TOML file. Its sites are those that it names, or those that its [partition] makes
    of a pool. Nothing is trained, and nothing is written but the plot.

    Example: moonflower partition vader-many --set partition.alpha=0.1 --plot sites.png
    """
    from simulations import holdings
    from simulations import scenario as scenarios

    if plot is not None:
        from simulations import holdings_plot

        holdings_plot.check(plot)  # before any work
    held = holdings.of(scenarios.load(scenario, dict(scenarios.override(text) for text in settings)), by)
    if style == "json":
        click.echo(json.dumps(_as_json(held)))
    else:
        console = Console()
        console.print(_summary(held))
        if len(held.names) <= ROWS:
            console.print(_table(held))
    if plot is not None:
        holdings_plot.write(held, facts(held), plot)
        click.echo(f"Wrote {plot}.", err=style == "json")


def facts(held: "Holdings") -> dict[str, str]:
    """Say in a few lines how sites differ."""
    said = {
        "sites": f"{len(held.names):,}",
        "records": f"{int(held.records.sum()):,}" + (f", and {held.left_out:,} at no site" if held.left_out else ""),
        f"{held.unit}s of a site": _range(held.units),
        "declared sizes": f"{len(set(held.declared.tolist())):,} different",
    }
    if held.values:
        said[f"{held.column} values"] = f"{len(held.values):,}"
        said[f"{held.column} values of a site"] = _range(held.kinds)
        said["total variation from all sites'"] = _range(held.variation, 2)
    return said


def _range(numbers: "npt.NDArray[Any]", digits: int = 0) -> str:
    import numpy as np

    low, middle, high = (f"{value:,.{digits}f}" for value in np.quantile(numbers, (0, 0.5, 1)))
    return f"{low} to {high}, median {middle}"


def _summary(held: "Holdings") -> Table:
    table = Table(show_header=False)
    for name, said in facts(held).items():
        table.add_row(Text(name), Text(said))
    return table


def _table(held: "Holdings") -> Table:
    from server.report.words import cut, plain

    table = Table()
    shown = held.values[:CELLS]
    for name in ("site", f"{held.unit}s", "declared", *shown, *(["others"] if len(held.values) > CELLS else [])):
        table.add_column(Text(cut(plain(name), 16)), justify="left" if name == "site" else "right")
    for site, name in enumerate(held.names):
        counts = [
            *held.counts[site, : len(shown)],
            *([held.counts[site, CELLS:].sum()] if len(held.values) > CELLS else []),
        ]
        table.add_row(name, f"{held.units[site]:,}", f"{held.declared[site]:,}", *(f"{count:,}" for count in counts))
    return table


def _as_json(held: "Holdings") -> dict[str, Any]:
    return {
        "unit": held.unit,
        "left_out": held.left_out,
        "column": held.column,
        "values": list(held.values),
        "sites": [
            {
                "name": name,
                f"{held.unit}s": int(held.units[site]),
                "declared": int(held.declared[site]),
                "records": int(held.records[site]),
                "counts": held.counts[site].tolist() if held.values else [],
                "total_variation": round(float(held.variation[site]), 6),
            }
            for site, name in enumerate(held.names)
        ],
    }
