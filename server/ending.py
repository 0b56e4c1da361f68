"""How an attempt ends, and whether the run ends with it.

A run that a daemon supervises ends only by what another attempt would not mend: a setting, a quorum that is not
there, a wish to stop. What the machine did (a full disk, a lost database, a signal) ends the attempt alone.
"""

import logging
from typing import Literal

from server.history.store import History
from server.job import Job
from shared.errors import DatabaseError, MachineError, MoonflowerError, RunFailedError, interrupted

log = logging.getLogger("moonflower.run")


class StopRequestedError(RunFailedError):
    """Somebody has asked for the run to be stopped."""


def check_stop(job: Job, history: History) -> None:
    """Raise where a stop of a supervised run was requested."""
    if job.supervised and history.run(job.run).stop_requested_at is not None:
        raise StopRequestedError("a stop was requested; resume goes on after the last committed round.")


def close(job: Job, history: History, attempt: int, error: BaseException) -> None:
    """Write down how an attempt ended that `error` ended, and end the run where that is final.

    Whoever calls this raises `error` on: it is not hidden by a database that is away, too.
    """
    outcome, reason, final = _judged(error, supervised=job.supervised)
    try:
        # Without patience: a process that is told to go has none.
        History.end_attempt(history, job.run, attempt, outcome, reason)
        if final or (job.supervised and History.run(history, job.run).stop_requested_at is not None):
            History.finish_run(history, job.run, outcome, attempt=attempt)
    except (DatabaseError, RunFailedError) as failed:  # superseded, or away: the attempt counts as lost then
        log.error("attempt %d of run %s could not be closed: %s", attempt, job.run, failed)


def _judged(error: BaseException, *, supervised: bool) -> tuple[Literal["stopped", "failed"], str, bool]:
    reason = str(error) or type(error).__name__
    if isinstance(error, StopRequestedError):
        return "stopped", reason, True
    if interrupted(error) or not isinstance(error, Exception):  # a signal, or Flower's word that its run has ended
        return "stopped", "interrupted by a person or a signal", not supervised
    machine = isinstance(error, MachineError | DatabaseError) or not isinstance(error, MoonflowerError)
    return "failed", reason, not (supervised and machine)
