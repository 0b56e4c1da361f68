"""Flower's Grid as the coordinator uses it: who is connected, messages out, a bounded number of replies in.

Whatever fails here is the machine's fault, or the network's: the attempt ends, and the next one goes on.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from flwr.app import DEFAULT_TTL, Message, RecordDict
from flwr.serverapp import Grid

from shared.errors import MachineError, MoonflowerError, let_interrupts_through
from shared.messages import FLOWER_TYPES, Kind

MEMORY = 64 * 2**20  # bytes of honest replies that are fetched at once
LONGEST = 300  # characters of another library's error
Fetch = Callable[[Sequence[str], int], Iterator[Message]]


@dataclass(frozen=True)
class Node:
    """A node that is connected. `activated` changes when it was started anew, `public_key` is PEM; empty where unknown."""

    id: int
    activated: str = ""
    public_key: bytes = b""


def connected(grid: Grid) -> dict[int, Node]:
    """Return the nodes that are connected now, by their ids."""
    with _reached():
        if (get_nodes := getattr(grid, "get_nodes", None)) is not None:  # of a real SuperLink
            online = [Node(each.node_id, each.last_activated_at, each.public_key) for each in get_nodes()]
        else:
            online = [Node(node) for node in grid.get_node_ids()]
    return {node.id: node for node in online}


def push(grid: Grid, kind: Kind, number: int, content: RecordDict, nodes: Sequence[int]) -> dict[int, str]:
    """Send one content to nodes; return the message's id for each node whose message was taken."""
    if not nodes:
        return {}
    group = str(number) if number else "join"
    messages = [Message(content, node, FLOWER_TYPES[kind], ttl=_ttl(), group_id=group) for node in nodes]
    with _reached():
        ids = list(grid.push_messages(messages))
        if not ids and len(messages) > 1:  # too large together; Flower says no more than that
            ids = [(list(grid.push_messages([message])) or [""])[0] for message in messages]
    return {node: key for node, key in zip(nodes, ids, strict=False) if key}


def _ttl() -> float:
    """Return a time to live that nobody guesses.

    A message's id is a digest of all that it says, and whoever knows the id may have the message forgotten.
    """
    return DEFAULT_TTL - secrets.randbelow(2**30) / 2**30


def in_process(grid: Grid) -> bool:
    """Whether the grid's nodes are on this machine and read `shared.messages.Held`, and each pull gives few replies."""
    return bool(getattr(grid, "in_process", False))


def fetcher(grid: Grid) -> Fetch:
    """Return what yields the replies to messages that are there, when an honest reply has at most so many bytes.

    Of a real SuperLink a reply is fetched piece by piece, and never more of it; from nodes of this machine as they come;
    elsewhere in shares of `MEMORY`. Whoever stops in the middle has the rest at the next call.
    """
    if in_process(grid):
        return partial(_fetch_each, grid, [])
    if not hasattr(type(grid), "_runtime_client"):  # as flwr's HttpGrid has, whose module takes a second to import
        return partial(_fetch, grid, [])
    from server.parcels import Parcels

    parcels = Parcels(cast(Any, grid))

    def fetch(ids: Sequence[str], largest: int) -> Iterator[Message]:
        with _reached():
            yield from parcels.fetch(ids, largest)

    return fetch


def _fetch_each(grid: Grid, pulled: list[Message], ids: Sequence[str], largest: int) -> Iterator[Message]:  # noqa: ARG001
    wanted = set(ids)
    yield from _out_of(pulled, wanted)
    with _reached():
        while replies := list(grid.pull_messages(wanted)):
            pulled += replies
            del replies
            yield from _out_of(pulled, wanted)


def _fetch(grid: Grid, pulled: list[Message], ids: Sequence[str], largest: int) -> Iterator[Message]:
    share = max(1, MEMORY // largest)
    yield from _out_of(pulled, set(ids))
    for start in range(0, len(ids), share):
        with _reached():
            pulled += grid.pull_messages(ids[start : start + share])
        yield from _out_of(pulled, set(ids))


def _out_of(pulled: list[Message], wanted: set[str]) -> Iterator[Message]:
    """Take the wanted replies out of those that were pulled, one by one."""
    place = 0
    while place < len(pulled):
        if pulled[place].metadata.reply_to_message_id in wanted:
            yield pulled.pop(place)
        else:
            place += 1


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except MoonflowerError:
        raise
    except Exception as error:  # of httpx, of the SuperLink, of Flower
        let_interrupts_through(error)
        said = str(error).partition("\n")[0][:LONGEST]
        raise MachineError(f"the SuperLink does not do its part ({type(error).__name__}: {said}).") from error
