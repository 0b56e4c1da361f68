"""What an export is made from: a committed round of a run, its checkpoint, its scores, and the run's statement."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from server import checkpoints, job
from server.history.records import Metric, Participation, Round, Run
from server.history.store import History
from server.optimization import ServerState
from server.privacy import statement as stating
from server.privacy.records import Statement, ranges
from shared.errors import NotFoundError
from shared.run_config import RunConfig


@dataclass(frozen=True)
class Source:
    """A round of a run, and what is said with it.

    The statement is the whole run's, whatever round is exported: a model chosen among rounds that were all seen
    costs what they all cost.
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


def read(history: History, run_id: str, run_folder: Path, round_number: int | None) -> Source:
    """Read the last committed round, or the one asked for.

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
    chosen = next((each for each in rounds if each.number == (round_number or rounds[-1].number)), None)
    if chosen is None:
        raise NotFoundError(f"Run {run.id} has no committed round {round_number}; its last is {rounds[-1].number}.")
    state = _state(found.checkpoints, rounds, chosen)
    statement = stating.make(stating.read(history, run), now=datetime.now(UTC))
    return Source(
        run=run,
        config=found.config,
        round=chosen,
        state=state,
        metrics=tuple(metric for _, metric in history.metrics(run.id, round_number=chosen.number)),
        sites=_sites(history.participations(run.id), chosen.number),
        statement=statement,
        simulated=statement.simulated or found.simulated,
        test_set=found.test_set,
    )


def _state(folder: Path, rounds: list[Round], chosen: Round) -> ServerState:
    if not checkpoints.path(folder, chosen.checkpoint.digest).is_file():
        kept = [each.number for each in rounds if checkpoints.path(folder, each.checkpoint.digest).is_file()]
        raise NotFoundError(
            f"The checkpoint of round {chosen.number} of run {chosen.run} is not in {folder}, which keeps those of rounds "
            f"{ranges(kept) or 'none'} (federation.keep_checkpoints); export one of them, or restore it from a backup."
        )
    return checkpoints.read(folder, chosen.checkpoint.digest)


def _sites(participations: list[tuple[int, Participation]], last: int) -> tuple[str, ...]:
    """Name the sites that sent an update up to a round."""
    answered = {
        part.site for number, part in participations if number <= last and part.kind == "train" and part.outcome == "ok"
    }
    return tuple(sorted(answered))
