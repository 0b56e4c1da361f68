"""The command `moonflower simulate`: parse, prepare, run, print."""

import json
import logging
import os
import shlex
import signal
import tempfile
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.table import Table

from shared.errors import ConfigError
from shared.paths import default_database, home
from shared.score_names import telling, title

if TYPE_CHECKING:
    from server.history.records import Round, Run
    from server.history.store import History

SITES_SHOWN = 20  # of the last table; the history has them all
SUPERLINK = "moonflower"  # the connection's name in Flower's config.toml, as docs/guides/flower-engine.md has it


@click.command()
@click.argument("scenario", default="vader")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a setting; KEY= takes it out. Can be given again.",
)
@click.option("--epsilon", type=float, help="Short for --set privacy.epsilon=...; inf is without privacy.")
@click.option("--rounds", type=int, help="Short for --set training.rounds=...")
@click.option("--seed", type=int, help="Short for --set seed=...")
@click.option("--device", metavar="DEVICE", help="cuda:0, cpu or auto (the default), for coordinator and sites.")
@click.option(
    "--engine",
    type=click.Choice(["in-process", "flower"]),
    default="in-process",
    show_default=True,
    help="Where the sites run: in this process, or in Ray's, by Flower's own simulation engine (needs the extra `ray`).",
)
@click.option(
    "--cpus-per-site", type=int, metavar="N", help="With --engine flower: CPUs of a site at work; 1 by default."
)
@click.option(
    "--gpus-per-site",
    type=float,
    metavar="SHARE",
    help="With --engine flower: GPUs of a site at work; 0.25 puts four on one. 0 by default.",
)
@click.option(
    "--ray-address",
    metavar="HOST:PORT",
    help="With --engine flower: a running Ray cluster, or auto for this machine's; without it, Ray is started for the run.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="Processes that the sites run in, side by side, each with a model of its own; 1 by default. Several may share a GPU.",
)
@click.option("--resume", metavar="RUN", help="Go on with a run after its last committed round; `last` is the newest.")
@click.option("--prepare", "prepare_only", is_flag=True, help="Lay out the run for `flwr run` and do not start it.")
@click.option(
    "--database",
    metavar="URL",
    default=default_database,
    help="Where the history goes: sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME. "
    "By default $MOONFLOWER_DATABASE, else history.db in Moonflower's home.",
)
@click.option("--quiet", is_flag=True, help="Print the run's id alone.")
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="How to print the result.",
)
def simulate(
    scenario: str,
    settings: tuple[str, ...],
    epsilon: float | None,
    rounds: int | None,
    seed: int | None,
    device: str | None,
    engine: Literal["in-process", "flower"],
    cpus_per_site: int | None,
    gpus_per_site: float | None,
    ray_address: str | None,
    workers: int | None,
    resume: str | None,
    prepare_only: bool,
    database: str,
    quiet: bool,
    style: Literal["table", "json"],
) -> None:
    """Fine-tune a pretrained Transformer across virtual sites, on this machine.

    SCENARIO is a built-in scenario or a TOML file. The default, vader, trains all-MiniLM-L6-v2 to tell
    positive from negative sentences across four sites, with differential privacy at each. The same ServerApp and ClientApp run
    here as in a deployment, and the whole history goes into a database.

    Example: moonflower simulate --epsilon 3 --set training.learning_rate=1e-3
    """
    context = click.get_current_context()
    if resume is not None and (
        settings
        or any(value is not None for value in (epsilon, rounds, seed, device))
        or context.get_parameter_source("scenario") is click.core.ParameterSource.COMMANDLINE
    ):
        raise ConfigError(
            "--resume goes on with the run's own configuration; leave out the scenario and its settings, or start a new run."
        )
    if engine != "flower" and any(value is not None for value in (cpus_per_site, gpus_per_site, ray_address)):
        raise ConfigError(
            "--cpus-per-site, --gpus-per-site and --ray-address are of --engine flower; add it, or leave them out."
        )
    if engine == "flower" and workers is not None:
        raise ConfigError(
            f"--workers {workers} is of --engine in-process; --cpus-per-site says how many run side by side."
        )
    keep_quiet()
    from server.cli import find_run
    from server.history.engine import is_memory, parse_url
    from server.history.store import History
    from simulations import engine as in_process
    from simulations import prepare
    from simulations import scenario as scenarios

    stop_cleanly_on_sigterm()
    make_home()
    if is_memory(parse_url(database)):
        raise ConfigError(
            f"--database {database}: a database in memory ends with the process; name a file or a server."
        )
    if engine == "flower":
        from simulations import flower

        resources = flower.Resources(
            1 if cpus_per_site is None else cpus_per_site, gpus_per_site or 0.0, address=ray_address
        )
        resources.check(device or "auto")
    console = Console(stderr=style == "json", quiet=quiet)
    with History.open(database) as history:
        if resume is not None:
            run = find_run(history, resume).id
        else:
            overrides = dict(scenarios.override(text) for text in settings)
            short = {"privacy.epsilon": epsilon, "training.rounds": rounds, "seed": seed}
            overrides |= {key: value for key, value in short.items() if value is not None}
            with console.status("Bringing model and data, planning the noise"):
                run = prepare.prepare(scenarios.load(scenario, overrides), history, device or "auto")
        if prepare_only:
            _print_prepared(run, prepare, database, style)
            return
        shown = None if quiet else console
        if engine == "flower":
            finished = flower.play(run, database, shown, resources)
        else:
            finished = in_process.play(run, database, shown, workers or 1)
        _print_finished(finished, history, database, console, quiet, style)


def make_home() -> None:
    """Make Moonflower's home, or say why it cannot be."""
    try:
        home().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home()):
            pass
    except OSError as error:
        raise ConfigError(
            f"MOONFLOWER_HOME={str(home())!r} cannot be written: {error.strerror}; set it to a folder that can."
        ) from None


def keep_quiet() -> None:
    """Set before Flower and Transformers are imported: no telemetry, no look for updates, no advice."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("flwr").setLevel(logging.ERROR)


def stop_cleanly_on_sigterm() -> None:
    """Take SIGTERM for an interrupt by a person, so that what is under way is closed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def _print_prepared(run: str, prepare: Any, database: str, style: str) -> None:
    from server.history.engine import masked, parse_url

    folder, shown = prepare.run_folder(run), masked(parse_url(database))
    nodes = f"num-supernodes={len(prepare.nodes(run))} client-resources-num-cpus=1"
    settings = f"run={json.dumps(str(folder))} database={json.dumps(shown)}"  # TOML strings
    command = ["flwr", "run", ".", SUPERLINK, "--federation-config", nodes, "--run-config", settings]
    if style == "json":
        described = {"run": run, "folder": str(folder), "database": shown, "command": shlex.join(command)}
        click.echo(json.dumps(described))
        return
    click.echo(f"{run} is laid out in {folder}. From the repository's root, run it on Flower's own engine with:")
    click.echo(f"  {shlex.join(command)}")
    click.echo(f"{SUPERLINK} is a SuperLink in Flower's config.toml; docs/guides/flower-engine.md sets one up.")


def _print_finished(run: "Run", history: "History", database: str, console: Console, quiet: bool, style: str) -> None:
    last = history.last_round(run.id)
    if last is None:  # a finished run has rounds
        raise RuntimeError(f"{run.id} finished without a round")
    if style == "json":
        click.echo(json.dumps(_as_json(run, last, database, _simulated_seconds(run, history))))
        return
    if quiet:
        click.echo(run.id)
        return
    from server.history.engine import masked, parse_url

    console.print(_said(run, last), highlight=False, soft_wrap=True)
    if (simulated := _simulated_seconds(run, history)) is not None:
        from server.report.words import duration

        console.print(f"simulated time: {duration(simulated)}", highlight=False)
    console.print(_table(last))
    more = len({spend.site for spend in last.spends}) - SITES_SHOWN
    if more > 0:
        console.print(f"and {more:,} sites more", highlight=False)
    delta = run.config["privacy"]["delta"]
    for legend in (
        f"ε: spent of the run's budget, at δ = {delta:g}, by training and by validation records",
        "noise: standard deviation over the clipping norm, in the last phase",
        f"valid. {title(_validated(last))}: from noised counts, with the 95 % interval that the noise leaves",
    ):
        console.print(legend, highlight=False, soft_wrap=True, style="dim")
    console.print(f"History: {masked(parse_url(database))}", highlight=False, soft_wrap=True)
    console.print("Next:", highlight=False)
    for command in (
        f"history rounds {run.id}",
        f"history spends {run.id}",
        f"report {run.id} --out report.html",
    ):
        console.print(f"  moonflower {command}", highlight=False)


def _said(run: "Run", last: "Round") -> str:
    """One line: what the run came to, and whether it was private."""
    test = {metric.name: metric.value for metric in last.metrics if metric.scope == "test"}
    shown = [*[name for name in telling(test) if name != "loss"][:3], *[name for name in test if name == "loss"]]
    scores = ", ".join(f"{title(name)} {test[name]:.4f}" for name in shown)
    promise = "" if run.private else "  [bold red]WITHOUT PRIVACY[/bold red]"
    return f"[bold]{run.id}[/bold], after {run.rounds_done} rounds: public test {scores or 'not scored'}{promise}"


def _table(last: "Round") -> Table:
    table = Table()
    first = _validated(last)
    for name in ("site", "noise", "ε train", "ε valid.", f"valid. {title(first)}"):
        table.add_column(name, no_wrap=True)
    spends = {(spend.site, spend.part): spend for spend in last.spends}
    scores = {metric.site: metric for metric in last.metrics if (metric.scope, metric.name) == ("validation", first)}
    sites = sorted({spend.site for spend in last.spends})
    for site in sites[:SITES_SHOWN]:
        score = scores.get(site)
        trained, validated = spends.get((site, "train")), spends.get((site, "validation"))
        table.add_row(
            site,
            "–" if trained is None else f"{trained.noise_multiplier:.2f}",
            "–" if trained is None else _epsilon(trained.epsilon, trained.budget),
            "–" if validated is None else _epsilon(validated.epsilon, validated.budget),
            "–"
            if score is None
            else f"{score.value:.3f}" + ("" if score.low is None else f" ({score.low:.2f} to {score.high:.2f})"),
        )
    return table


def _validated(last: "Round") -> str:
    """Name of the sites' most telling score."""
    return next(iter(telling(metric.name for metric in last.metrics if metric.scope == "validation")), "accuracy")


def _epsilon(spent: float, budget: float) -> str:
    return f"{spent:.2f} of {budget:g}" if spent != float("inf") else "∞ (no privacy)"


def _simulated_seconds(run: "Run", history: "History") -> float | None:
    """Seconds that the run would have taken; None where its sites' time was not simulated."""
    told = [done.simulated_seconds for done in history.rounds(run.id) if done.simulated_seconds is not None]
    return sum(told) if told else None


def _as_json(run: "Run", last: "Round", database: str, simulated: float | None) -> dict[str, Any]:
    from server.history.engine import masked, parse_url

    def number(value: float) -> float | str:
        return "inf" if value == float("inf") else value

    return {
        "run": run.id,
        "status": run.status,
        "private": run.private,
        "rounds": run.rounds_done,
        "test": {metric.name: metric.value for metric in last.metrics if metric.scope == "test"},
        "validation": {
            metric.name: metric.value for metric in last.metrics if metric.scope == "validation" and metric.site is None
        },
        "epsilon": {f"{spend.site}/{spend.part}": number(spend.epsilon) for spend in last.spends},
        **({} if simulated is None else {"simulated_seconds": simulated}),
        "database": masked(parse_url(database)),
    }
