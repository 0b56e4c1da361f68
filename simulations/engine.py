"""Run a prepared simulation in this process: the ServerApp and the ClientApp over an in-process Grid."""

import os
from contextlib import AbstractContextManager, nullcontext

from flwr.app import Context, RecordDict
from rich.console import Console

import server.app
from server import job
from server.history.records import Kind, Outcome, Round, Run
from server.history.store import History
from server.observer import Observer
from shared.messages import JoinReply
from simulations import nodes, prepare, timing
from simulations.grid import InProcessGrid
from simulations.progress import Live


class Silent:
    """Watches and says nothing."""

    def run_started(self, run: Run, sites: list[JoinReply]) -> None:
        """Say nothing."""

    def round_started(self, number: int, phase: str) -> None:
        """Say nothing."""

    def asked(self, number: int, kind: Kind, sites: list[str]) -> None:
        """Say nothing."""

    def answered(self, number: int, kind: Kind, site: str, outcome: Outcome, error: str | None) -> None:
        """Say nothing."""

    def late(self, number: int, kind: Kind, site: str, text: str) -> None:
        """Say nothing."""

    def round_finished(self, done: Round) -> None:
        """Say nothing."""


def play(run: str, database: str, console: Console | None, workers: int = 1) -> Run:
    """Play what is left of a prepared run, and return it finished.

    Parameters
    ----------
    console
        Shows its progress; None shows nothing.
    workers
        Processes that sites run in, each with a model of its own; 1: this process.

    Raises
    ------
    RunFailedError
        Where it cannot go on; it can be resumed.
    """
    live = None if console is None else Live(console)
    watching: AbstractContextManager[object] = nullcontext() if live is None else live
    observer: Observer = Silent() if live is None else live
    context = Context(
        run_id=1,
        node_id=0,
        node_config={},
        state=RecordDict(),
        run_config={"run": str(prepare.run_folder(run)), "database": database, "engine": "in-process"},
    )
    with grid_of(run, workers) as grid, watching:
        server.app.build(observer)(timing.around(run, grid, database, workers), context)
    with History.open(database) as history:
        return history.run(run)


def grid_of(run: str, workers: int) -> AbstractContextManager[InProcessGrid]:
    """Return the grid of a run's virtual nodes."""
    virtual = prepare.nodes(run)
    if workers == 1:
        return nullcontext(InProcessGrid(nodes.build(), virtual))
    from simulations.workers import WorkerGrid

    threads = max(1, (os.cpu_count() or 1) // workers)
    device = job.load(prepare.run_folder(run)).device
    return WorkerGrid(nodes.build, virtual, devices=_devices(workers, device), threads=threads)


def _devices(workers: int, device: str) -> list[str | None]:
    """Return the GPU that each worker sees, in turn; None where there is none to choose, or the run names one."""
    import torch

    gpus = torch.cuda.device_count() if device == "auto" else 0
    return [str(number % gpus) if gpus else None for number in range(workers)]
