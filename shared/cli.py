"""The root command. Subcommands are loaded when they are used, so that `moonflower --help` is quick."""

import sys
from importlib import import_module

import click

from shared import __version__
from shared.errors import MoonflowerError, interrupted
from shared.interrupts import raise_dropped_interrupts

COMMANDS = {
    "simulate": "simulations.cli:simulate",
    "partition": "simulations.partition_cli:partition",
    "sweep": "simulations.sweeps.cli:sweep",
    "provision": "server.provision.cli:provision",
    "server": "server.daemon.cli:server",
    "client": "client.node.cli:client",
    "run": "server.control.cli:run",
    "site": "server.control.cli:site",
    "report": "server.report.cli:report",
    "export": "server.export.cli:export",
    "predict": "server.export.use.cli:predict",
    "explain": "server.export.use.cli:explain",
    "history": "server.cli:history",
    "database": "server.cli:database",
    "privacy": "server.privacy.cli:privacy",
    "ledger": "client.cli:ledger",
}
HELP = {
    "simulate": "Fine-tune across virtual sites on this machine.",
    "partition": "Show what each of a scenario's sites holds.",
    "sweep": "Simulate under many settings and seeds, and compare.",
    "provision": "Make the kits of a federation: certificates, keys, tokens, configuration.",
    "server": "Start and check the coordinator's daemon.",
    "client": "Start and check a site's node.",
    "run": "Submit runs to a coordinator, watch, stop and export them.",
    "site": "List, enrol and revoke a coordinator's sites.",
    "report": "Write a run's report, one HTML file.",
    "export": "Write a run's model as a Hugging Face folder, or as ONNX.",
    "predict": "Ask an exported model about records.",
    "explain": "Show which words of a text speak for a label.",
    "history": "Show what runs did: rounds, scores, who took part, and privacy spent.",
    "database": "Look after the history's database.",
    "privacy": "Plan a run's privacy, and state what a run guaranteed.",
    "ledger": "Show, verify and export a site's privacy account.",
}


class Lazy(click.Group):
    """A group that knows its commands' names and one-line help, and imports a command only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Names, in the order in which they are used."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, HELP[name]) for name in self.list_commands(ctx)])


@click.command(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="moonflower")
def root() -> None:
    """Fine-tune a pretrained Transformer across sites that may not share their data.

    Example: moonflower simulate --epsilon 8
    """


def main(command: click.Command = root) -> None:
    """Run the command line: a `MoonflowerError` is one line and its exit code, anything else a traceback."""
    raise_dropped_interrupts()
    try:
        done = command.main(standalone_mode=False)  # a command's own return value, or the code of its `ctx.exit`
        sys.exit(done if isinstance(done, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        click.echo(f"Error: {' '.join(error.format_message().split())}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except Exception as error:
        if interrupted(error):
            click.echo("Interrupted.", err=True)
            sys.exit(130)
        if not isinstance(error, MoonflowerError):
            raise
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
