"""Send requests to nodes and yield their answers as they come, naming who failed and why.

One reply at a time is in memory. A node's answer is matched by the message it replies to, because
Flower's own error replies do not always name their node.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from server.history.records import Outcome
from shared.messages import FLOWER_TYPES, Kind, MessageError, Refusal, from_record, size, to_record

R = TypeVar("R")
POLL = 0.05  # seconds between looks for replies that are not there yet
REFUSALS: dict[str, Outcome] = {"refused": "refused", "exhausted": "exhausted"}  # any other word: failed
LONGEST = 500  # characters of Flower's own error that the history keeps: its first line, and no traceback


@dataclass(frozen=True)
class Answer(Generic[R]):
    """A node's reply to one request, or why there is none; `seconds` is from the sending to the reply's arrival."""

    node: int
    outcome: Outcome
    reply: R | None
    error: str | None
    seconds: float
    bytes_down: int
    bytes_up: int


def ask(
    grid: Grid,
    kind: Kind,
    nodes: Sequence[int],
    request: Any,
    expected: type[R],
    *,
    group: str,
    deadline: float,
) -> Iterator[Answer[R]]:
    """Send one request to each node and yield one answer a node, in order of arrival.

    Nodes that have not answered `deadline` seconds after the request was sent are yielded last, as timeouts.
    """
    content = to_record(request)
    messages = [
        Message(content=content, dst_node_id=node, message_type=FLOWER_TYPES[kind], group_id=group) for node in nodes
    ]
    down = size(messages[0]) if messages else 0
    started = time.monotonic()
    sent = dict(zip(grid.push_messages(messages), nodes, strict=True))
    while sent:
        replies = list(grid.pull_messages(list(sent)))
        for message in replies:
            node = sent.pop(message.metadata.reply_to_message_id, None)
            if node is None:  # a second reply to one request: the first one counts
                continue
            yield _read(message, node, expected, time.monotonic() - started, down)
        if sent and not replies:
            if time.monotonic() - started > deadline:
                break
            time.sleep(POLL)
    for node in sent.values():
        yield Answer(node, "timeout", None, f"no reply within {deadline:g} s (federation.deadline).", deadline, down, 0)


def _read(message: Message, node: int, expected: type[R], seconds: float, down: int) -> Answer[R]:
    if message.has_error():
        return Answer(
            node,
            "failed",
            None,
            (message.error.reason or "").partition("\n")[0][:LONGEST] or f"Flower error {message.error.code}.",
            seconds,
            down,
            0,
        )
    up = size(message)
    try:
        reply: R | Refusal = from_record(message.content, expected, Refusal)
    except MessageError as error:
        return Answer(node, "failed", None, str(error), seconds, down, up)
    if isinstance(reply, Refusal):
        outcome = REFUSALS.get(reply.outcome, "failed")
        return Answer(node, outcome, None, reply.reason, seconds, down, up)
    return Answer(node, "ok", reply, None, seconds, down, up)
