"""The command `moonflower ledger`: parse, read the account, print. It changes a counter alone, and only when asked.

What reads a ledger is imported by the command that needs it, so that `--help` stays quick.
"""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shared.errors import DataError

if TYPE_CHECKING:
    from client.privacy.account import Account

Command = Callable[..., None]
Row = dict[str, Any]
NEWEST = 100  # events, unless --limit says otherwise
EVENT_COLUMNS = [
    "number",
    "at",
    "run",
    "round",
    "kind",
    "part",
    "mechanism",
    "noise_multiplier",
    "sampling_rate",
    "steps",
]

_site = click.option(
    "--site", type=click.Path(path_type=Path), help="The site's site.toml, which names ledger and data set."
)
_ledger = click.option("--ledger", type=click.Path(path_type=Path), help="The ledger's file, together with --dataset.")
_dataset = click.option("--dataset", metavar="ID", help="The data set's id, together with --ledger.")
_format = click.option(
    "--format", "style", type=click.Choice(["table", "json"]), default="table", show_default=True, help="How to print."
)


def _which(command: Command) -> Command:
    """Give a command the options that say which account."""
    return _site(_ledger(_dataset(command)))


@click.group()
def ledger() -> None:
    """Show, verify and export a site's privacy account; run it at the site.

    Example: moonflower ledger show --site site.toml
    """


@ledger.command()
@_which
@_format
@click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(min=0),
    default=NEWEST,
    show_default=True,
    help="Show the newest N events; 0 shows all.",
)
def show(site: Path | None, ledger: Path | None, dataset: str | None, style: str, limit: int) -> None:
    """Show what was released, event by event, and what is reserved by rounds under way.

    Example: moonflower ledger show --site site.toml --limit 20
    """
    with _read(site, ledger, dataset) as account:
        export = account.export()
    events, reservations = export["events"], export["reservations"]
    shown = events[-limit:] if limit else events
    if style == "json":
        _json({**export, "events": shown})
        return
    header = export["dataset"]
    click.echo(
        f"dataset {header['id']}: {len(events)} events, opened {_minute(header['opened_at'])}, "
        f"delta {header['delta']:g}, Rényi order {header['order']}, kept for {header.get('unit', 'record')}s"
    )
    if shown:
        _table(shown, EVENT_COLUMNS)
    if len(shown) < len(events):
        click.echo(f"The newest {len(shown)} of {len(events)} events; --limit 0 shows all.")
    if reservations:
        click.echo("Reserved by rounds under way (alive: whether their process is):")
        _table(reservations, [*EVENT_COLUMNS[1:], "alive"])


@ledger.command()
@_which
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write to this file, new or an earlier export, not to standard output.",
)
def export(site: Path | None, ledger: Path | None, dataset: str | None, out: Path | None) -> None:
    """Write the account as JSON, for an auditor or for `moonflower privacy statement --verify`.

    It holds no record and nothing computed from one: which rounds were released, with what noise, and when.

    Example: moonflower ledger export --site site.toml --out notes-2026.json
    """
    from client.privacy import ledger_export

    with _read(site, ledger, dataset) as account:
        values, path = account.export(), account.path
    if out is None:
        _json(values)
        return
    ledger_export.write(out, values, path)
    click.echo(
        f"{out}: {len(values['events'])} events of dataset {values['dataset']['id']}, head {values['head'][:16]}"
    )


@ledger.command()
@_which
@_format
@click.option(
    "--delta", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="By default the account's own."
)
def epsilon(site: Path | None, ledger: Path | None, dataset: str | None, style: str, delta: float | None) -> None:
    """Recompute epsilon from the events: of each run and part, and of the data set's life.

    A run is composed by privacy-loss distributions (PLD). The lifetime limit holds by a Rényi filter, because later
    runs are chosen after seeing earlier ones; PLD's lifetime figure would be right only if all runs had been
    planned in advance.

    Example: moonflower ledger epsilon --site site.toml --format json
    """
    from client.privacy.events import PARTS

    limit = _load(site).privacy.max_epsilon if site else None
    with _read(site, ledger, dataset) as account:
        at = account.delta if delta is None else delta
        spends = account.spends()
        runs: list[Row] = [
            {"run": run, "part": part, "releases": len(releases), "epsilon": account.run_epsilon(run, part, at)}
            for run in dict.fromkeys(spend.question.run for spend in spends)
            for part in PARTS
            if (releases := account.run_releases(run, part))
        ]
        lifetime: list[Row] = [
            {
                "part": part,
                "releases": sum(spend.question.part == part for spend in spends),
                "epsilon": account.lifetime_epsilon(part),
                "limit": limit,
                "if_planned_in_advance": account.planned_epsilon(part),
            }
            for part in PARTS
        ]
    if style == "json":
        order = account.order
        header = {
            "dataset": account.dataset,
            "unit": account.unit,
            "runs_delta": at,
            "lifetime_delta": account.delta,
            "order": order,
        }
        _json(header | {"runs": runs, "lifetime": lifetime})
        return
    click.echo(f"Each run, by PLD at delta {at:g}")
    _table(runs, ["run", "part", "releases", "epsilon"])
    click.echo(
        f"The life of dataset {account.dataset}, for each {account.unit}, by a Rényi filter of order {account.order} at delta {account.delta:g}"
    )
    _table(lifetime, ["part", "releases", "epsilon", *(["limit"] if site else []), "if_planned_in_advance"])


@ledger.command()
@_which
@click.option(
    "--export", "exported", type=click.Path(path_type=Path, dir_okay=False), help="Verify an exported file instead."
)
@click.option(
    "--new-count", is_flag=True, help="Write a lost or damaged counter anew: your word that this is the newest ledger."
)
def verify(site: Path | None, ledger: Path | None, dataset: str | None, exported: Path | None, new_count: bool) -> None:
    """Verify the chain of events and the counter beside it; exit with an error at the first fault.

    It finds an event that was edited, dropped or reordered, and a ledger that was put back from an older copy.

    Example: moonflower ledger verify --site site.toml
    """
    if exported:
        if site or ledger or dataset or new_count:
            raise click.UsageError("--export goes alone: it names a file that was exported.")
        _verify_export(exported)
        return
    if new_count:
        from client.privacy.account import Account

        path, name = _account(site, ledger, dataset)
        click.echo(f"The counter of {path} counts {Account.new_count(path, name)} events of dataset {name} now.")
    with _read(site, ledger, dataset) as account:
        click.echo(
            f"{account.path}: {account.number} events of dataset {account.dataset}, none edited, dropped or reordered, "
            f"and the counter agrees; head {account.head}"
        )


def _verify_export(file: Path) -> None:
    from client.privacy import ledger_export
    from shared import ledger_chain

    values = ledger_export.read(file)
    fault = ledger_chain.verify(values)
    if fault:
        raise DataError(f"{file}: {fault.text}")
    click.echo(
        f"{file}: {len(values['events'])} events of dataset {values['dataset']['id']}, none edited, dropped or reordered; "
        f"head {values['head']}. Whether it is the newest, the site's counter and the coordinator's history can tell."
    )


def _read(site: Path | None, ledger: Path | None, dataset: str | None) -> "Account":
    from client.privacy.account import Account

    return Account.read(*_account(site, ledger, dataset))


def _account(site: Path | None, ledger: Path | None, dataset: str | None) -> tuple[Path, str]:
    """Return which file and which account in it the options name."""
    if site and not ledger and not dataset:
        own = _load(site)
        return own.ledger, own.dataset.id
    if ledger and dataset and not site:
        return ledger, dataset
    raise click.UsageError("give --site SITE.TOML, or --ledger FILE and --dataset ID.")


def _load(site: Path) -> Any:
    from client import site as sites

    return sites.load(site)


def _json(values: Any) -> None:
    from client.privacy import ledger_export

    click.echo(ledger_export.text(values), nl=False)


def _minute(at: str) -> str:
    return f"{at[:10]} {at[11:16]}Z"


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name == "at":
        return _minute(value)
    return ("∞ (no privacy)" if value == math.inf else f"{value:.6g}") if isinstance(value, float) else str(value)


def _table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        numbers = all(isinstance(row[name], int | float | None) for row in rows)
        table.add_column(name.replace("_", " "), no_wrap=not terminal, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(Text(_cell(name, row[name])) for name in columns))
    Console(file=sys.stdout, width=None if terminal else 1000).print(table)
