"""The commands `moonflower predict` and `moonflower explain`: parse, ask an exported model, print.

torch is imported by the command that needs it, so that `--help` stays quick.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import click

from server.listing import Format, Row, show
from shared.errors import ConfigError

SHOWN = 60  # characters of a cell

_base = click.option(
    "--base", metavar="DIR|NAME", help="Of an adapter: its base model, where that has no name on the Hub."
)
_out = click.option(
    "--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Write to a new file."
)


def _columns(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    wrong = next((each for each in given if not all(each.partition("="))), None)
    if wrong is not None:
        raise click.BadParameter(f"{wrong!r} must be ROLE=NAME, as in text=review.")
    return dict(each.split("=", 1) for each in given)


@click.command()
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("file", metavar="FILE")
@click.option(
    "--column", "columns", metavar="ROLE=NAME", multiple=True, callback=_columns, help="What the file calls a column."
)
@click.option(
    "--batch", metavar="N", type=click.IntRange(1, 4096), default=16, show_default=True, help="Records at once."
)
@click.option("--scores", is_flag=True, help="Of a classifier: each label's probability as well.")
@click.option("--thresholds", is_flag=True, help="Decide by the thresholds that the card names, not at one half.")
@click.option(
    "--tokens",
    metavar="N",
    type=click.IntRange(1, 8192),
    default=64,
    show_default=True,
    help="Of a model that writes: at most so many.",
)
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="How to print.",
)
@_out
@_base
def predict(
    model: Path,
    file: str,
    columns: dict[str, str],
    batch: int,
    scores: bool,
    thresholds: bool,
    tokens: int,
    style: Format,
    out: Path | None,
    base: str | None,
) -> None:
    """Ask an exported model about records.

    MODEL is a folder that `moonflower export` wrote. FILE holds records in columns (.csv, .jsonl, .parquet), texts (.txt, one
    a line), or is a folder of images or clips of sound, or one of them; `-` is standard input: JSON objects or texts.

    Example: moonflower predict model reviews.csv --column text=review --format csv
    """
    from server.export import manifest
    from server.export.use import reading

    _check_new(out)
    described = manifest.read(model)
    from server.export import kinds

    kind = kinds.of(described)
    rows = [] if kind is None else reading.rows(file, kind.plain, columns, sys.stdin)  # before the model is loaded
    from server.export.use import predicting

    opened = predicting.open_model(model, base)
    shown = predicting.columns(opened, scores)
    found: list[Row] = []
    with _progress(len(rows)) as advance:
        for some in predicting.predict(opened, rows, batch=batch, most_tokens=tokens, released=thresholds):
            found += some
            advance(len(some))
    title = f"{model.name or model}: {len(found)} record{'s' if len(found) != 1 else ''}"
    with _written(out):
        show([_cells(row, shown, style) for row in found], shown, style, title=title)


@click.command()
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("text", metavar="TEXT")
@click.option("--target", metavar="LABEL", help="For this label; by default, for the one that is predicted.")
@click.option(
    "--steps",
    metavar="N",
    type=click.IntRange(2, 10_000),
    default=64,
    show_default=True,
    help="From the empty text to this one: more make the gap smaller.",
)
@click.option(
    "--format",
    "style",
    type=click.Choice(["colours", "json"]),
    default="colours",
    show_default=True,
    help="How to print.",
)
@click.option(
    "--out", metavar="FILE.html", type=click.Path(path_type=Path, dir_okay=False), help="Write a page to a new file."
)
@_base
def explain(
    model: Path, text: str, target: str | None, steps: int, style: str, out: Path | None, base: str | None
) -> None:
    """Show which words of a text speak for a label, by integrated gradients.

    MODEL is a folder of a text classifier that `moonflower export` wrote; TEXT is the text itself, or `-` for standard input.

    Example: moonflower explain model "A film that is dull, and never funny." --out why.html
    """
    from rich.console import Console

    _check_new(out)
    from server.export.use import explaining, heat

    given = sys.stdin.read() if text == "-" else text
    found = explaining.explain(model, given, target=target, steps=steps, base=base)
    if out is not None:
        out.write_text(heat.page(found, model.name), encoding="utf-8")
    if style == "json":
        click.echo(heat.as_json(found))
        return
    heat.show(found, Console(file=sys.stdout, soft_wrap=True))
    for line in heat.summary(found):
        click.echo(line)
    if out is not None:
        click.echo(f"Wrote {out}.")


def _cells(row: Row, columns: list[str], style: Format) -> Row:
    """Fit values into cells: lists as JSON, and short in a table."""
    if style == "json":
        return row
    cells = {
        name: json.dumps(row[name], ensure_ascii=False) if isinstance(row[name], list) else row[name]
        for name in columns
    }
    if style == "table":
        cells = {name: _short(value) for name, value in cells.items()}
    return cells


def _short(value: Any) -> Any:
    return f"{value[: SHOWN - 1]}…" if isinstance(value, str) and len(value) > SHOWN else value


def _check_new(out: Path | None) -> None:
    if out is None:
        return
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out {out} exists; name a new file, nothing is replaced.")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it, or write elsewhere.")


@contextmanager
def _written(out: Path | None) -> Iterator[None]:
    if out is None:
        yield
        return
    with out.open("w", encoding="utf-8", newline="") as file, redirect_stdout(file):
        yield


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """Show a bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("records", total=total)
        yield lambda count: bar.advance(task, count)
