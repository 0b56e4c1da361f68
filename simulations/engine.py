"""Run a prepared simulation in this process: the ServerApp and the ClientApp over an in-process Grid."""

from contextlib import AbstractContextManager, nullcontext

from flwr.app import Context, RecordDict
from rich.console import Console

import client.app
import server.app
from client.app import site_from_context
from server.history.records import Kind, Outcome, Round, Run
from server.history.store import History
from server.observer import Observer
from shared.messages import JoinReply
from simulations import prepare
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


def play(run: str, database: str, console: Console | None) -> Run:
    """Play what is left of a prepared run, and return it finished; `console` shows its progress.

    Raises
    ------
    RunFailedError
        Where it cannot go on; it can be resumed.
    """
    live = None if console is None else Live(console)
    watching: AbstractContextManager[object] = nullcontext() if live is None else live
    observer: Observer = Silent() if live is None else live
    grid = InProcessGrid(client.app.build(site_from_context), prepare.site_files(run))
    context = Context(
        run_id=1,
        node_id=0,
        node_config={},
        state=RecordDict(),
        run_config={"run": str(prepare.run_folder(run)), "database": database, "engine": "in-process"},
    )
    with watching:
        server.app.build(observer)(grid, context)
    with History.open(database) as history:
        return history.run(run)
