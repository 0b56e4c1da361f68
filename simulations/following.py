"""Tells an observer of a run that plays in another process: by what that writes into the history as it goes."""

from dataclasses import replace

from server.history.records import Outcome, Progress, Round
from server.history.store import History
from simulations.progress import Live

OUTCOMES: dict[str, Outcome] = {
    "ok": "ok",
    "refused": "refused",
    "failed": "failed",
    "timeout": "timeout",
    "exhausted": "exhausted",
}


class Follower:
    """Reads on in a run's progress at each `look`; what was told before it was made is left out.

    The progress is best effort: the rounds themselves are in the history, whatever of it was dropped.
    """

    def __init__(self, history: History, run: str, live: Live) -> None:
        self._history, self._run, self._live = history, run, live
        self._seen = max((told.id for told in history.progress(run)), default=0)

    def look(self) -> None:
        """Tell what is new."""
        for told in self._history.progress(self._run, after=self._seen):
            self._seen = told.id
            self._tell(told)

    def _tell(self, told: Progress) -> None:
        live, number, text = self._live, told.round, told.text
        if told.kind == "run":
            if told.state == "joined":
                live.joined(self._history.run(self._run), text or "its sites")
        elif told.kind == "round":
            if told.state == "started":
                live.round_started(number, text or "")
            elif told.state == "committed":
                live.round_finished(self._round(number))
        elif told.site is not None and told.state == "late":
            live.late(number, told.kind, told.site, text or "")
        elif told.site is not None and told.state in OUTCOMES:
            live.answered(number, told.kind, told.site, OUTCOMES[told.state], text)

    def _round(self, number: int) -> Round:
        """Give a round with what is shown of it."""
        history, run = self._history, self._run
        (done,) = history.rounds(run, round_number=number)
        return replace(
            done,
            participations=tuple(part for _, part in history.participations(run, round_number=number)),
            metrics=tuple(metric for _, metric in history.metrics(run, round_number=number)),
            spends=tuple(spend for _, spend in history.spends(run, round_number=number)),
        )
