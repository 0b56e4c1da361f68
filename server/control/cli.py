"""The commands `moonflower run` and `moonflower site`: parse, ask a coordinator, print.

gRPC is imported by the command that needs it, so that `--help` stays quick.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from server.listing import Format, Row, clean, show
from shared.errors import ConfigError

if TYPE_CHECKING:
    from server.control.client import Client

Command = Callable[..., None]
RUNS = [
    *("id", "name", "status", "rounds_done", "rounds_planned", "private", "created_at", "finished_at", "submitted_by"),
    *("stop_requested_at", "config_digest", "version"),  # not in a table
]
SITES = [
    *("name", "state", "online", "last_seen_at", "enrolled_at", "revoked_at"),
    *("node_id", "public_key"),  # not in a table
]
PARTS = {  # of GetRun's answer -> columns of a table
    "spends": ["site", "dataset", "part", "epsilon", "budget", "delta"],
    "metrics": ["scope", "site", "name", "value", "low", "high"],
    "participations": ["site", "kind", "outcome", "seconds", "error"],
    "attempts": ["number", "engine", "started_at", "ended_at", "outcome", "error"],
    "events": ["at", "level", "text"],
}

_run = click.argument("run_id", metavar="RUN")


def _options(*others: Callable[[Command], Command], csv: bool = False) -> Callable[[Command], Command]:
    every: list[Callable[[Command], Command]] = [
        *others,
        click.option(
            "--server",
            metavar="NAME|HOST:PORT",
            help="A server of servers.toml, or an address; by default $MOONFLOWER_SERVER, else the file's default.",
        ),
        click.option(
            "--ca",
            type=click.Path(path_type=Path, dir_okay=False),
            help="The federation's authority, PEM; by default $MOONFLOWER_CA, else the profile's.",
        ),
        click.option(
            "--token-file",
            type=click.Path(path_type=Path, dir_okay=False),
            help="The file of your token; by default the one in $MOONFLOWER_TOKEN, else the profile's file.",
        ),
        click.option("--insecure", is_flag=True, help="Plaintext, to a server of this machine started so."),
        click.option(
            "--format",
            "style",
            type=click.Choice(["table", "json", "csv"] if csv else ["table", "json"]),
            default="table",
            show_default=True,
            help="How to print.",
        ),
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(every):
            command = option(command)
        return command

    return decorate


def _client(server: str | None, ca: Path | None, token_file: Path | None, insecure: bool) -> "Client":
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what gRPC says of a failed connection is said once, as an error
    from server.control import target
    from server.control.client import Client

    return Client(target.find(server, ca, token_file, insecure=insecure))


@click.group()
def run() -> None:
    """Submit runs to a coordinator, watch, stop and export them.

    RUN is a run's id, a beginning of it that fits no other run, or `last`. Which coordinator: --server, or
    $MOONFLOWER_SERVER, or the servers.toml of your kit.

    Example: moonflower run submit run.toml --test-set test.jsonl
    """


@run.command()
@click.argument("config", metavar="RUN.TOML", type=click.Path(path_type=Path, dir_okay=False))
@_options(
    click.option(
        "--test-set",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Public test records, JSON lines with the task's columns, which the coordinator scores each round.",
    )
)
def submit(config: Path, test_set: Path | None, style: Format, **where: Any) -> None:
    """Put a run into the coordinator's queue, once, even where the connection breaks.

    Example: moonflower run submit run.toml --test-set test.jsonl
    """
    text = _read(config).decode("utf-8-sig", errors="replace")
    if test_set is not None and test_set.suffix.lower() in (".csv", ".parquet", ".arrow"):
        raise ConfigError(
            f"--test-set={str(test_set)!r} is no JSON lines; write it so, a row an object with the task's columns."
        )
    records = None if test_set is None else _read(test_set)
    with _client(**where) as client:
        submitted = client.submit(text, records)
    if style == "json":
        _json(_row(submitted))
        return
    click.echo(clean(f"{submitted.id}: {submitted.rounds_planned} rounds, {_status(submitted)}."))
    click.echo(clean(f"Next: moonflower run watch {submitted.id}"))


@run.command(name="list")
@_options(
    click.option(
        "--limit",
        metavar="N",
        type=click.IntRange(min=0),
        default=100,
        show_default=True,
        help="Show the newest N runs; 0 shows all.",
    ),
    csv=True,
)
def list_runs(limit: int, style: Format, **where: Any) -> None:
    """List the coordinator's runs, newest first.

    Example: moonflower run list --format json
    """
    from server.control import coordinator_pb2 as pb

    with _client(**where) as client:
        found = client.call("ListRuns", pb.ListRunsRequest(limit=limit)).runs
    shown = RUNS[:-3] if style == "table" else RUNS
    show([_row(each) for each in found], shown, style, title="Runs, newest first")


@run.command(name="show")
@_run
@_options()
def show_run(run_id: str, style: Format, **where: Any) -> None:
    """Show a run: its scores and each site's privacy after the last round, its attempts and what happened.

    Example: moonflower run show last
    """
    from server.control import coordinator_pb2 as pb
    from server.control.watching import summary

    with _client(**where) as client:
        answer = client.call("GetRun", pb.GetRunRequest(run=run_id))
    parts = {name: [_row(each) for each in getattr(answer, name)] for name in PARTS}
    if style == "json":
        _json({**_row(answer.run), "config": json.loads(answer.config_json), **parts})
        return
    click.echo(summary(answer.run))
    if answer.run.submitted_by:
        by = f"submitted by {answer.run.submitted_by}, {answer.run.created_at.ToDatetime():%Y-%m-%d %H:%M}Z"
        click.echo(clean(by))
    for name, rows in parts.items():
        if rows:
            click.echo()
            show(rows, PARTS[name], "table", title=name.capitalize())


@run.command()
@_run
@_options(
    click.option(
        "--after", metavar="ID", type=click.IntRange(min=0), default=0, help="Only what came after this event's id."
    )
)
@click.pass_context
def watch(ctx: click.Context, /, run_id: str, after: int, style: Format, **where: Any) -> None:
    """Follow a run until it ends: who trains, who is late, who refused and why. It reconnects by itself.

    The exit code is the run's outcome: 0 completed, 1 failed, 3 stopped. With --format json each event is a line.

    Example: moonflower run watch last
    """
    from server.control import watching

    with _client(**where) as client:
        ctx.exit(watching.watch(client.watch(run_id, after), style))


@run.command()
@_run
@_options()
def stop(run_id: str, style: Format, **where: Any) -> None:
    """Stop a run. What it has committed stays; a run that was stopped is not resumed.

    Example: moonflower run stop last
    """
    from server.control import coordinator_pb2 as pb

    with _client(**where) as client:
        asked = client.call("StopRun", pb.StopRunRequest(run=run_id)).run
    if style == "json":
        _json(_row(asked))
    else:
        click.echo(clean(f"{asked.id}: {_status(asked)}."))


@run.command()
@_run
@_options(
    click.option(
        "--out", required=True, type=click.Path(path_type=Path), help="The folder to make; it must not exist."
    ),
    click.option(
        "--form",
        type=click.Choice(["adapter", "merged"]),
        default="merged",
        show_default=True,
        help="A whole model, or what was trained alone.",
    ),
    click.option("--round", "number", metavar="N", type=click.IntRange(min=1), help="After this round, not the last."),
)
def export(
    run_id: str, out: Path, form: Literal["adapter", "merged"], number: int | None, style: Format, **where: Any
) -> None:
    """Fetch a run's model as a Hugging Face folder, with its card and privacy statement.

    Example: moonflower run export last --out model
    """
    from server.control import coordinator_pb2 as pb
    from server.control import receiving

    receiving.check(out)  # before any work
    request = pb.ExportModelRequest(run=run_id, form=form, round=number or 0)
    with _client(**where) as client:
        written = receiving.write(client.stream("ExportModel", request), out)
    if style == "json":
        _json({"out": str(out), "form": form, "files": written.files, "bytes": written.bytes, "sha256": written.sha256})
    else:
        click.echo(f"{out}: {len(written.files)} files, {written.bytes / 1e6:.1f} MB.")


@click.group()
def site() -> None:
    """List, enrol and revoke a coordinator's sites.

    Example: moonflower site list
    """


@site.command(name="list")
@_options(csv=True)
def list_sites(style: Format, **where: Any) -> None:
    """List the sites: enrolled or revoked, online or not, and when they were last seen.

    Example: moonflower site list
    """
    from server.control import coordinator_pb2 as pb

    with _client(**where) as client:
        found = client.call("ListSites", pb.ListSitesRequest()).sites
    show([_site_row(each) for each in found], SITES[:-2] if style == "table" else SITES, style, title="Sites")


@site.command()
@click.argument("name")
@click.argument("key", metavar="KEY.PUB", type=click.Path(path_type=Path, dir_okay=False))
@_options(click.option("--renew", is_flag=True, help="In place of the site's key, which is revoked for good."))
def enrol(name: str, key: Path, renew: bool, style: Format, **where: Any) -> None:
    """Let a site in that has the private part of this key: one line of OpenSSH, on EC P-384.

    Example: moonflower site enrol st-marys site.pub
    """
    from server.control import coordinator_pb2 as pb

    line = _read(key).decode(errors="replace").strip()
    with _client(**where) as client:
        request = pb.EnrolSiteRequest(site=name, public_key=line, renew=renew)
        enrolled = client.call("EnrolSite", request).site
    _print_site(enrolled, style)


@site.command()
@click.argument("name")
@_options(click.option("--yes", is_flag=True, help="Do not ask."))
def revoke(name: str, yes: bool, style: Format, **where: Any) -> None:
    """Shut a site out. It is final for its key; to let the site in again, enrol another one.

    Example: moonflower site revoke st-marys --yes
    """
    from server.control import coordinator_pb2 as pb

    if not yes:
        click.confirm(f"Revoke the key of {name} for good?", abort=True)
    with _client(**where) as client:
        revoked = client.call("RevokeSite", pb.RevokeSiteRequest(site=name)).site
    _print_site(revoked, style)


def _print_site(told: Any, style: Format) -> None:
    values = _site_row(told)
    if style == "json":
        _json(values)
    else:
        click.echo(clean(f"{values['name']}: {values['state']}."))


def _site_row(told: Any) -> Row:
    values = _row(told)
    return {**values, "state": "revoked" if told.revoked else "enrolled"}


def _row(told: Any) -> Row:
    from server.control.wire import row

    return row(told)


def _status(run: Any) -> str:
    from server.control.watching import status

    return status(run)


def _json(values: Row) -> None:
    from server.control.watching import as_json

    click.echo(as_json(values))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
