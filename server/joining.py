"""Who takes part in a run: wait for the nodes, ask each, and keep those that join.

A site checks its data, model, policy and budget before it joins, so that a run that begins can end.
"""

import re
import time

from flwr.serverapp import Grid

from server.dispatch import ask
from server.history.store import History
from server.job import Job
from server.ledgers import Ledgers, shared_account
from server.observer import Observer
from shared import messages, models
from shared.errors import RunFailedError
from shared.messages import JoinReply, JoinRequest
from shared.models import LoadedModel
from shared.run_config import NAME_PATTERN

NAME = re.compile(NAME_PATTERN)
DEADLINE = 600.0  # seconds: a site reads and tokenises its data before it joins
LATECOMERS = 60.0  # seconds to wait for a run's other sites once federation.min_sites are connected


def join(
    job: Job, model: LoadedModel, grid: Grid, history: History, observer: Observer, ledgers: Ledgers
) -> dict[int, JoinReply]:
    """Return what each node that joins declares, by its node's id.

    Raises
    ------
    RunFailedError
        With the sites' reasons, where fewer than `federation.min_sites` join, or two go by one name or keep
        one account.
    """
    least = job.config.federation.min_sites
    request = JoinRequest(job.run, job.config.as_json(), model.base_digest, models.shapes(model.arrays()))
    sites: dict[int, JoinReply] = {}
    reasons: list[str] = []
    nodes = _nodes(job, grid, history)
    ledgers.look()
    for answer in ask(grid, "join", nodes, request, JoinReply, group="join", deadline=DEADLINE):
        error = answer.error if answer.reply is None else _undeclarable(answer.reply) or ledgers.at_join(answer.reply)
        if answer.reply is not None and error is None:
            sites[answer.node] = answer.reply
            continue
        reasons.append(error or answer.outcome)
        outcome = "failed" if answer.outcome == "ok" else answer.outcome
        history.add_event(job.run, "warning", f"node {answer.node} did not join: {error}")
        observer.answered(0, "join", f"node {answer.node}", outcome, error)
    names = sorted(reply.site for reply in sites.values())
    if len(set(names)) != len(names):
        raise RunFailedError(
            f"two nodes call themselves by one site's name: {names}; give each its own name in site.toml."
        )
    if pair := shared_account(sites.values()):
        raise RunFailedError(
            f"sites {pair[0]} and {pair[1]} answer from one account; give each its own ledger in site.toml."
        )
    if len(names) < least:
        raise RunFailedError(
            f"{len(names)} of the federation.min_sites={least} sites joined" + (f"; {reasons[0]}" if reasons else ".")
        )
    return sites


def _nodes(job: Job, grid: Grid, history: History) -> list[int]:
    """Wait for the nodes that the run needs, and a little for the rest of its sites: a grid can be empty at first."""
    federation, started = job.config.federation, time.monotonic()
    while len(nodes := list(grid.get_node_ids())) < max(federation.min_sites, job.sites):
        waited = time.monotonic() - started
        if len(nodes) >= federation.min_sites and waited > LATECOMERS:
            text = f"{len(nodes)} of the run's {job.sites} sites are connected; it goes on without the others."
            history.add_event(job.run, "warning", text)
            break
        if waited > federation.deadline:
            raise RunFailedError(
                f"{len(nodes)} of the federation.min_sites={federation.min_sites} sites are connected after "
                f"{federation.deadline:g} s; start them, then resume."
            )
        time.sleep(0.5)
    return nodes


def _undeclarable(reply: JoinReply) -> str | None:
    """Say what is wrong with a site's declaration: it goes into the history, and onto screens."""
    for setting, value in (("name", reply.site), ("dataset.id", reply.dataset)):
        if not NAME.fullmatch(value):
            return f"{setting}={value[:64]!r} is not a name; use {NAME.pattern} (site.toml)."
    if reply.records < 1:
        return f"dataset.records={reply.records} must be at least 1 (site.toml)."
    return messages.implausible(reply)
