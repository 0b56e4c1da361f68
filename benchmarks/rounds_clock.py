"""When the rounds of a run in this process end, and an end to the run after those that are timed."""

import time
from contextlib import suppress
from pathlib import Path

from server.history.records import Round
from server.history.store import History
from simulations import engine, prepare
from simulations.scenario import Scenario


class _Enough(Exception):
    """No error: the rounds that are timed have been played."""


def play(scenario: Scenario, work: Path, times: Path, rounds: int, workers: int, device: str = "cpu") -> None:
    """Prepare and play a run until `rounds` rounds have ended; write the time of each end, a line each.

    A scenario has one round more: in a run's last one all sites are scored, which is no part of a round of training.
    """

    class Clock(engine.Silent):
        def round_finished(self, done: Round) -> None:
            with times.open("a", encoding="utf-8") as file:
                file.write(f"{time.time():.6f}\n")
            if done.number == rounds:
                raise _Enough

    database = f"sqlite:///{work / 'history.db'}"
    with History.open(database) as history:
        run = prepare.prepare(scenario, history, device)
    quiet = engine.Silent
    engine.Silent = Clock  # type: ignore[misc]
    try:
        with suppress(_Enough):
            engine.play(run, database, None, workers=workers)
    finally:
        engine.Silent = quiet  # type: ignore[misc]
