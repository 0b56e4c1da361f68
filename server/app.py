"""The Flower ServerApp: wiring only. `server.rounds` is the run."""

import json
import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server import rounds
from server.history.store import History
from server.observer import Log, Observer
from server.rounds import Job
from shared.errors import ConfigError
from shared.paths import default_database
from shared.run_config import RunConfig, parse

RUN_FILE, TEST_FILE, CHECKPOINTS = "run.json", "test.jsonl", "checkpoints"


def build(observer: Observer) -> ServerApp:
    """Return a ServerApp that plays the run whose folder the Flower run's configuration names.

    `run` is a folder with run.json, test.jsonl (public, optional) and checkpoints/; `database` the
    history's URL, the default one where it is empty; `engine` what the history calls this attempt.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        settings = context.run_config
        engine = str(settings.get("engine", "flower"))
        if engine == "flower":
            _log_rounds()
        job = load_job(Path(str(settings.get("run", ""))))
        with History.open(str(settings.get("database", "")) or default_database()) as history:
            rounds.run(job, grid, history, observer, engine=engine)

    return app


def _log_rounds() -> None:
    """Write the rounds' lines to standard error, which `flwr log` shows."""
    logging.getLogger("moonflower").setLevel(logging.INFO)
    if not logging.getLogger().handlers:
        logging.getLogger("moonflower").addHandler(logging.StreamHandler())


def load_job(folder: Path) -> Job:
    """Read a run's folder.

    Raises
    ------
    ConfigError
        Where it is not one.
    """
    try:
        values = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        run, config_values = values["run"], values["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"run={str(folder)!r} is not the folder of a run; make one with `moonflower simulate --prepare` and pass its "
            "path, as in: flwr run . --run-config 'run=\"PATH\"'."
        ) from None
    config = parse(RunConfig, config_values, source=str(folder / RUN_FILE))
    test_set = folder / TEST_FILE
    places = folder / CHECKPOINTS, test_set if test_set.exists() else None
    return Job(run, config, *places, sites=int(values.get("sites", 0)))


app = build(Log())
