"""What the coordinator remembers of the sites' ledgers, and what it takes for a ledger that has gone back.

A site numbers the events of a dataset's account without a gap, over all runs. The history keeps the largest
number that any run has seen, of a lost attempt too, so a ledger that is put back from an older copy shows:
its next number was used before. What was spent since the copy is then forgotten at the site, so that its
answers are not used, and it is not asked again in this run.

Two runs may use one ledger at once, and answers may overtake each other: a number is compared with what was
seen before the question was sent. What cannot be seen is a ledger put back and then charged, by runs of
another coordinator, beyond the number seen here; `moonflower privacy statement --verify` finds that by digests.
"""

from collections.abc import Collection, Iterable

from server.history.records import Ledger
from server.history.store import History
from shared.messages import EvaluateReply, JoinReply, TrainReply


class Ledgers:
    """The ledgers of one attempt at a run.

    Parameters
    ----------
    resumed
        The rounds that an earlier attempt may have had answers for, which this one never saw: the only ones
        whose answers may be resent under an old number. None in a run's first attempt.
    """

    def __init__(self, history: History, run: str, *, simulated: bool, study: bool, resumed: Collection[int]) -> None:
        self._history, self._run, self._simulated, self._resumed = history, run, simulated, resumed
        self._study = study
        self._before: dict[str, Ledger] = {}  # of the sites that joined
        self._at_join: dict[str, Ledger] = {}  # of all
        self._unwritten: dict[str, Ledger] = {}  # of a study's sites, seen and not in the history yet

    def look(self, sites: Iterable[JoinReply]) -> None:
        """Read what has been seen so far of these sites' ledgers: call it before a question of a round is sent to them."""
        self.write()
        self._before |= self._history.ledgers({site.ledger_id for site in sites})

    def look_at_all(self) -> None:
        """Read what has been seen of all ledgers: call it before sites are asked to join."""
        self._at_join = self._history.ledgers()

    def at_join(self, reply: JoinReply) -> str | None:
        """Say that a site's ledger has gone back or is another's, or remember how far it is; note an account that is new.

        An account's name stands in statements, for all to read: a site that answers under another's would make that one's
        ledger seem to have gone back.
        """
        before = self._at_join.get(reply.ledger_id)
        if before is not None and before.site != reply.site:
            return (
                f"site {reply.site} answers from the account {reply.ledger_id[:8]}, which is site {before.site}'s: an account "
                "belongs to one site, which keeps its name for as long."
            )
        if before is not None and reply.ledger_number < before.number:
            return _gone_back(reply.site, before.number, reply.ledger_number)
        if before is None and not self._simulated and (old := self._replaced(reply)):
            self._history.add_event(
                self._run,
                "warning",
                f"site {reply.site} keeps dataset {reply.dataset} in another account than before ({old.id[:8]}, "
                f"{old.number} events; now {reply.ledger_id[:8]}, {reply.ledger_number}): what the old one has spent "
                "on the same records is not in the new one.",
            )
        self._saw(reply, reply.dataset)
        return None

    def at_reply(self, reply: TrainReply | EvaluateReply, joined: JoinReply) -> str | None:
        """Say that a site's ledger has gone back or is another one, or remember how far it is."""
        if reply.ledger_id != joined.ledger_id:
            return f"site {reply.site} joined with the account {joined.ledger_id[:8]} and answers from {reply.ledger_id[:8]}."
        before = self._before.get(reply.ledger_id)
        known = max(joined.ledger_number, before.number if before else 0)
        if reply.ledger_number <= known and not self._resent(reply):
            return _gone_back(reply.site, known, reply.ledger_number - 1)
        self._saw(reply, joined.dataset)
        return None

    def _resent(self, reply: TrainReply | EvaluateReply) -> bool:
        """Whether an earlier attempt may have been given this very answer: its number belongs to no other."""
        return reply.round in self._resumed and self._history.charged(reply.ledger_id, reply.ledger_number) is None

    def _replaced(self, reply: JoinReply) -> Ledger | None:
        place = (reply.site, reply.dataset)
        known = (old for old in self._at_join.values() if (old.site, old.dataset) == place and not old.simulated)
        return max(known, key=lambda old: old.number, default=None)

    def _saw(self, reply: JoinReply | TrainReply | EvaluateReply, dataset: str) -> None:
        seen = Ledger(reply.ledger_id, reply.site, dataset, reply.ledger_number, self._simulated, self._run)
        self._unwritten[reply.ledger_id] = seen
        if not self._study:
            self.write()

    def write(self) -> None:
        """Write down what has been seen: at once, to outlive this process whatever ends it, but for a study's many ledgers."""
        if self._unwritten:
            self._history.saw_ledgers(list(self._unwritten.values()))
            self._unwritten.clear()


def shared_account(replies: Iterable[JoinReply]) -> tuple[str, str] | None:
    """Name two sites that answer from one account, if there are: what one of them spends, the other would."""
    owners: dict[str, str] = {}
    for reply in replies:
        if reply.ledger_id in owners:
            return owners[reply.ledger_id], reply.site
        owners[reply.ledger_id] = reply.site
    return None


def _gone_back(site: str, known: int, now: int) -> str:
    return f"the ledger of site {site} has gone back from {known} events to {now}: restored from a backup?"
