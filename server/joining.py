"""Who takes part in a run: nodes that joined, by the names of their sites.

A site checks its data, model, policy and budget before it joins, so that a run that begins can end. At the run's
start all nodes are waited for; one that is new later is asked beside the rounds, and takes part from the next one on.
"""

import re
from typing import Any

from server import ending, names
from server.dispatch import Answer, Desk, Question
from server.history.store import History
from server.job import Job
from server.ledgers import Ledgers, shared_account
from server.observer import Observer
from shared import messages, models
from shared.errors import RunFailedError
from shared.messages import JoinReply, JoinRequest
from shared.models import LoadedModel
from shared.run_config import NAME_PATTERN

NAME = re.compile(NAME_PATTERN)
DEADLINE = 600.0  # seconds: a site reads and tokenises its data before it joins
LATECOMERS = 60.0  # seconds to wait for a run's other sites once federation.min_sites are connected
ROUNDS = 10  # until a node that refused to join is asked again, unless it connects anew before
FIRST, MOST = 0.5, 30.0  # seconds between two tries of something that another needs time for


class Roster:
    """The sites of one attempt at a run.

    Parameters
    ----------
    authenticated
        The nodes prove who they are: a site is what its key was enrolled under, and nobody else takes part.
    """

    def __init__(
        self,
        job: Job,
        model: LoadedModel,
        desk: Desk,
        history: History,
        observer: Observer,
        ledgers: Ledgers,
        *,
        authenticated: bool,
    ) -> None:
        self._job, self.desk, self._history, self._observer, self._ledgers = job, desk, history, observer, ledgers
        self._authenticated, self.clock = authenticated, desk.clock
        request = JoinRequest(job.run, job.config.as_json(), model.base_digest, models.shapes(model.arrays()))
        self._question = Question("join", 0, request, JoinReply)
        self.sites: dict[int, JoinReply] = {}  # that joined, by their nodes
        self.left_out: dict[int, str] = {}  # of those, the ones that are not asked again, and why
        self._names: dict[int, str] = {}  # of connected nodes, as enrolled
        self._resting: dict[int, tuple[str, int]] = {}  # that did not join: their start, and the round to ask again
        self._reasons: dict[int, str] = {}  # why nodes did not join

    def start(self) -> None:
        """Wait for the nodes, ask each, and keep those that join.

        Raises
        ------
        RunFailedError
            With the sites' reasons, where fewer than `federation.min_sites` join, or two go by one name or keep
            one account.
        """
        federation, delay = self._job.config.federation, FIRST
        least, waits = federation.min_sites, federation.on_shortfall == "wait"
        until = self.clock.now() + (federation.longest_wait if waits else federation.deadline)
        while True:
            nodes = self._gather(until)
            self.sites = {node: reply for node, reply in self.sites.items() if node in nodes}
            answers = []
            self._ledgers.look_at_all()
            for answer in self.desk.ask(self._question, self._unjoined(nodes), DEADLINE):
                answers.append(answer)
                self._consider(answer, 0, replace=False)
            self._check_apart()
            if len(self.sites) >= least:
                return
            mendable = waits or (
                self._job.supervised and any(each.outcome in ("failed", "timeout") for each in answers)
            )
            if not mendable or self.clock.now() + delay > until:
                reasons = [f"; {reason}" for reason in self._reasons.values()] or ["."]
                raise RunFailedError(f"{len(self.sites)} of the federation.min_sites={least} sites joined{reasons[0]}")
            self.clock.wait(delay, self.clock.now() + delay)
            delay = min(2 * delay, MOST)

    def welcome(self, number: int, waiting: Question[Any] | None = None) -> None:
        """See who is connected before round `number`: take in who has joined since, and ask who is new.

        Answers to the question `waiting` are left to whoever asks it. A simulation's sites are there from the start, or not
        at all, unless their comings and goings are simulated, too.
        """
        if self._job.simulated and not self.clock.simulated:
            return
        self._look()
        for answer in self.desk.collect(waiting):
            self._consider(answer, number, replace=True)
        asked = self.desk.asked(self._question)
        new = self._unjoined([node for node in self.desk.online if node not in asked and self._rested(node, number)])
        if new:
            self._ledgers.look_at_all()
        self.desk.post(self._question, new)

    def able(self, question: Question[Any] | None = None) -> dict[int, JoinReply]:
        """Return the sites that can be asked now: connected, not left out, and not at work on another question."""
        busy = self.desk.owing(but=question)
        return {
            node: reply
            for node, reply in self.sites.items()
            if node in self.desk.online
            and node not in self.left_out
            and node not in busy
            and (not self._authenticated or self._names.get(node) == reply.site)
        }

    def leave_out(self, node: int, reason: str) -> None:
        """Ask a site no more in this attempt."""
        self.left_out[node] = reason
        text = f"site {self.sites[node].site} is not asked again in this attempt: {reason}"
        self._history.add_event(self._job.run, "warning", text)

    def _look(self) -> None:
        online = self.desk.look()
        if self._authenticated:
            self._names = names.enrolled(online, self._history.site_keys())

    def _unjoined(self, nodes: list[int]) -> dict[int, str]:
        """Return those of the nodes that have not joined and may, with what to call them."""
        if self._authenticated:
            return {node: self._names[node] for node in nodes if node in self._names and node not in self.sites}
        return {node: f"node {node}" for node in nodes if node not in self.sites}

    def _gather(self, until: float) -> list[int]:
        """Wait for the nodes that the run needs, and a little for the rest of its sites: a grid can be empty at first."""
        federation, started = self._job.config.federation, self.clock.now()
        while True:
            ending.check_stop(self._job, self._history)
            self._look()
            nodes = [node for node in self.desk.online if not self._authenticated or node in self._names]
            wanted = 0 if self.clock.simulated else self._job.sites  # simulated sites come at their time
            if len(nodes) >= max(federation.min_sites, wanted):
                return nodes
            now = self.clock.now()
            if len(nodes) >= federation.min_sites and now - started > LATECOMERS:
                text = (
                    f"{len(nodes)} of the run's {self._job.sites} sites are connected; it goes on without the others."
                )
                self._history.add_event(self._job.run, "warning", text)
                return nodes
            if now > until:
                raise RunFailedError(
                    f"{len(nodes)} of the federation.min_sites={federation.min_sites} sites are connected after "
                    f"{federation.deadline:g} s; start them, then resume."
                )
            self.clock.wait(FIRST, now + FIRST)

    def _rested(self, node: int, number: int) -> bool:
        """Whether a node that did not join may be asked again."""
        start, again = self._resting.get(node, ("", 0))
        return number >= again or self.desk.online[node].activated != start

    def _consider(self, answer: Answer[JoinReply], number: int, *, replace: bool) -> None:
        """Take a site in, or note why not; one that connected anew as another node replaces itself."""
        node, reply = answer.node, answer.reply
        label = self._names.get(node, f"node {node}")
        error = answer.error if reply is None else self._unfit(reply, node, replace=replace)
        if reply is not None and error is None:
            for other in [other for other, known in self.sites.items() if known.site == reply.site and replace]:
                del self.sites[other]
                self.left_out.pop(other, None)
            self.sites[node] = reply
            self._reasons.pop(node, None)
            self._observer.answered(number, "join", reply.site, "ok", None)
            if replace:
                self._history.add_event(self._job.run, "info", f"site {reply.site} joined before round {number}.")
            return
        outcome = "failed" if answer.outcome == "ok" else answer.outcome
        passing = reply is None and outcome in ("failed", "timeout")
        start = self.desk.online[node].activated if node in self.desk.online else ""
        self._resting[node] = start, number + (1 if passing else ROUNDS)
        if self._reasons.get(node) != (error or outcome):
            self._reasons[node] = error or outcome
            self._history.add_event(self._job.run, "warning", f"{label} did not join: {error}")
        self._observer.answered(number, "join", label, outcome, error)

    def _unfit(self, reply: JoinReply, node: int, *, replace: bool) -> str | None:
        """Say why a site that would join may not."""
        if error := _undeclarable(reply):
            return error
        if reply.unit != (unit := self._job.config.privacy.unit):
            return f"its unit of privacy is the {reply.unit}, and the run's is the {unit}; set privacy.unit={reply.unit!r}."
        if self._authenticated and reply.site != self._names.get(node):
            return f"the node calls itself {reply.site!r}, and its key is enrolled for {self._names.get(node)!r}."
        if replace:
            others = {other: known for other, known in self.sites.items() if known.site != reply.site}
            rivals = self.desk.online.keys() & (self.sites.keys() - others.keys() - {node})
            if any(not self._authenticated or rival in self._names for rival in rivals):  # else its key was renewed
                return f"site {reply.site} is connected as another node, too; stop one of them."
            if pair := shared_account([*others.values(), reply]):
                return f"sites {pair[0]} and {pair[1]} answer from one account; give each its own ledger in site.toml."
        return self._ledgers.at_join(reply)

    def _check_apart(self) -> None:
        """Refuse a run that two sites begin under one name, or from one account."""
        names_of = sorted(reply.site for reply in self.sites.values())
        if len(set(names_of)) != len(names_of):
            raise RunFailedError(
                f"two nodes call themselves by one site's name: {names_of}; give each its own name in site.toml."
            )
        if pair := shared_account(self.sites.values()):
            raise RunFailedError(
                f"sites {pair[0]} and {pair[1]} answer from one account; give each its own ledger in site.toml."
            )


def _undeclarable(reply: JoinReply) -> str | None:
    """Say what is wrong with a site's declaration: it goes into the history, and onto screens."""
    for setting, value in (("name", reply.site), ("dataset.id", reply.dataset)):
        if not NAME.fullmatch(value):
            return f"{setting}={value[:64]!r} is not a name; use {NAME.pattern} (site.toml)."
    if reply.records < 1:
        return f"dataset.records={reply.records} must be at least 1 (site.toml)."
    return messages.implausible(reply)
