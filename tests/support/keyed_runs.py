"""A run over sites in one process whose random numbers follow from each request: played again, it comes to the same bits.

As a script it plays a run and kills itself with SIGKILL: `keyed_runs.py RUN HOME ROUND SITE`, when that site's update is there.
"""

import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import client.app
from client.privacy.randomness import Keystream
from server import job, rounds
from server.history.records import Run
from server.history.store import History
from server.observer import Log
from simulations import prepare, scenario
from simulations.grid import InProcessGrid


def keyed(request_id: str) -> Keystream:
    """Give the same draws for the same round and kind, whatever the run is called."""
    return Keystream(hashlib.sha256(request_id.partition("/")[2].encode()).digest())


def lay_out(file: Path, home: Path, settings: dict[str, Any]) -> str:
    """Lay out a run of a scenario in a home of its own, and give its id."""
    os.environ["MOONFLOWER_HOME"] = str(home)
    home.mkdir(parents=True, exist_ok=True)
    with History.open(f"sqlite:///{home / 'history.db'}") as history:
        return prepare.prepare(scenario.load(str(file), settings), history)


def play(run: str, home: Path, observer: Log | None = None, app_of: Callable[[Any], Any] = lambda app: app) -> Run:
    """Play what is left of a run; `app_of` may stand between the coordinator and the sites."""
    os.environ["MOONFLOWER_HOME"] = str(home)
    grid = InProcessGrid(app_of(client.app.build(client.app.site_from_context, keyed)), prepare.nodes(run))
    with History.open(f"sqlite:///{home / 'history.db'}") as history:
        return rounds.run(job.load(prepare.run_folder(run)), grid, history, observer or Log(), engine="in-process")


class Kill(Log):
    """Kill this process when a site's update of a round is there."""

    def __init__(self, number: int, site: str) -> None:
        self._place = (number, "train", site)

    def answered(self, number: int, kind: str, site: str, outcome: str, error: str | None) -> None:
        """Die, without a word."""
        if (number, kind, site) == self._place:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    play(sys.argv[1], Path(sys.argv[2]), Kill(int(sys.argv[3]), sys.argv[4]))
