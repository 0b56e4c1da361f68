"""Print rows as a table for people, or as JSON or CSV for programs.

A table fits the terminal; anything that is not a terminal gets every column whole. JSON is one array of
objects and strict: an infinite or undefined number is the string "Infinity" or "NaN", as in the CSV.
"""

import csv
import json
import math
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

import click

Format = Literal["table", "json", "csv"]
Row = dict[str, Any]
WIDE = 100_000  # columns, where no terminal sets a limit


def show(rows: Sequence[Row], columns: Sequence[str], style: Format, *, title: str, note: str = "") -> None:
    """Print rows to standard output.

    Parameters
    ----------
    rows : sequence of dict
        The values, by column.
    columns : sequence of str
        Which of them to print, in order.
    style : {"table", "json", "csv"}
        How to print.
    title : str
        One line above a table.
    note : str
        What the reader should know about the rows (that some are left out); below a table, and on
        standard error otherwise.
    """
    if style == "json":
        lines = ",\n".join(json.dumps({name: _plain(row[name]) for name in columns}) for row in rows)
        click.echo(f"[{lines}]")
    elif style == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_plain(row[name]) for name in columns] for row in rows)
    else:
        click.echo(clean(title))
        if rows:
            _table(rows, columns)
        else:
            click.echo("Nothing to show.")
    if note:
        click.echo(note, err=style != "table")


def clean(text: str) -> str:
    """Replace what is not printable: a site's message must not steer the reader's terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        numbers = all(isinstance(row[name], int | float | None) for row in rows)
        table.add_column(name.replace("_", " "), no_wrap=not terminal, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(Text(clean(_text(row[name]))) for name in columns))
    Console(file=sys.stdout, width=None if terminal else WIDE).print(table)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value.isoformat() if isinstance(value, datetime) else value


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}Z"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
