"""The command `moonflower export`: parse, ask the history, write the folder."""

from pathlib import Path
from typing import Literal

import click

from shared.paths import default_database, home


@click.command()
@click.argument("run_id", metavar="RUN")
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path),
    required=True,
    help="The folder to make; nothing that exists is replaced.",
)
@click.option(
    "--form",
    type=click.Choice(["merged", "adapter"]),
    default="merged",
    show_default=True,
    help="A whole model, or of a LoRA run the adapter alone.",
)
@click.option(
    "--round", "round_number", metavar="N", type=click.IntRange(min=1), help="Of this round; by default, of the last."
)
@click.option(
    "--run-folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The run's folder; by default runs/RUN in Moonflower's home, where simulations are.",
)
@click.option(
    "--database",
    metavar="URL",
    default=default_database,
    help="The history's database; by default $MOONFLOWER_DATABASE, else history.db in Moonflower's home.",
)
def export(
    run_id: str,
    out: Path,
    form: Literal["adapter", "merged"],
    round_number: int | None,
    run_folder: Path | None,
    database: str,
) -> None:
    """Write a run's model as a Hugging Face folder, with a model card and the privacy statement.

    RUN is a run's id, a beginning of it that fits no other run, or `last`. A run that is not finished is exported as
    far as it got. This is for runs of this machine; `moonflower run export` asks a coordinator.

    Example: moonflower export last --out model
    """
    from server.cli import find_run
    from server.export import folder
    from server.history.store import History

    folder.check_place(out)  # before any work
    with History.open(database, create=False) as history:
        run = find_run(history, run_id)
        folder.write(history, run.id, run_folder or home() / "runs" / run.id, out, form, round_number=round_number)
    click.echo(f"Wrote {out} ({form}): run {run.id}. {out / 'README.md'} says how to use it and what is guaranteed.")
