"""The Flower ServerApp: wiring only. `server.rounds` is the run."""

import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server import job, rounds
from server.history.store import History
from server.observer import Log, Observer, Several
from server.patience import PatientHistory, insist
from server.progress import Progress
from shared import locks
from shared.errors import DatabaseAwayError
from shared.paths import default_database


def build(observer: Observer) -> ServerApp:
    """Return a ServerApp that plays the run whose folder the Flower run's configuration names.

    `run` is a folder with run.json, test.jsonl (public, optional) and checkpoints/; `database` the
    history's URL, the default one where it is empty; `engine` what the history calls this attempt. Under Flower
    the run's lock is held for as long as this process plays it, progress is written for watchers, and a database that
    is away is waited for. `authenticated` says whether nodes prove who they are: a supervised run's do, unless it is false.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        settings = context.run_config
        engine = str(settings.get("engine", "flower"))
        folder = Path(str(settings.get("run", "")))
        planned = job.load(folder)
        database = str(settings.get("database", "")) or default_database()
        with ExitStack() as held:
            watchers = [observer]
            if engine == "flower":
                _log_rounds()
                held.enter_context(locks.hold(folder / job.LOCK, f"run {planned.run}"))
            history = held.enter_context(_open(database, patient=engine == "flower"))
            if engine == "flower":
                watchers.append(held.enter_context(Progress(history, planned.run)))
            authenticated = bool(settings.get("authenticated", planned.supervised))
            rounds.run(planned, grid, history, Several(watchers), engine=engine, authenticated=authenticated)

    return app


def _open(database: str, *, patient: bool) -> History:
    if not patient:
        return History.open(database)
    return insist(partial(PatientHistory.open, database), DatabaseAwayError)


def _log_rounds() -> None:
    """Write the rounds' lines to standard error, which `flwr log` shows."""
    logging.getLogger("moonflower").setLevel(logging.INFO)
    if not logging.getLogger().handlers:
        logging.getLogger("moonflower").addHandler(logging.StreamHandler())


app = build(Log())
