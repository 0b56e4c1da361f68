"""A run's simulated time: its dynamics, as its folder has them, and how far its history has come."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from server import job
from server.history.store import History
from shared.messages import Kind
from simulations import elsewhere, nodes, pool, prepare
from simulations.dynamics import Dynamics, Weather
from simulations.grid import InProcessGrid, NodeConfig
from simulations.timeline import Before, TimedGrid

AHEAD = 2  # messages that a worker is given before it asks


def dynamics(run: str) -> Dynamics | None:
    """Return a prepared run's dynamics, or None where its sites are always there and take no time."""
    values = json.loads((prepare.run_folder(run) / job.RUN_FILE).read_text(encoding="utf-8"))
    return Dynamics.model_validate(values["dynamics"]) if "dynamics" in values else None


def around(run: str, grid: InProcessGrid, database: str, workers: int) -> Grid:
    """Return the grid in simulated time, where the run has dynamics."""
    if (given := dynamics(run)) is None:
        return grid
    planned, virtual = job.load(prepare.run_folder(run)), prepare.nodes(run)
    weather = Weather(given, planned.config.seed)
    name: Callable[[int], str] = cache(lambda node: site_name(virtual[node]))
    resident = pool.PoolResident()

    def began(node: int) -> None:
        site = nodes.site_from_context(Context(1, node, virtual[node], state=RecordDict(), run_config={}))
        with resident.ledger(site) as ledger:
            elsewhere.spend(ledger, site, planned.config, planned.run, weather.share(site.name))

    with History.open(database) as history:
        before = before_of(run, history, {name(node): node for node in virtual})
    return TimedGrid(
        *(grid, name, planned.config, weather),
        before=before,
        ahead=AHEAD * workers if workers > 1 else 1,
        began=began if given.budget is not None else lambda _: None,
    )


def site_name(config: NodeConfig) -> str:
    """Return what a virtual node's site is called."""
    if "site" in config:
        return Path(str(config["site"])).parent.name
    return pool.pool_at((Path(str(config["run"])) / pool.FOLDER).absolute()).assignment.names[
        int(config["partition-id"])
    ]


def before_of(run: str, history: History, node_of: dict[str, int]) -> Before:
    """Return what the run's earlier attempts left, by the rounds that they committed.

    Of buffered rounds that is what was under way at the last one's end. A late site of a synchronous round is still at what it
    was asked then.
    """
    last, begun, ends = history.last_round(run), dict[tuple[int, int, Kind], float](), {0: 0.0}
    if last is None:
        return Before()
    for done in history.rounds(run):
        ends[done.number] = ends[done.number - 1] + (done.simulated_seconds or 0.0)
    time = ends[last.number]
    for part in last.participations:
        if part.outcome == "pending":
            begun[node_of[part.site], part.asked or last.number, part.kind] = part.seconds
    for number, part in history.participations(run):
        if part.outcome != "timeout":
            continue
        sent = ends[number - 1] if part.kind == "train" else ends[number] - part.seconds
        begun[node_of[part.site], number, part.kind] = time - sent
    return Before(time, begun)
