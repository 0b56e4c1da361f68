"""What a report is made of: one run, read from the history once, as of its last committed round.

A long run of many sites has millions of scores; a plot shows some hundred rounds of them. So all spends
and participations are read, because their sums must be right, and the scores of `sampled` rounds only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from server.history.records import Attempt, Event, Metric, Participation, Round, Run, Spend
from shared.errors import NotFoundError
from shared.score_names import telling

if TYPE_CHECKING:
    from server.history.store import History

T = TypeVar("T")
POINTS = 160  # rounds that a plot shows at most


@dataclass(frozen=True)
class Facts:
    """One run's history; numbers beside values are their rounds'."""

    run: Run
    attempts: Sequence[Attempt]
    events: Sequence[Event]
    rounds: Sequence[Round]  # without their parts
    participations: Sequence[tuple[int, Participation]]
    spends: Sequence[tuple[int, Spend]]
    metrics: Sequence[tuple[int, Metric]]  # of the sampled rounds
    sampled: Sequence[int]  # round numbers, the first and the last among them

    @property
    def phases(self) -> list[tuple[int, str]]:
        """The first round of each phase, and the phase's name."""
        before = [None, *(each.phase for each in self.rounds)]
        return [(each.number, each.phase) for each, old in zip(self.rounds, before, strict=False) if each.phase != old]

    @property
    def validated(self) -> str:
        """Name of the most telling score that sites' validation records gave."""
        names = telling({metric.name for _, metric in self.metrics if metric.scope == "validation"})
        return names[0] if names else "accuracy"

    @property
    def tested(self) -> str:
        """Name of the most telling score on the public test set."""
        names = telling({metric.name for _, metric in self.metrics if metric.scope == "test"})
        return names[0] if names else "accuracy"

    @property
    def sites(self) -> list[str]:
        """Every site that answered, was charged or was scored, by name."""
        names = {part.site for _, part in self.participations} | {spend.site for _, spend in self.spends}
        return sorted(names | {metric.site for _, metric in self.metrics if metric.site is not None})


def read(history: "History", run_id: str) -> Facts:
    """Read a run; `last` is the newest.

    Raises
    ------
    NotFoundError
        There is no such run.
    """
    if run_id == "last":
        newest = history.runs(limit=1)
        if not newest:
            raise NotFoundError("There is no run yet; `moonflower simulate` makes one.")
        run_id = newest[0].id
    run = history.run(run_id)
    rounds = history.rounds(run.id)
    last = rounds[-1].number if rounds else 0  # a round committed while we read is left out whole
    sampled = sample([each.number for each in rounds])
    if len(sampled) == len(rounds):
        metrics = history.metrics(run.id)
    else:
        metrics = [pair for number in sampled for pair in history.metrics(run.id, round_number=number)]
    return Facts(
        run=run,
        attempts=history.attempts(run.id),
        events=history.events(run.id),
        rounds=rounds,
        participations=_until(last, history.participations(run.id)),
        spends=_until(last, history.spends(run.id)),
        metrics=_until(last, metrics),
        sampled=sampled,
    )


def sample(numbers: Sequence[int], most: int = POINTS) -> list[int]:
    """Choose at most `most` (two or more) of the numbers, evenly spread, the first and the last among them."""
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[round(place * (len(numbers) - 1) / (most - 1))] for place in range(most)]


def _until(last: int, pairs: list[tuple[int, T]]) -> list[tuple[int, T]]:
    return [pair for pair in pairs if pair[0] <= last]
