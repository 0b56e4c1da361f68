"""The commands `moonflower history` and `moonflower database`: parse, ask the history, print.

The history and its database driver are imported by the command that needs them, so that `--help` stays
quick.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

import click

from server.history.records import Metric, Participation, Round, Run, Spend, Sweep
from server.listing import Format, Row, show
from shared.errors import NotFoundError
from shared.paths import default_database

if TYPE_CHECKING:
    from server.history.store import History

Command = Callable[..., None]
NEWEST = 100  # rows, unless --limit says otherwise
LONG_COLUMNS = ("ledger_id", "ledger_head")  # not in a table
NO_PRIVACY = "∞ (no privacy)"
SHOWN_OF_RUN = ["run", "name", "status", "rounds_done", "rounds_planned", "privacy", "created_at", "finished_at"]
RUN_COLUMNS = [
    *SHOWN_OF_RUN,
    *("private", "version", "config_digest", "origin", "submitted_by", "stop_requested_at"),  # not in a table
    *("sweep", "cell"),
]
SWEEP_COLUMNS = ["sweep", "name", "runs", "completed", "created_at", "version"]
ROUND_COLUMNS = [
    *("round", "attempt", "phase", "started_at", "seconds", "simulated_seconds"),
    *("checkpoint", "bytes", "bytes_up", "bytes_down"),
]

_database = click.option(
    "--database",
    metavar="URL",
    default=default_database,
    help="The history's database; by default $MOONFLOWER_DATABASE, else history.db in Moonflower's home.",
)
_format = click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="How to print.",
)
_limit = click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(min=0),
    default=NEWEST,
    show_default=True,
    help="Show the newest N rows; 0 shows all.",
)
_site = click.option("--site", help="Only this site.")
_round = click.option("--round", "round_number", metavar="N", type=click.IntRange(min=1), help="Only this round.")
_run = click.argument("run_id", metavar="RUN")


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    every: list[Callable[[Command], Command]] = [*options, _limit, _format, _database]

    def decorate(command: Command) -> Command:
        for option in reversed(every):
            command = option(command)
        return command

    return decorate


@click.group()
def history() -> None:
    """Show what runs did: rounds, scores, who took part, and privacy spent.

    RUN is a run's id, a beginning of it that fits no other run, or `last`.

    Example: moonflower history rounds last
    """


@history.command()
@_options(click.option("--sweep", metavar="SWEEP", help="Only this sweep's: its id, a beginning of it, or `last`."))
def runs(sweep: str | None, database: str, style: Format, limit: int) -> None:
    """List the runs, newest first.

    Example: moonflower history runs --limit 5
    """
    with _open(database) as store:
        if sweep is None:
            found, title = store.runs(limit=_one_more(limit)), "Runs, newest first"
        else:
            asked = find_sweep(store, sweep).id
            found, title = store.trials(asked, limit=_one_more(limit)), f"Runs of sweep {asked}, newest first"
    rows = [_run_row(run) for run in found]
    shown = {"table": [*SHOWN_OF_RUN, *(("cell",) if sweep else ())]}.get(style, RUN_COLUMNS)
    kept = rows[:limit] if limit else rows
    show(kept, shown, style, title=title, note=_note(rows, limit))


@history.command()
@_options()
def sweeps(database: str, style: Format, limit: int) -> None:
    """List the sweeps, newest first, and how many runs of each have been completed.

    Example: moonflower history sweeps
    """
    with _open(database) as store:
        found = store.sweeps(limit=_one_more(limit))
        rows = [{"sweep": each.id, **vars(each), **_counted(store.trials(each.id))} for each in found]
    kept = rows[:limit] if limit else rows
    show(kept, SWEEP_COLUMNS, style, title="Sweeps, newest first", note=_note(rows, limit))


@history.command()
@_options(_run, _round)
def rounds(run_id: str, round_number: int | None, database: str, style: Format, limit: int) -> None:
    """List a run's committed rounds and their checkpoints.

    `bytes` is the checkpoint's size; `bytes_up` came from the sites in the round, and `bytes_down` went to them.

    Example: moonflower history rounds last --format csv
    """
    with _open(database) as store:
        run = find_run(store, run_id)
        found = store.rounds(run.id, round_number=round_number, limit=_one_more(limit))
        moved = store.traffic(run.id)
    rows = [{"round": each.number, **vars(each), **_checkpoint(each), **_moved(moved, each)} for each in found]
    timed = style != "table" or any(each.simulated_seconds is not None for each in found)
    columns = [name for name in ROUND_COLUMNS if timed or name != "simulated_seconds"]
    _print(run, "rounds", columns, rows, style, limit)


@history.command()
@_options(_run, _site, _round)
def metrics(**asked: Any) -> None:
    """List a run's scores: on the public test set, and of what sites released.

    Example: moonflower history metrics last --round 20
    """
    _print_parts("metrics", Metric, "scores", **asked)


@history.command()
@_options(_run, _site, _round)
def participations(**asked: Any) -> None:
    """List who took part in a run's rounds, and who did not and why.

    Example: moonflower history participations last --site st-marys
    """
    _print_parts("participations", Participation, "participations", **asked)


@history.command()
@_options(_run, _site, _round)
def spends(**asked: Any) -> None:
    """List the privacy that each site had spent after each round, as it reported.

    `epsilon` is the run's so far at that site, not the round's own.

    Example: moonflower history spends last --round 20
    """
    _print_parts("spends", Spend, "privacy spent", **asked)


@history.command()
@_options(_run)
def events(run_id: str, database: str, style: Format, limit: int) -> None:
    """List what happened to a run: attempts, refusals, resumes.

    Example: moonflower history events last
    """
    with _open(database) as store:
        run = find_run(store, run_id)
        found = store.events(run.id, limit=_one_more(limit))
    _print(run, "events", ["at", "level", "text"], [dict(vars(each)) for each in found], style, limit)


@click.group()
def database() -> None:
    """Look after the history's database.

    Example: moonflower database status
    """


@database.command()
@_database
def upgrade(database: str) -> None:
    """Bring the database to this version's schema; make it if it is missing. Back it up first.

    Example: moonflower database upgrade --database postgresql://moonflower@db.example.org/history
    """
    from server.history import schema

    before = schema.status(database)
    schema.upgrade(database)
    after = schema.status(database)
    if before.revision == after.revision:
        click.echo(f"{after.place}: already at revision {after.revision}.")
    else:
        click.echo(f"{after.place}: upgraded from {before.revision or 'nothing'} to revision {after.revision}.")


@database.command()
@_format
@_database
def status(database: str, style: Format) -> None:
    """Say which schema the database has, and whether this version can use it.

    Example: moonflower database status --format json
    """
    from server.history import schema

    found = schema.status(database)
    row = {"database": found.place, "state": found.state, "revision": found.revision, "newest": found.newest}
    show([row], list(row), style, title="Database")


def _open(database: str) -> "History":
    from server.history.store import History

    return History.open(database, create=False)


def find_run(store: "History", run_id: str) -> Run:
    """Give the run of this id, of a beginning of it, or the newest for `last`."""
    if run_id != "last":
        return store.run(run_id)
    newest = store.runs(limit=1)
    if not newest:
        raise NotFoundError("There is no run yet; `moonflower simulate` makes one.")
    return newest[0]


def find_sweep(store: "History", sweep: str) -> Sweep:
    """Give the sweep of this id, of a beginning of it, or the newest for `last`."""
    if sweep != "last":
        return store.sweep(sweep)
    newest = store.sweeps(limit=1)
    if not newest:
        raise NotFoundError("There is no sweep yet; `moonflower sweep` makes one.")
    return newest[0]


def _one_more(limit: int) -> int | None:
    return limit + 1 if limit else None  # the one more tells that rows were left out


def _note(rows: Sequence[Row], limit: int) -> str:
    left_out = limit and len(rows) > limit
    return f"These are the newest {limit} rows; --limit 0 shows all." if left_out else ""


def _run_row(run: Run) -> Row:
    trial = {"sweep": run.trial and run.trial.sweep, "cell": run.trial and run.trial.cell}
    return {**vars(run), **trial, "run": run.id, "privacy": "differential" if run.private else NO_PRIVACY}


def _counted(runs: Sequence[Run]) -> Row:
    return {"runs": len(runs), "completed": sum(run.status == "completed" for run in runs)}


def _print_parts(
    reader: Literal["metrics", "participations", "spends"],
    record: type[Metric] | type[Participation] | type[Spend],
    what: str,
    *,
    run_id: str,
    site: str | None,
    round_number: int | None,
    database: str,
    style: Format,
    limit: int,
) -> None:
    with _open(database) as store:
        run = find_run(store, run_id)
        read: Callable[..., list[tuple[int, object]]] = getattr(store, reader)
        found = read(run.id, site=site, round_number=round_number, limit=_one_more(limit))
    left_out: tuple[str, ...] = LONG_COLUMNS if style == "table" else ()
    if style == "table" and all(getattr(value, "asked", None) is None for _, value in found):
        left_out = (*left_out, "asked")
    columns = ["round", *(field.name for field in fields(record) if field.name not in left_out)]
    _print(run, what, columns, [{"round": number, **vars(each)} for number, each in found], style, limit)


def _checkpoint(round: Round) -> Row:
    return {"checkpoint": round.checkpoint.digest, "bytes": round.checkpoint.bytes}


def _moved(traffic: dict[int, tuple[int, int]], round: Round) -> Row:
    up, down = traffic.get(round.number, (0, 0))
    return {"bytes_up": up, "bytes_down": down}


def _print(run: Run, what: str, columns: list[str], rows: list[Row], style: Format, limit: int) -> None:
    kept = rows[-limit:] if limit else rows
    if style == "table":
        for row in kept:
            row |= {name: NO_PRIVACY for name in ("epsilon", "budget") if row.get(name) == math.inf}
    else:
        columns = ["run", "private", *columns]
        kept = [{**row, "run": run.id, "private": run.private} for row in kept]
    privacy = "with differential privacy" if run.private else f"epsilon {NO_PRIVACY}"
    title = f"Run {run.id} ({run.name}), {privacy}: {what}"
    show(kept, columns, style, title=title, note=_note(rows, limit))
