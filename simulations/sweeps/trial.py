"""One run of a sweep, in a process of its own: begun, or resumed where an earlier process left it.

`python -m simulations.sweeps.trial SWEEP CELL SEED`, with the history's URL in MOONFLOWER_DATABASE, where no other user of
the machine can read its password. It holds its place's lock for as long as it lives: nobody else begins the same run.
"""

import click
from rich.console import Console

from server.history.records import Trial
from server.history.store import History
from shared import locks
from shared.cli import main
from shared.paths import default_database
from simulations import engine, prepare
from simulations.cli import keep_quiet, stop_cleanly_on_sigterm
from simulations.sweeps.places import folder
from simulations.sweeps.plan import Plan


@click.command()
@click.argument("sweep")
@click.argument("cell", type=int)
@click.argument("seed", type=int)
def trial(sweep: str, cell: int, seed: int) -> None:
    """Play a sweep's run to its end; one that has ended is left as it is."""
    keep_quiet()
    stop_cleanly_on_sigterm()
    database, place = default_database(), Trial(sweep, cell, seed)
    with locks.hold(folder(sweep) / f"{cell}-{seed}.lock", f"sweep {sweep}, cell {cell}, seed {seed},"):
        with History.open(database) as history:
            plan = Plan.from_dict(history.sweep(sweep).plan)
            run = next((run for run in history.trials(sweep) if run.trial == place), None)
            if run is not None and run.status == "completed":
                return
            scenario = plan.of(plan.cells[cell - 1], seed)
            name = prepare.prepare(scenario, history, plan.device, trial=place) if run is None else run.id
        engine.play(name, database, Console(width=LINE))


LINE = 1000  # characters: the lines go to a log

if __name__ == "__main__":
    main(trial)
