"""Who watches a run: a progress bar, a log, a service's stream. Nothing a watcher does changes the run."""

import logging
import math
from collections.abc import Sequence
from typing import Protocol

from server.history.records import Kind, Outcome, Round, Run
from shared.messages import JoinReply
from shared.score_names import telling, title

log = logging.getLogger("moonflower.run")


class Observer(Protocol):
    """Told of each thing as it happens."""

    def run_started(self, run: Run, sites: list[JoinReply]) -> None:
        """Announce that the sites have joined; rounds follow."""

    def round_started(self, number: int, phase: str) -> None:
        """Announce a round."""

    def asked(self, number: int, kind: Kind, sites: list[str]) -> None:
        """Announce that these sites were sent a question; round 0 is joining at a run's start."""

    def answered(self, number: int, kind: Kind, site: str, outcome: Outcome, error: str | None) -> None:
        """Announce one site's answer."""

    def late(self, number: int, kind: Kind, site: str, text: str) -> None:
        """Announce an answer that came too late, or twice, and was dropped; `number` is the round that it answers."""

    def round_finished(self, done: Round) -> None:
        """Announce a committed round."""


class Log:
    """Writes a line a round, for a daemon's journal or Flower's log."""

    def run_started(self, run: Run, sites: list[JoinReply]) -> None:
        """Log who joined."""
        kind = "private" if run.private else "WITHOUT PRIVACY (epsilon inf)"
        log.info(
            "run %s: %d rounds, %s, sites %s",
            run.id,
            run.rounds_planned,
            kind,
            ", ".join(site.site for site in sites),
        )

    def round_started(self, number: int, phase: str) -> None:
        """Log nothing: the line comes when the round is done."""

    def asked(self, number: int, kind: Kind, sites: list[str]) -> None:
        """Log nothing: the answers tell."""

    def answered(self, number: int, kind: Kind, site: str, outcome: Outcome, error: str | None) -> None:
        """Log what did not go well."""
        if outcome != "ok":
            log.warning("round %d: %s of %s %s: %s", number, kind, site, outcome, error)

    def late(self, number: int, kind: Kind, site: str, text: str) -> None:
        """Log it."""
        log.warning("round %d: %s of %s late: %s", number, kind, site, text)

    def round_finished(self, done: Round) -> None:
        """Log the round's scores, privacy and time."""
        log.info("round %d: %s, %.1f s", done.number, summary(done), done.seconds)


class Several:
    """Tells several watchers, one after another."""

    def __init__(self, watchers: Sequence[Observer]) -> None:
        self._watchers = watchers

    def run_started(self, run: Run, sites: list[JoinReply]) -> None:
        """Tell each."""
        for watcher in self._watchers:
            watcher.run_started(run, sites)

    def round_started(self, number: int, phase: str) -> None:
        """Tell each."""
        for watcher in self._watchers:
            watcher.round_started(number, phase)

    def asked(self, number: int, kind: Kind, sites: list[str]) -> None:
        """Tell each."""
        for watcher in self._watchers:
            watcher.asked(number, kind, sites)

    def answered(self, number: int, kind: Kind, site: str, outcome: Outcome, error: str | None) -> None:
        """Tell each."""
        for watcher in self._watchers:
            watcher.answered(number, kind, site, outcome, error)

    def late(self, number: int, kind: Kind, site: str, text: str) -> None:
        """Tell each."""
        for watcher in self._watchers:
            watcher.late(number, kind, site, text)

    def round_finished(self, done: Round) -> None:
        """Tell each."""
        for watcher in self._watchers:
            watcher.round_finished(done)


def summary(done: Round) -> str:
    """One line: two test scores, the loss and the largest site's epsilon of its budget."""
    test = {metric.name: metric.value for metric in done.metrics if metric.scope == "test"}
    shown = [*[name for name in telling(test) if name != "loss"][:2], *[name for name in test if name == "loss"]]
    said = [f"{title(name)} {test[name]:.4f}" for name in shown]
    spends = [spend for spend in done.spends if spend.part == "train"]
    if spends:
        largest = max(spends, key=lambda spend: spend.epsilon)
        said.append(
            f"epsilon {largest.epsilon:.2f} of {largest.budget:g}" if math.isfinite(largest.epsilon) else "no privacy"
        )
    return ", ".join(said)
