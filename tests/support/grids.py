"""A Grid like a SuperLink's: replies take their time, all that are there come at once, and nodes come and go."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from simulations.grid import InProcessGrid


@dataclass(frozen=True)
class Info:
    """What a SuperLink tells of a node."""

    node_id: int
    last_activated_at: str
    public_key: bytes


class WildGrid(InProcessGrid):
    """Virtual nodes that answer `delay(node, message's type, group)` seconds after they were asked.

    As at a SuperLink, a message is gone when its reply was pulled, what a node had taken is lost when it starts anew,
    and a node that is away answers with an error that names no node.
    """

    in_process = False

    def __init__(self, app, nodes, delay: Callable[[int, str, str], float] = lambda *_: 0.0, keys=None) -> None:
        super().__init__(app, nodes)
        self.delay, self.keys = delay, keys or {}
        self.away: set[int] = set()  # not connected
        self.starts: dict[int, int] = {}  # how often a node was started anew
        self.unpushable: set[int] = set()
        self.twice: set[int] = set()  # nodes whose replies come twice
        self.pushed: list[tuple[int, str, str]] = []  # node, type, group
        self.pulls: list[int] = []  # how many ids each pull asked for
        self._due: dict[str, tuple[float, int]] = {}

    def get_nodes(self) -> list[Info]:
        return [
            Info(node, f"start {self.starts.get(node, 0)}", self.keys.get(node, b""))
            for node in self._nodes
            if node not in self.away
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str | None]:
        ids: list[str | None] = []
        for message in messages:
            to = message.metadata
            if to.dst_node_id in self.unpushable:
                ids.append(None)
                continue
            (key,) = super().push_messages([message])
            self.pushed.append((to.dst_node_id, to.message_type, to.group_id))
            waits = self.delay(to.dst_node_id, to.message_type, to.group_id)
            self._due[key] = time.monotonic() + waits, self.starts.get(to.dst_node_id, 0)
            ids.append(key)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = list(message_ids)
        self.pulls.append(len(wanted))
        replies = []
        for key in wanted:
            if key not in self._waiting:
                continue
            message, (due, start) = self._waiting[key], self._due[key]
            node = message.metadata.dst_node_id
            if node in self.away:
                del self._waiting[key]
                replies.append(Message(Error(ErrorCode.NODE_UNAVAILABLE, "the node is gone"), reply_to=message))
            elif start == self.starts.get(node, 0) and time.monotonic() >= due:
                replies.append(self._answer(self._waiting.pop(key)))
                replies += [replies[-1]] if node in self.twice else []
        return replies
