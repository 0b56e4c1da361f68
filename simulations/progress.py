"""What a person sees while a simulation runs: a live bar, and a line a round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from server.listing import clean
from shared.score_names import telling, title

if TYPE_CHECKING:
    from server.history.records import Kind, Outcome, Round, Run
    from shared.messages import JoinReply

VERBS = {"join": "joining", "train": "training", "evaluate": "evaluating"}


class Live:
    """An observer that draws on a terminal; where there is none, only the lines are printed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[doing]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("loading", total=None, doing="")
        self._answered: list[str] = []

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def run_started(self, run: Run, sites: list[JoinReply]) -> None:
        """Name the run, its sites and its promise."""
        said = [f"{site.site}: dataset {site.dataset}, {site.records} {site.unit}s declared" for site in sites]
        self.joined(run, f"{len(sites)} sites", said)

    def joined(self, run: Run, sites: str, said: Sequence[str] = ()) -> None:
        """Name a run and its promise, and say of its sites what is known."""
        head = Text.assemble((run.id, "bold"), clean(f": {run.rounds_planned} rounds over {sites}"))
        self._console.print(head, soft_wrap=True)
        for text in said:
            self._console.print(Text(clean(f"  {text}")), soft_wrap=True)
        if not run.private:
            self._console.print("[bold red]This run is WITHOUT PRIVACY (epsilon inf): no noise is added.[/bold red]")
        if run.rounds_done:
            self._console.print(f"  resumed after round {run.rounds_done}")
        self._progress.update(self._task, description="round", total=run.rounds_planned, completed=run.rounds_done)

    def round_started(self, number: int, phase: str) -> None:
        """Move the bar."""
        self._answered = []
        self._progress.update(self._task, description=f"round {number} ({phase.replace('_', ' ')})", doing="")

    def asked(self, number: int, kind: Kind, sites: list[str]) -> None:
        """Show nothing: in one process, sites answer one by one."""

    def answered(self, number: int, kind: Kind, site: str, outcome: Outcome, error: str | None) -> None:
        """Say who has answered, and print what went wrong."""
        self._answered.append(site)
        self._progress.update(self._task, doing=f"{VERBS[kind]}: {site}")
        if outcome != "ok":
            # A site's own words: neither markup nor control characters of theirs reach the terminal.
            said = clean(f"round {number}: {site} {outcome}: {error}" if number else f"{site} {outcome}: {error}")
            self._console.print(Text(said, style="yellow"), soft_wrap=True)

    def late(self, number: int, kind: Kind, site: str, text: str) -> None:
        """Print it."""
        self._console.print(
            Text(clean(f"round {number}: {site} late ({kind}): {text}"), style="yellow"), soft_wrap=True
        )

    def round_finished(self, done: Round) -> None:
        """Print the round's line."""
        self._console.print(line(done), highlight=False, soft_wrap=True)
        self._progress.advance(self._task)


def line(done: Round) -> str:
    """One round: two test scores and the loss, epsilon spent of budget, seconds, bytes up and down."""
    test = {metric.name: metric.value for metric in done.metrics if metric.scope == "test"}
    parts = [f"round {done.number:>3}"]
    shown = [*[name for name in telling(test) if name != "loss"][:2], *[name for name in test if name == "loss"]]
    parts += [f"{'' if place else 'test '}{title(name)} {test[name]:.3f}" for place, name in enumerate(shown)]
    spends = [spend for spend in done.spends if spend.part == "train"]
    if spends:
        most = max(spends, key=lambda spend: spend.epsilon)
        parts.append(f"ε {most.epsilon:.2f}/{most.budget:g}" if math.isfinite(most.epsilon) else "ε ∞ (no privacy)")
    parts.append(f"{done.seconds:.1f} s")
    if done.simulated_seconds is not None:
        from server.report.words import duration

        parts.append(f"{duration(done.simulated_seconds)} simulated")
    up, down = (sum(getattr(item, name) for item in done.participations) for name in ("bytes_up", "bytes_down"))
    parts.append(f"↑ {size(up)} ↓ {size(down)}")
    return "  ".join(parts)


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
