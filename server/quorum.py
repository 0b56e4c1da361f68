"""Which sites a round asks, whether enough have answered, and what then.

Fewer than the quorum: the run fails, goes on with those that answered, or asks those missing again, as
`federation.on_shortfall` says. A round without any update is never one.
"""

from server import ending, selection
from server.dispatch import Answer, Question
from server.history.store import History
from server.job import Job
from server.joining import FIRST, MOST, Roster
from shared.errors import RunFailedError
from shared.messages import TrainReply


class Quorum:
    """The training of one round, by the names of sites: a node's id may change while they are waited for."""

    def __init__(self, job: Job, roster: Roster, history: History, number: int) -> None:
        self._job, self._roster, self._history, self._number = job, roster, history, number
        self._federation = job.config.federation
        self._clock = roster.clock
        self._started, self._delay = self._clock.now(), FIRST
        self._asked: set[str] = set()
        self._folded: set[str] = set()
        self._unusable: set[str] = set()  # asked again, they would resend the same bytes
        self._reasons: dict[str, str] = {}  # why sites are missing

    def cohort(self) -> dict[int, str]:
        """Return the nodes to ask, with their sites' names, once enough sites are connected that can be asked.

        Raises
        ------
        RunFailedError
            Where they are not there in time: the others' budget is not spent on a round that cannot be.
        """
        least = self._federation.min_sites
        while len(able := self._roster.able()) < least:
            away = [reply.site for node, reply in self._roster.sites.items() if node not in self._roster.left_out]
            hopeless = self._federation.on_shortfall != "wait" and len(away) < least
            if hopeless or self._waited() > self._longest():
                if able and self._federation.on_shortfall == "continue":
                    self._note(
                        f"{len(able)} of the federation.min_sites={least} sites can be asked; it goes on with them."
                    )
                    break
                left = [f"{self._roster.sites[node].site}: {why}" for node, why in self._roster.left_out.items()]
                raise RunFailedError(
                    f"round {self._number}: {len(able)} of the federation.min_sites={least} sites are left"
                    + (f": {'; '.join(left)}" if left else "; the others are not connected, or still at work.")
                )
            self._pause()
        nodes = {node: able[node].site for node in selection.select(self._job.config, self._number, able)}
        self._asked |= set(nodes.values())
        return nodes

    def heard(self, answer: Answer[TrainReply], error: str | None) -> None:
        """Count an answer; `error` is None where its update was folded in."""
        site = self._roster.sites[answer.node].site
        if error is None:
            self._folded.add(site)
        else:
            self._reasons[site] = error
            self._unusable |= {site} if answer.reply is not None else set()

    def missing(self, question: Question[TrainReply]) -> dict[int, str]:
        """Return the nodes to ask again, and none where the round goes on.

        Raises
        ------
        RunFailedError
            Where too few sites have sent an update that can be used.
        """
        had, needed = len(self._folded), self._federation.quorum(len(self._asked))
        if had >= needed:
            return {}
        said = f"round {self._number}: {had} of the {self._needed(needed)} sites sent an update"
        if self._federation.on_shortfall == "continue" and had:
            self._note(f"{said}; it goes on with them.")
            return {}
        while self._federation.on_shortfall == "wait" and self._waited() < self._longest():
            self._pause(question)
            nodes = self._again(question)
            if nodes:
                self._asked |= set(nodes.values())
                return nodes
        raise RunFailedError(
            f"{said}; {next((f'{site}: {why}' for site, why in self._reasons.items()), 'no reason was given')}"
        )

    def _again(self, question: Question[TrainReply]) -> dict[int, str]:
        done = self._folded | self._unusable
        able = {node: reply.site for node, reply in self._roster.able(question).items() if reply.site not in done}
        if self._federation.sites_per_round is None:
            return able
        return {node: site for node, site in able.items() if site in self._asked}

    def _needed(self, needed: int) -> str:
        if needed == self._federation.min_sites:
            return f"federation.min_sites={needed}"
        return f"{needed} (federation.min_fraction={self._federation.min_fraction:g} of {len(self._asked)})"

    def _waited(self) -> float:
        return self._clock.now() - self._started

    def _longest(self) -> float:
        """Seconds of the round for which sites are waited for."""
        waits = self._federation.on_shortfall == "wait"
        return self._federation.longest_wait if waits else self._federation.deadline

    def _pause(self, question: Question[TrainReply] | None = None) -> None:
        if self._delay == FIRST:
            self._note("too few sites are there; it waits for more.")
        ending.check_stop(self._job, self._history)
        self._clock.wait(self._delay, self._clock.now() + self._delay)
        self._delay = min(2 * self._delay, MOST)
        self._roster.welcome(self._number, question)

    def _note(self, text: str) -> None:
        start = f"round {self._number}: "
        self._history.add_event(self._job.run, "warning", text if text.startswith(start) else start + text)
