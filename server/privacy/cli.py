"""The commands `moonflower privacy ...`: parse, ask, print. Each imports what it needs when it runs."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from server.listing import show
from shared.errors import ConfigError, MoonflowerError
from shared.paths import default_database

if TYPE_CHECKING:
    from server.privacy.planning import Planned


class StatementError(MoonflowerError):
    """A statement was written, and is in doubt."""


@click.group()
def privacy() -> None:
    """Plan a run's privacy before it, and state what it guaranteed after it.

    Example: moonflower privacy plan --records 2000 --rounds 50 --batch 64 --epsilon 8
    """


@privacy.command()
@click.argument("scenario", metavar="[FILE]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--records",
    metavar="N",
    multiple=True,
    help="A site's declared size (persons, where they are the unit), or NAME=N; once each.",
)
@click.option("--rounds", metavar="N", type=click.IntRange(min=1), help="Rounds of training.")
@click.option("--local-steps", metavar="N", type=click.IntRange(min=1), help="Noised steps of a site in a round [1].")
@click.option("--batch", metavar="N", type=click.IntRange(min=1), help="Records a step, expected.")
@click.option("--rate", metavar="Q", type=float, help="Share of its training records that a site draws in a step.")
@click.option("--epsilon", metavar="E", type=float, help="The run's promise to each record [8].")
@click.option("--delta", metavar="D", type=float, help="By default a power of ten, at most 1/(10 x records) and 1e-5.")
@click.option("--validation", metavar="SHARE", type=float, help="Share of the records kept for validation [0.1].")
@click.option("--evaluate-every", metavar="N", type=click.IntRange(min=1), help="Rounds between evaluations [1].")
@click.option(
    "--max-epsilon", metavar="E", type=float, help="A dataset's lifetime limit: what would the run take of it?"
)
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw it too, as .svg or .png.")
@click.option(
    "--format", "style", type=click.Choice(["table", "json"]), default="table", show_default=True, help="How to print."
)
def plan(scenario: Path | None, style: str, plot: Path | None, **given: Any) -> None:
    """Plan a run's privacy: the noise each site needs, epsilon by rounds, and what another epsilon would cost.

    FILE is a scenario or a run's configuration in TOML; options go on top of it. Without one, the options
    describe a run of one phase. Nothing is trained and no data are read.

    Example: moonflower privacy plan --records north=2500 --records south=4000 --rounds 50 --batch 64 --epsilon 8
    """
    from server.privacy import plan_request, planning

    if plot is not None:
        _check_plot(plot)  # before any work
    request = plan_request.read(scenario, plan_request.Options(**given))
    planned = planning.make(request)
    if style == "json":
        click.echo(planning.as_json(planned))
    else:
        _print_plan(planned)
    if plot is not None:
        from server.privacy import plan_plot

        plan_plot.write(planning.curve(request, planned.site), planned, plot)
        click.echo(f"Wrote {plot}.", err=style == "json")


@privacy.command()
@click.argument("run_id", metavar="RUN")
@click.option(
    "--verify",
    "ledgers",
    metavar="FILE",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Hold it against a site's ledger, as `moonflower ledger export` wrote it; once for each site.",
)
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "json", "html"]),
    default="text",
    show_default=True,
    help="How to write.",
)
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path), help="Write to this file; by default, print.")
@click.option(
    "--database",
    metavar="URL",
    default=default_database,
    help="The history's database; by default $MOONFLOWER_DATABASE, else history.db in Moonflower's home.",
)
def statement(run_id: str, ledgers: tuple[Path, ...], style: str, out: Path | None, database: str) -> None:
    """State what a run guarantees to each record, or person, from the releases that the history has recorded.

    RUN is a run's id, a beginning of it that fits no other run, or `last`. A run that is not finished is stated
    so far; one of a sweep is a study and is not stated. The exit code is 1 where the statement is in doubt: what the sites reported, or their ledgers hold, is
    not what was recorded.

    Example: moonflower privacy statement last --verify notes-2026.json --format html --out statement.html
    """
    from server.cli import find_run
    from server.history.store import History
    from server.privacy import export, statement_page, verify
    from server.privacy import statement as stating
    from server.report import output

    if out is not None:
        output.check(out)  # before any work
    exports = [export.load(path) for path in ledgers]
    with History.open(database, create=False) as history:
        run = find_run(history, run_id)
        stating.check_no_study(history, run)
        recorded = stating.read(history, run)
    made = stating.make(recorded, now=datetime.now(UTC))
    if exports:
        made = verify.verify(made, recorded, exports)
    writers = {"text": statement_page.as_text, "json": statement_page.as_json, "html": statement_page.as_page}
    text = writers[style](made)
    if out is None:
        click.echo(text)
    else:
        output.write(out, text + "\n")
        click.echo(f"Wrote {out}: run {made.run.id}. {statement_page.claim(made)}")
    if statement_page.verdict(made) == "in doubt":
        raise StatementError(f"The privacy statement of run {made.run.id} is in doubt; it says why.")


def _check_plot(path: Path) -> None:
    if path.suffix not in (".svg", ".png"):
        raise ConfigError(f"--plot {path} must end in .svg or .png.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: its folder does not exist; make it, or write elsewhere.")


def _print_plan(planned: "Planned") -> None:
    promise = f"epsilon {planned.epsilon:g} at delta {planned.delta:g}"
    _table(planned.sites, f"Noise for {promise} over {planned.rounds} rounds")
    click.echo()
    _table(planned.reached, f"Epsilon by rounds, at site {planned.site}")
    click.echo()
    _table(planned.trades, f"What another epsilon costs in noise, at site {planned.site}, phase {planned.phase}")
    if planned.lifetime:
        click.echo()
        _table(
            planned.lifetime, "Share of the dataset's lifetime limit that the run takes, by the ledger's Rényi filter"
        )
    for remark in planned.remarks:
        click.echo(f"\n{remark}")


def _table(rows: Sequence[Any], title: str) -> None:
    show([asdict(row) for row in rows], [field.name for field in fields(rows[0])], "table", title=title)
