"""What an export is made from: a committed round of a run, its checkpoint, its scores, and the run's statement."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from server import checkpoints, job
from server.export import choice
from server.history.records import Metric, Participation, Round, Run
from server.history.store import History
from server.optimization import ServerState
from server.privacy import statement as stating
from server.privacy.records import Statement
from shared.errors import NotFoundError
from shared.run_config import RunConfig
from shared.score_names import THRESHOLD


@dataclass(frozen=True)
class Source:
    """A round of a run, and what is said with it.

    The statement is the whole run's, whatever round is exported: a model chosen among rounds that were all seen
    costs what they all cost. `best` is the score by which this round is the best, where that was asked for.
    """

    run: Run
    config: RunConfig
    round: Round
    state: ServerState
    metrics: tuple[Metric, ...]  # of this round
    sites: tuple[str, ...]  # whose updates are in this round's model or in one before
    statement: Statement
    simulated: bool
    test_set: Path | None
    best: Metric | None
    thresholds: tuple[float, ...]  # of the labels, where they were chosen on released scores


def read(history: History, run_id: str, run_folder: Path, asked: choice.Asked) -> Source:
    """Read the round asked for.

    Raises
    ------
    NotFoundError
        Where there is no such run, folder or round, or its checkpoint is not kept.
    """
    run = history.run(run_id)
    if not (run_folder / job.RUN_FILE).is_file():
        raise NotFoundError(
            f"{run_folder} is not the folder of run {run.id}; export where the run was made, whose folder has its checkpoints."
        )
    found = job.load(run_folder)
    if found.run != run.id:
        raise NotFoundError(f"{run_folder} is the folder of run {found.run}, not of {run.id}.")
    rounds = history.rounds(run.id)
    if not rounds:
        raise NotFoundError(f"Run {run.id} has no committed round yet, and so no model; export it after its first.")
    scores = history.metrics(run.id)
    chosen = choice.choose(found.checkpoints, rounds, scores, asked)
    number = chosen.round.number
    statement = stating.make(stating.read(history, run), now=datetime.now(UTC))
    return Source(
        run=run,
        config=found.config,
        round=chosen.round,
        state=checkpoints.read(found.checkpoints, chosen.round.checkpoint.digest),
        metrics=tuple(metric for of, metric in scores if of == number),
        sites=_sites(history.participations(run.id), number),
        statement=statement,
        simulated=statement.simulated or found.simulated,
        test_set=found.test_set,
        best=chosen.by,
        thresholds=tuple(metric.value for of, metric in scores if of == number and _threshold(metric)),
    )


def _threshold(metric: Metric) -> bool:
    """Whether it says where a label's threshold lies."""
    return metric.scope == "validation" and metric.site is None and metric.name.startswith(THRESHOLD)


def _sites(participations: list[tuple[int, Participation]], last: int) -> tuple[str, ...]:
    """Name the sites that sent an update up to a round."""
    answered = {
        part.site for number, part in participations if number <= last and part.kind == "train" and part.outcome == "ok"
    }
    return tuple(sorted(answered))
