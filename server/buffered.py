"""Rounds that wait for nobody: each ends with its `federation.buffer_size`-th update, whichever iterate that started from.

Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation" (FedBuff). A site is asked round q's
question, from the newest iterate, and may answer in a later round r: its update, the difference from its own
iterate, then counts 1/sqrt(1 + r - q) of a fresh one. `federation.concurrency` sites are at work at a time; who has answered
rests until the next round, so that a round takes one update of a site and a site answers a question once. Who is asked
and how much an update counts rests on round numbers and names: public values.

Who is at work when a round is committed stands in it, as `pending`. An attempt that goes on asks each of them the same
question again, from the iterate of its round's checkpoint: what it had answered, it resends, and its ledger is asked
nothing older than it has answered.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server import ending, selection
from server.dispatch import Answer, Question
from server.history.records import Participation, Round
from server.history.store import History
from server.job import Job
from server.joining import FIRST, MOST, Roster
from server.ledgers import Ledgers
from server.observer import Observer
from shared.errors import RunFailedError

Take = Callable[[Question[Any], Answer[Any]], str | None]  # folds an answer in, or says why it does not count
Asked = Callable[[int], Question[Any]]  # the question of a round that is committed


def influence(staleness: int) -> float:
    """Return how much an update counts that is so many rounds old: 1/sqrt(1 + staleness), as in the paper's section 5."""
    return float((1 + staleness) ** -0.5)


@dataclass
class Window:
    """What has come in one round."""

    number: int
    idle: list[int] = field(default_factory=list)  # nodes that can still be asked, the next one last
    took: int = 0
    done: set[str] = field(default_factory=set)  # sites that have answered, with whatever
    again: set[str] = field(
        default_factory=set
    )  # of them, those to whom something happened: they may be asked once more
    reasons: dict[str, str] = field(default_factory=dict)


class Buffer:
    """The sites at work over an attempt, and whose answers a round takes."""

    def __init__(self, job: Job, roster: Roster, history: History, observer: Observer, ledgers: Ledgers) -> None:
        self._job, self._roster, self._history, self._observer = job, roster, history, observer
        self._ledgers, self._desk, self._federation = ledgers, roster.desk, job.config.federation
        self._work = roster.desk.lasting

    def restore(self, last: Round | None, asked: Asked) -> None:
        """Take up what was under way when round `last` was committed, at those sites that are here."""
        pending = [part for part in last.participations if part.outcome == "pending"] if last else []
        nodes = {reply.site: node for node, reply in self._roster.able().items()}
        questions: dict[int, Question[Any]] = {}
        for part in pending:
            number = part.asked or (last.number if last else 0)
            if part.site in nodes and self.fault(number, (last.number if last else 0) + 1) is None:
                questions.setdefault(number, asked(number))
                self._work[nodes[part.site]] = questions[number], part.site

    def fill(self, question: Question[Any], take: Take) -> None:
        """Ask, and take answers, until the round is full.

        Raises
        ------
        RunFailedError
            Where too few come in time, as `federation.on_shortfall` says.
        """
        federation, clock = self._federation, self._roster.clock
        window, delay = Window(question.number), FIRST
        started = clock.now()
        waits = federation.on_shortfall == "wait"
        longest = started + (federation.longest_wait if waits else federation.deadline)
        until = started + federation.deadline
        while True:
            self._rest(window)
            if self._enough(window):
                self._ask(question, window)
                for asked, answer in self._desk.hear(self._work, until):
                    self._hear(window, asked, answer, take)
                    if window.took == federation.buffer_size:
                        return
                    self._ask(question, window)
            had = f"round {window.number}: {window.took} of the federation.buffer_size={federation.buffer_size} updates came"
            if federation.on_shortfall == "continue" and window.took:
                self._history.add_event(self._job.run, "warning", f"{had}; it goes on with them.")
                return
            if not waits or clock.now() >= longest:
                why = next((f"{site}: {why}" for site, why in window.reasons.items()), self._lacking())
                raise RunFailedError(f"{had}; {why}")
            if delay == FIRST:
                self._history.add_event(self._job.run, "warning", f"{had}; it waits for more.")
            ending.check_stop(self._job, self._history)
            clock.wait(delay, clock.now() + delay)
            delay = min(2 * delay, MOST)
            self._roster.welcome(window.number)
            until = min(longest, clock.now() + MOST)
            window.done -= window.again

    def fault(self, asked: int, number: int) -> str | None:
        """Say why the answer to round `asked`'s question does not count in round `number`."""
        config = self._job.config
        if config.place(asked)[0] != config.place(number)[0]:
            return f"its update began in round {asked}, and another phase of training has begun since."
        if number - asked > config.federation.max_staleness:
            return (
                f"its update began in round {asked}, more than federation.max_staleness={config.federation.max_staleness} "
                "rounds before."
            )
        return None

    def pending(self, number: int) -> list[Participation]:
        """Return what is under way at the end of round `number`."""
        return [
            Participation(
                *(site, "train", "pending", self._desk.since(node), 0, 0),
                asked=None if question.number == number else question.number,
            )
            for node, (question, site) in self._work.items()
        ]

    def _rest(self, window: Window) -> None:
        """See who could be asked, and forget nodes that have left for good."""
        for node in [node for node in self._work if node not in self._roster.sites]:
            del self._work[node]
        able = {
            node: reply
            for node, reply in self._roster.able().items()
            if node not in self._work and reply.site not in window.done
        }
        window.idle = selection.shuffled(self._job.config, window.number, able)[::-1]

    def _enough(self, window: Window) -> bool:
        there = len(window.idle) + len(self._work) + len(window.done)
        return there >= self._federation.min_sites or (there > 0 and self._federation.on_shortfall == "continue")

    def _ask(self, question: Question[Any], window: Window) -> None:
        """Put idle sites to work on the newest iterate, up to the concurrency; on what can no longer count, nobody is."""
        at_work = sum(self.fault(asked.number, window.number) is None for asked, _ in self._work.values())
        most = self._federation.concurrency
        free = len(window.idle) if most is None else max(0, most - at_work)
        chosen = [window.idle.pop() for _ in range(min(free, len(window.idle)))]
        replies = {node: self._roster.sites[node] for node in chosen}
        if replies:
            self._ledgers.look(replies.values())
            self._observer.asked(window.number, "train", [reply.site for reply in replies.values()])
        self._work.update({node: (question, reply.site) for node, reply in replies.items()})

    def _hear(self, window: Window, asked: Question[Any], answer: Answer[Any], take: Take) -> None:
        site = self._roster.sites[answer.node].site
        error = take(asked, answer)
        window.done.add(site)
        if error is None:
            window.took += 1
            return
        window.reasons[site] = error
        if answer.reply is None:
            window.again.add(site)

    def _lacking(self) -> str:
        left = [f"{self._roster.sites[node].site}: {why}" for node, why in self._roster.left_out.items()]
        at_work = f"{len(self._work)} sites are still at work" if self._work else "no other site can be asked"
        return f"{at_work}{f' ({left[0]})' if left else ''}; a round takes one update of each of {len(self._roster.sites)} sites."
