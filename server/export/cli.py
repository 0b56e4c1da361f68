"""The command `moonflower export`: parse, ask the history, write the folder."""

from pathlib import Path
from typing import Any, Literal

import click

from shared.paths import default_database, home


class Round(click.ParamType[int | str]):
    """`best`, `last`, or a round's number."""

    name = "round"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Read it, or say what it must be."""
        if value in ("best", "last"):
            return str(value)
        if not str(value).isdigit() or int(value) < 1:
            self.fail(f"{value!r} is neither best nor last nor a round's number, from 1.", param, ctx)
        return int(value)


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
@click.option("--merged", "form", flag_value="merged", help="The same as --form merged.")
@click.option(
    "--format",
    "style",
    type=click.Choice(["hf", "onnx", "int8"]),
    default="hf",
    show_default=True,
    help="For transformers; or one ONNX file, with weights of 32 or of 8 bits.",
)
@click.option(
    "--round",
    "chosen",
    metavar="best|last|N",
    type=Round(),
    default="last",
    show_default=True,
    help="After which round: the last, the best by released scores, or one by its number.",
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
    style: Literal["hf", "onnx", "int8"],
    chosen: 'int | Literal["best", "last"]',
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
        place = run_folder or home() / "runs" / run.id
        made = folder.write(history, run.id, place, out, form, format=style, chosen=chosen)
    said = form if style == "hf" else style
    click.echo(
        f"Wrote {out} ({said}): run {run.id}, round {made.source.round.number}. {out / 'README.md'} says how to use it and "
        "what is guaranteed."
    )
    for line in made.remarks():
        click.echo(line)
