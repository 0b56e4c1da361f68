"""The commands `moonflower client ...`: parse, call, print. What needs Flower or torch is imported by the command."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from client.cli import ledger

_config = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("site.toml"),
    show_default=True,
    help="The site's site.toml.",
)
_device = click.option("--device", metavar="DEVICE", help="cuda:0, cpu or auto, instead of site.toml's device.")


@click.group()
def client() -> None:
    """Start and check a site's node; run it at the site.

    Example: moonflower client start --config site.toml
    """


client.add_command(ledger)


@client.command()
@_config
@_device
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True, help="One line an event."
)
@click.option("--insecure", is_flag=True, help="Plaintext without a key, to a coordinator on this machine only.")
def start(config: Path, device: str | None, log_format: str, insecure: bool) -> None:
    """Connect the site to its coordinator and answer what it asks, until SIGTERM.

    It reconnects by itself for as long as it takes. A second start on the same state folder is refused.

    Example: moonflower client start --config site.toml --device cuda:0
    """
    from client.node.node import Node
    from shared import logs

    style: logs.Format = "json" if log_format == "json" else "text"
    logs.setup(style)
    Node(config, device, style, insecure=insecure).run()


@client.command()
@_config
@click.option(
    "--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True, help="How to print."
)
def status(config: Path, style: str) -> None:
    """Show what the node does: its connection, the request it is at, its last answers and errors.

    Example: moonflower client status --config site.toml
    """
    from client import site as sites
    from client.node import status as statuses
    from client.node.node import connection
    from shared import locks

    state = connection(sites.load(config), config).state
    said = statuses.read(state)
    running = locks.holder(state / "node.lock") is not None
    if style == "json":
        click.echo(json.dumps(asdict(said) | {"running": running}, indent=1))
    else:
        click.echo("\n".join(statuses.lines(said, running)))
    if not running:
        sys.exit(1)


@client.command()
@_config
@_device
@click.option(
    "--run", type=click.Path(path_type=Path, dir_okay=False), help="A run's configuration, whose model and task to try."
)
@click.option("--insecure", is_flag=True, help="The node is to be started with --insecure.")
@click.pass_context
def check(ctx: click.Context, config: Path, device: str | None, run: Path | None, insecure: bool) -> None:
    """Check before a start: coordinator, clock, key, data, budget, model, memory; each line ok, or what to do.

    Example: moonflower client check --config site.toml --run run.toml
    """
    from client import site as sites
    from client.node.check import check as examine
    from client.node.check import render

    findings = examine(sites.load(config, device), config, run, insecure=insecure)
    click.echo(render(findings))
    if not all(finding.ok for finding in findings):
        ctx.exit(1)


@client.command()
@_config
def policy(config: Path) -> None:
    """Print what the site allows, in words.

    Example: moonflower client policy --config site.toml
    """
    from client import site as sites
    from client.node.limits import describe

    click.echo("\n".join(describe(sites.load(config))))
