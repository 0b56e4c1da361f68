"""Flower's Grid in one process: the same ServerApp and ClientApp as a deployment, without a network.

A message runs its ClientApp when its reply is pulled, one at a time: the server folds in each reply before the
next one exists. This is one of two places that know Flower's internals (how a message gets its ids); a
contract test holds it against the installed version.
"""

import logging
from collections.abc import Iterable, Mapping
from itertools import count

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from shared.errors import let_interrupts_through

log = logging.getLogger("moonflower.simulation")


NodeConfig = dict[str, str | int | float | bool]  # what Flower gives a real SuperNode by `--node-config`


class InProcessGrid(Grid):
    """Virtual nodes, each a node configuration."""

    in_process = True  # for `server.mail`: what is pushed is `shared.messages.Held`

    def __init__(self, app: ClientApp, nodes: Mapping[int, NodeConfig], run_id: int = 1) -> None:
        self._app, self._nodes = app, nodes
        self._run = Run.create_empty(run_id)
        self._numbers = count(1)
        self._waiting: dict[str, Message] = {}
        self._contexts: dict[int, Context] = {}  # of nodes that keep something between two messages
        # Message() reads these to name its sender.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SUPERLINK_NODE_ID, 1

    def set_run(self, run: Run) -> None:
        """Set the Flower run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The Flower run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message, as `Message()` does."""
        return Message(content=content, dst_node_id=dst_node_id, message_type=message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the virtual nodes' ids."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages until their replies are pulled."""
        ids = []
        for message in messages:
            ids.append(self.name(message))
            self.give(message)
        return ids

    def name(self, message: Message) -> str:
        """Give a message its id; Flower's own hashes the content: 71 ms for 88 MB."""
        message_id = f"message-{next(self._numbers)}"
        message.metadata.__dict__["_message_id"] = message_id
        return message_id

    def give(self, message: Message) -> None:
        """Keep a message that has its id."""
        self._waiting[message.metadata.message_id] = message

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the first of these messages that waits, and return its reply."""
        wanted = message_ids if isinstance(message_ids, set) else set(message_ids)
        message_id = next((message_id for message_id in self._waiting if message_id in wanted), None)
        return [] if message_id is None else [self._answer(self._waiting.pop(message_id))]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:  # noqa: ARG002
        """Send messages and return their replies, one for each."""
        return [reply for message_id in self.push_messages(messages) for reply in self.pull_messages([message_id])]

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        try:
            context = self._contexts.get(node) or self._fresh(node)
            reply = self._app(message=message, context=context)
        except Exception as error:  # as a SuperNode does: a fault of one site is that site's error reply
            let_interrupts_through(error)
            log.exception("the ClientApp of node %d failed", node)
            return stand_in(message, type(error).__name__)
        if context.state:
            self._contexts[node] = context
        return reply

    def _fresh(self, node: int) -> Context:
        return Context(self._run.run_id, node, self._nodes[node], state=RecordDict(), run_config={})


def stand_in(message: Message, reason: str, code: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION) -> Message:
    """Return the error that answers a message in its ClientApp's place."""
    return Message(Error(code, reason), reply_to=message)
