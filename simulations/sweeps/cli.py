"""The command `moonflower sweep`: parse, check every cell, play, print."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from rich.console import Console

from shared import __version__, locks
from shared.errors import ConfigError, MoonflowerError
from shared.paths import default_database
from simulations.cli import keep_quiet, make_home, stop_cleanly_on_sigterm

if TYPE_CHECKING:
    from server.history.records import Sweep
    from server.history.store import History
    from simulations.sweeps.plan import Place, Plan
    from simulations.sweeps.results import Results


class SweepFailedError(MoonflowerError):
    """Some of a sweep's runs failed; the others are done."""


@click.command()
@click.argument("scenario", required=False)
@click.option(
    "--grid",
    metavar="KEY=V1,V2,...",
    multiple=True,
    help="A setting and its values. Can be given again: every combination is a cell.",
)
@click.option(
    "--seeds", metavar="N|S1,S2,...", help="How many seeds a cell is run with, from the scenario's on; or which."
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a setting in every cell, as in simulate."
)
@click.option("--device", metavar="DEVICE", help="cuda:0, cpu or auto (the default), for coordinator and sites.")
@click.option(
    "--jobs",
    metavar="N",
    type=click.IntRange(min=1),
    help="Runs at once, each a process with its share of the cores; by default one a core, where memory allows 3 GB each.",
)
@click.option(
    "--metric",
    metavar="NAME",
    help="The score to compare by, of the public test set; validation/NAME is of the sites' released counts. "
    "By default the task's most telling.",
)
@click.option(
    "--out",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Write the table as sweep.json and sweep.csv, and plots as PNG, into this folder.",
)
@click.option(
    "--resume", metavar="SWEEP", help="Go on with a sweep; `last` is the newest. The same command does so too."
)
@click.option(
    "--database",
    metavar="URL",
    default=default_database,
    help="Where the history goes: sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME. "
    "By default $MOONFLOWER_DATABASE, else history.db in Moonflower's home.",
)
@click.option("--quiet", is_flag=True, help="Print the sweep's id alone.")
@click.option(
    "--format", "style", type=click.Choice(["table", "json"]), default="table", show_default=True, help="How to print."
)
def sweep(
    scenario: str | None,
    grid: tuple[str, ...],
    seeds: str | None,
    settings: tuple[str, ...],
    device: str | None,
    jobs: int | None,
    metric: str | None,
    out: Path | None,
    resume: str | None,
    database: str,
    quiet: bool,
    style: Literal["table", "json"],
) -> None:
    """Simulate a scenario under many settings and seeds, side by side, and compare what they come to.

    SCENARIO is a built-in scenario or a TOML file, as in simulate. Each cell of the grid is run with each seed; every run
    is an ordinary one, and is charged in full at its sites. A sweep that was stopped or killed goes on where it was when the same
    command is given again: what is done is not run again. Its runs are a study, for which no privacy is stated.

    Example: moonflower sweep vader-probe --grid privacy.epsilon=1,3,8 --grid training.rounds=15,30 --seeds 3
    """
    if resume is not None and (scenario or grid or seeds or settings or device):
        raise ConfigError(
            "--resume goes on with the sweep's own plan; leave out the scenario and its settings, or make a new sweep."
        )
    if resume is None and scenario is None:
        raise ConfigError(
            "name a scenario, as in `moonflower sweep vader-probe --grid privacy.epsilon=1,8`, or give --resume."
        )
    keep_quiet()
    from server.cli import find_sweep
    from server.history.engine import is_memory, masked, parse_url
    from server.history.store import History
    from simulations.sweeps import places, playing, plots, results, showing
    from simulations.sweeps.plan import Plan

    stop_cleanly_on_sigterm()
    if is_memory(parse_url(database)):
        raise ConfigError(
            f"--database {database}: a database in memory ends with the process; name a file or a server."
        )
    plan = Plan.make(scenario, settings, grid, seeds, device) if scenario is not None else None
    make_home()
    _make_out(out)
    console = Console(stderr=style == "json", quiet=quiet)
    with History.open(database) as history:
        if plan is not None:
            found = _enter(history, plan)
        else:
            found = find_sweep(history, resume or "last")
            plan = Plan.from_dict(found.plan)
            plan.check_unchanged()
        folder = places.folder(found.id)
        folder.mkdir(parents=True, exist_ok=True)
        with locks.hold(folder / "sweep.lock", f"sweep {found.id}"):
            left = len(plan.places) - len(playing.completed(history, found.id))
            at_once = places.jobs(left, plan.device, jobs)
            failed = _play(history, found.id, plan, at_once, console, resume_with=_again(found.id, database))
        made = results.read(history, found.id, plan, metric, failed)
        shown = masked(parse_url(database))
        if out is not None:
            written = [*showing.write(made, shown, out), *plots.write(made, out)]
        if style == "json":
            click.echo(json.dumps(showing.as_dict(made, shown)))
        elif quiet:
            click.echo(found.id)
        else:
            showing.print_table(made, console)
            if out is not None:
                console.print(f"Wrote {', '.join(map(str, written))}.", highlight=False, soft_wrap=True)
            console.print(f"Runs: moonflower history runs --sweep {found.id}", highlight=False, soft_wrap=True)
    _check_all(made, _again(found.id, database))


def _enter(history: "History", plan: "Plan") -> "Sweep":
    """Enter a plan, or find the sweep that it was entered as."""
    name = plan.of(plan.cells[0], plan.seeds[0]).name
    return history.create_sweep(f"{name}-{plan.digest[:8]}", name=name, plan=plan.as_dict(), version=__version__)


def _make_out(out: Path | None) -> None:
    """Make the folder before any work."""
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made: {error.strerror}; name another folder.") from None


def _play(
    history: "History", sweep_id: str, plan: "Plan", jobs: int, console: Console, *, resume_with: str
) -> "dict[Place, str]":
    """Play what is left, with progress on the console; give the runs that failed, and why."""
    from simulations.sweeps.playing import Sweeping
    from simulations.sweeps.watching import Watching

    sweeping = Sweeping(sweep_id, plan, history, jobs)
    watching = Watching(console, history, sweep_id, plan, sweeping)
    try:
        with watching:
            sweeping.play(watching.ended, watching.look)
    except KeyboardInterrupt:
        click.echo(f"Interrupted: {watching.counted()}. Go on with: {resume_with}", err=True)
        click.get_current_context().exit(130)
    return sweeping.failed


def _again(sweep_id: str, database: str) -> str:
    from server.history.engine import masked, parse_url

    where = [] if database == default_database() else ["--database", masked(parse_url(database))]
    return shlex.join(["moonflower", "sweep", "--resume", sweep_id, *where])


def _check_all(made: "Results", resume_with: str) -> None:
    failed = sum(trial.status != "completed" for row in made.rows for trial in row.trials)
    if failed:
        raise SweepFailedError(
            f"{failed} of {len(made.plan.places)} runs failed, as said above; mend what can be and try them again with: {resume_with}"
        )
