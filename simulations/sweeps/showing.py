"""A sweep's results for people and for programs: a table, JSON, CSV, and the best run's command."""

import csv
import io
import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.listing import WIDE, clean
from server.report import output, words
from simulations.sweeps.plan import Plan
from simulations.sweeps.results import Results, Row

FILES = ("sweep.json", "sweep.csv")
OWN = ("cell", "rounds", "seconds", "runs")  # columns


def print_table(results: Results, console: Console) -> None:
    """Print a row a cell, what failed, and the best."""
    plan = results.plan
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    terminal = console.is_terminal
    for name in ("cell", *short_keys(plan)):
        table.add_column(name, justify="right", no_wrap=not terminal)
    for name in (results.score.title if results.score else "score", "95 % interval", "ε", "rounds", "seconds", "runs"):
        table.add_column(name, justify="right", no_wrap=not terminal)
    for row in results.rows:
        best = results.best is not None and row is results.best[0]
        table.add_row(*map(Text, _cells(row)), style="bold" if best else None)
    console.print(f"[bold]{results.sweep}[/bold]: {_counted(results)}", highlight=False, soft_wrap=True)
    (console if terminal else Console(file=console.file, width=WIDE)).print(table)
    for line in faults(results):
        console.print(Text(clean(line), style="yellow"), soft_wrap=True)
    for line in best_lines(results):
        console.print(Text(line), soft_wrap=True)


def faults(results: Results) -> Iterator[str]:
    """Say which runs failed, and why: a line a reason."""
    for row in results.rows:
        for error, seeds in row.faults:
            named = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
            yield f"cell {row.cell.number} ({row.cell.name}), {named} failed: {error}"


def best_lines(results: Results) -> list[str]:
    """Name the best cell and its best run, the command that makes it, and what the choice costs."""
    if results.best is None or results.score is None:
        return []
    row, trial = results.best
    of = results.score.title
    seeds = words.count(len(row.values), "seed")
    lines = [f"Best {of}: cell {row.cell.number} ({row.cell.name}), {_mean(row)} over {seeds}."]
    if results.rivals:
        named = ", ".join(str(rival.cell.number) for rival in results.rivals)
        lines.append(
            f"Its interval overlaps those of {'cells' if len(results.rivals) > 1 else 'cell'} {named}: it may be chance."
        )
    lines += [
        f"Its best run is {trial.run} (seed {trial.seed}, {words.score(trial.value, 4)}). The same configuration by itself:",
        f"  {shlex.join(results.plan.command(row.cell, trial.seed))}",
        cost(results),
    ]
    return lines


def cost(results: Results) -> str:
    """Say what it costs to choose by the score."""
    runs = words.count(sum(trial.rounds > 0 for row in results.rows for trial in row.trials), "run")
    by = (
        "scores of a public test set cost no privacy"
        if results.score is None or results.score.scope == "test"
        else "scores of validation records are noised, and were charged"
    )
    return (
        f"A study: {by}; the {runs} were charged in full at their sites, as real sites would be for each that is tried."
    )


def as_dict(results: Results, database: str) -> dict[str, Any]:
    """Give everything as JSON values; an infinite number is the text "inf", one that is none "nan"."""
    plan, score, best = results.plan, results.score, results.best
    values = {
        "sweep": results.sweep,
        "scenario": plan.scenario,
        "settings": list(plan.settings),
        "seeds": list(plan.seeds),
        "metric": None if score is None else {"scope": score.scope, "name": score.name},
        "runs": len(plan.places),
        "completed": results.completed,
        "cells": [_row(row) for row in results.rows],
        "best": None
        if best is None
        else {
            "cell": best[0].cell.number,
            "run": best[1].run,
            "seed": best[1].seed,
            "value": best[1].value,
            "rivals": [rival.cell.number for rival in results.rivals],
            "command": plan.command(best[0].cell, best[1].seed),
        },
        "database": database,
    }
    strict: dict[str, Any] = _strict(values)
    return strict


def write(results: Results, database: str, folder: Path) -> list[Path]:
    """Write the table as JSON and as CSV into `folder`, and name the files."""
    texts = (json.dumps(as_dict(results, database), indent=1, ensure_ascii=False) + "\n", _csv(results))
    for name, text in zip(FILES, texts, strict=True):
        output.write(folder / name, text)
    return [folder / name for name in FILES]


def short_keys(plan: Plan) -> list[str]:
    """Name the grid's keys by their last parts, where these differ from each other and from the table's own columns."""
    last = [key.rpartition(".")[2] for key in plan.grid]
    return [
        name if last.count(name) == 1 and name not in OWN else key for name, key in zip(last, plan.grid, strict=True)
    ]


def _counted(results: Results) -> str:
    of = len(results.plan.places)
    cells = f"{words.count(len(results.rows), 'cell')} x {words.count(len(results.plan.seeds), 'seed')}"
    return f"{cells}, {results.completed} of {words.count(of, 'run')} done"


def _cells(row: Row) -> list[str]:
    settings = [clean(text) for text in row.cell.settings.values()]
    span = row.interval
    return [
        str(row.cell.number),
        *settings,
        words.score(row.mean, 4),
        words.UNKNOWN if span is None else f"{words.score(span[0])} to {words.score(span[1])}",
        words.epsilon(row.epsilon),
        str(row.rounds),
        words.UNKNOWN if row.seconds is None else f"{row.seconds:.1f}",
        str(row.completed) if row.completed == len(row.trials) else f"{row.completed} of {len(row.trials)}",
    ]


def _mean(row: Row) -> str:
    span = row.interval
    return words.score(row.mean, 4) + ("" if span is None else f" ({words.score(span[0])} to {words.score(span[1])})")


def _row(row: Row) -> dict[str, Any]:
    span = row.interval
    return {
        "cell": row.cell.number,
        "settings": row.cell.values,
        "mean": row.mean,
        "low": None if span is None else span[0],
        "high": None if span is None else span[1],
        "epsilon": row.epsilon,
        "rounds": row.rounds,
        "seconds": row.seconds,
        "completed": row.completed,
        "runs": [
            {
                "seed": trial.seed,
                "run": trial.run,
                "status": trial.status,
                "value": trial.value,
                "epsilon": trial.epsilon,
                "rounds": trial.rounds,
                "seconds": trial.seconds,
                "error": trial.error,
            }
            for trial in row.trials
        ],
    }


def _csv(results: Results) -> str:
    """Write a line a cell, with its keys in full."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    shown = ("mean", "low", "high", "epsilon", "rounds", "seconds", "completed")
    writer.writerow(["cell", *results.plan.grid, *shown, "seeds"])
    for row in results.rows:
        values = _strict(_row(row))
        settings = row.cell.settings.values()
        writer.writerow([row.cell.number, *settings, *(values[name] for name in shown), len(row.trials)])
    return stream.getvalue()


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {name: _strict(each) for name, each in value.items()}
    return [_strict(each) for each in value] if isinstance(value, list | tuple) else value
