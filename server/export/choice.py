"""Which round is exported: the last, one that is named, or the best by its released scores.

The best is chosen from scores that were published anyway, so that it costs no privacy. A round that is chosen for its
score has one that flatters it a little: most of it noise, where scores are noised.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from server import checkpoints
from server.history.records import Metric, Round
from server.privacy.records import ranges
from shared.errors import NotFoundError
from shared.score_names import telling, title

Asked = int | Literal["best", "last"]
DOWNWARDS = ("loss", "perplexity", "calibration_error", "wer", "cer")  # scores of which the lowest is the best


@dataclass(frozen=True)
class Choice:
    """A round, and by which score it is the best, where that was asked for."""

    round: Round
    by: Metric | None


def choose(folder: Path, rounds: list[Round], scores: list[tuple[int, Metric]], asked: Asked) -> Choice:
    """Choose among a run's committed `rounds`, by its (round, score) pairs.

    Raises
    ------
    NotFoundError
        Where there is no such round, no score, or the round's checkpoint is not in `folder`.
    """
    run, by = rounds[-1].run, None
    if asked == "best":
        number, by = _best(scores, run)
    else:
        number = rounds[-1].number if asked == "last" else asked
    chosen = next((each for each in rounds if each.number == number), None)
    if chosen is None:
        raise NotFoundError(f"Run {run} has no committed round {number}; its last is {rounds[-1].number}.")
    if not checkpoints.path(folder, chosen.checkpoint.digest).is_file():
        kept = [each.number for each in rounds if checkpoints.path(folder, each.checkpoint.digest).is_file()]
        best, remedy = ("the best ", _best_kept(scores, kept, run)) if asked == "best" else ("", "export one of them")
        raise NotFoundError(
            f"The checkpoint of {best}round {chosen.number} of run {run} is not in {folder}, which keeps those of rounds "
            f"{ranges(kept) or 'none'} (federation.keep_checkpoints); {remedy}, or restore it from a backup."
        )
    return Choice(chosen, by)


def _best_kept(scores: list[tuple[int, Metric]], kept: list[int], run: str) -> str:
    """Name the best of the rounds that are kept, where they have a score."""
    left = [(number, each) for number, each in scores if number in kept]
    if not left:
        return "export one of them"
    number, by = _best(left, run)
    return f"export the best of them, --round {number} ({title(by.name)} {by.value:.3f})"


def _best(scores: list[tuple[int, Metric]], run: str) -> tuple[int, Metric]:
    """Return the round of the best validation score over all sites, or else of the best public test score.

    It is the task's most telling score. Of equal ones the latest counts.
    """
    for scope in ("validation", "test"):
        found = [(number, each) for number, each in scores if each.scope == scope and each.site is None]
        names = telling(each.name for _, each in found)
        if names:
            name = names[0]
            sign = -1 if name in DOWNWARDS else 1
            of_name = [(number, each) for number, each in found if each.name == name and each.value == each.value]
            if of_name:
                return max(of_name, key=lambda pair: (sign * pair[1].value, pair[0]))
    raise NotFoundError(
        f"Run {run} has no score by which a round could be the best; export the last with --round last."
    )
