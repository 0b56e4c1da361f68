"""A run as it is watched: a panel that changes on a terminal, a line an event everywhere else, JSON for programs."""

import json
import math
import sys
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from server.control import coordinator_pb2 as pb
from server.control.client import Lost
from server.control.wire import row
from server.listing import clean

if TYPE_CHECKING:
    from rich.console import Group

EXIT_CODES = {"completed": 0, "failed": 1, "stopped": 3}
NOTES = 12  # lines below the panel
WORDS = {  # what a site does or did, in an event of this kind and state
    ("join", "asked"): "is asked to join",
    ("join", "ok"): "joined",
    ("train", "asked"): "trains",
    ("train", "ok"): "sent its update",
    ("evaluate", "asked"): "evaluates",
    ("evaluate", "ok"): "sent its histogram",
    (None, "refused"): "refused",
    (None, "failed"): "failed",
    (None, "timeout"): "did not answer in time",
    (None, "exhausted"): "is out of privacy budget",
    (None, "late"): "answered too late, and was not used",
}
WELL = {"asked", "ok", "started", "committed", "completed", "joined"}  # states that need no word of their own


def watch(told: Iterable[pb.WatchRunResponse | Lost], style: str) -> int:
    """Print what is told of a run as it comes; return the exit code that its outcome has.

    `style` is "json" (a line an event) or "table" (for people).
    """
    if style == "json":
        show = _as_json
    elif sys.stdout.isatty():
        return _panel(told)
    else:
        show = line
    outcome = ""
    for event in told:
        if not isinstance(event, Lost) and event.HasField("run"):
            outcome = event.run.status
        click.echo(show(event))
    return EXIT_CODES.get(outcome, 1)


def line(event: pb.WatchRunResponse | Lost) -> str:
    """Say an event in one line."""
    if isinstance(event, Lost):
        return f"{datetime.now(UTC):%H:%M:%S} {event.why} Trying again in {event.wait:g} s."
    if event.HasField("run"):
        return f"{datetime.now(UTC):%H:%M:%S} {summary(event.run)}"
    progress = event.progress
    said = progress.text if progress.HasField("text") else ""
    words = WORDS.get((progress.kind, progress.state)) or WORDS.get((None, progress.state)) or progress.state
    if progress.HasField("site"):
        where = f"round {progress.round}, {progress.kind}: " if progress.round else ""
        text = f"{where}{progress.site} {words}" + (f": {said}" if said else "")
    elif progress.kind == "run":
        text = said or f"run {progress.state}"
    else:
        what = f"round {progress.round}" if progress.round else progress.kind
        text = f"{what} {progress.state}" + (f": {said}" if said else "")
    return clean(f"{progress.at.ToDatetime(tzinfo=UTC):%H:%M:%S} {text}")


def summary(run: pb.Run) -> str:
    """Say how a run stands."""
    without = "" if run.private else ", WITHOUT PRIVACY (epsilon inf)"
    return clean(f"{run.id}: {status(run)}, {run.rounds_done} of {run.rounds_planned} rounds{without}")


def status(run: pb.Run) -> str:
    """Say what a run is doing, in a word or two."""
    if run.status == "running" and run.HasField("stop_requested_at"):
        return "stopping"
    return "in the queue" if run.status == "pending" else run.status


class Board:
    """What the panel shows: the run, each site's newest state, and the newest lines."""

    def __init__(self) -> None:
        self.run: pb.Run | None = None
        self.round = 0
        self.sites: dict[str, pb.Progress] = {}
        self.notes: deque[str] = deque(maxlen=NOTES)

    def take(self, event: pb.WatchRunResponse | Lost) -> None:
        """Take an event in."""
        if isinstance(event, Lost):
            self.notes.append(line(event))
            return
        if event.HasField("run"):
            self.run = event.run
            return
        progress = event.progress
        self.round = max(self.round, progress.round)
        if progress.HasField("site"):
            self.sites[progress.site] = progress
        if not progress.HasField("site") or progress.state not in WELL:
            self.notes.append(line(event))

    def render(self) -> "Group":
        """Draw it, as it is now."""
        from rich import box
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = []
        if self.run is not None:
            parts.append(Text(summary(self.run), style="bold"))
            parts.append(ProgressBar(total=max(1, self.run.rounds_planned), completed=self.run.rounds_done, width=60))
        if self.sites:
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
            for name in ("site", "round", "now", "for", "said"):
                table.add_column(name)
            for site, progress in sorted(self.sites.items()):
                kind, state = progress.kind, progress.state
                words = WORDS.get((kind, state)) or WORDS.get((None, state)) or state
                seconds = (datetime.now(UTC) - progress.at.ToDatetime(tzinfo=UTC)).total_seconds()
                style = "" if state == "ok" else "bold" if state == "asked" else "yellow"
                cells = (site, str(progress.round or ""), words, f"{max(0, seconds):.0f} s", progress.text)
                table.add_row(*(Text(clean(cell)) for cell in cells), style=style)
            parts.append(table)
        parts += [Text(note, style="dim") for note in self.notes]
        return Group(*parts)


def _panel(told: Iterable[pb.WatchRunResponse | Lost]) -> int:
    from rich.live import Live

    board = Board()
    with Live(get_renderable=board.render, refresh_per_second=4) as live:
        for event in told:
            board.take(event)
        live.refresh()
    return EXIT_CODES.get(board.run.status if board.run else "", 1)


def _as_json(event: pb.WatchRunResponse | Lost) -> str:
    if isinstance(event, Lost):
        values: dict[str, Any] = {"told": "lost", "text": event.why, "seconds": event.wait}
    else:
        which = "run" if event.HasField("run") else "progress"
        values = {"told": which, **row(getattr(event, which))}
    return as_json(values)


def as_json(values: Any) -> str:
    """Write values in one line, times as ISO 8601 and what is not finite as a word."""
    return json.dumps(_plain(values), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value.isoformat() if isinstance(value, datetime) else value
