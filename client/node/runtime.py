"""Flower's side of a node: take a task from the SuperNode's Runtime API, read its message, give the reply.

The one module of the client that knows Flower's internals; tests/client/node/test_runtime.py is its contract with
the installed release. A task's input comes with the app bundle that the coordinator sent: it is received, because it
is a field of the answer, and forgotten. Nothing here writes, unpacks, installs or imports it.
"""

import logging
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import httpx
from flwr.app import Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import SubStatus
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from shared.errors import MoonflowerError

log = logging.getLogger("moonflower.node")
R = TypeVar("R")

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
TRIES = 3  # of a call that met a closed or lost connection
BEAT = 10.0  # seconds between a task's heartbeats; without one for a minute Flower gives the task up
NO_PROGRESS = 90.0  # seconds without a new object after which a message counts as lost: Flower would wait two hours
MOST_BYTES = 4 * 2**30  # of one message


class RuntimeApiError(MoonflowerError):
    """The SuperNode did not answer, or not as asked; `status` is its HTTP status, if it gave one."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Envelope:
    """A message as it came: not opened yet, so that whoever holds it need not read what another wrote."""

    header: bytes  # Flower's Message without its content
    name: str  # object id, which is the message's
    objects: dict[str, bytes]
    task: int
    run: int
    node: int


@dataclass(frozen=True)
class Sealed:
    """A reply as it goes: the header, the tree of its objects, the objects."""

    header: bytes
    tree: bytes
    objects: dict[str, bytes]


class Runtime:
    """The Runtime API of one SuperNode.

    Parameters
    ----------
    address : str
        HOST:PORT, on the loopback.
    ca : bytes
        The authority of its certificate, PEM.
    secret : bytes
        Shared with the SuperNode: who does not hold it gets no task.
    """

    def __init__(self, address: str, ca: bytes, secret: bytes) -> None:
        self._address, self._ca = address, ca
        self._client = self._connect(SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={ACQUIRE}))

    def acquire(self) -> "Task | None":
        """Take the oldest task that waits, if one does.

        Raises
        ------
        RuntimeApiError
            Where the SuperNode is not there, or does not know the secret (401).
        """
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        answer = _call(lambda: self._client.AcquireTask(request), tries=1)
        if not (answer.HasField("task") and answer.token):
            return None
        return Task(self._connect(RuntimeTokenHttpInterceptor(answer.token)), answer.task.task_id)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _connect(self, credentials: SuperExecAuthHttpInterceptor | RuntimeTokenHttpInterceptor) -> RuntimeHttpClient:
        # Without Flower's retries: they send this process an interrupt where the SuperNode answers 401.
        return RuntimeHttpClient.from_server_address(
            self._address,
            insecure=False,
            root_certificates=self._ca,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="moonflower"), credentials],
        )


class Task:
    """One acquired task: pull its message, push the reply, finish it. Whoever acquires one must do all three."""

    def __init__(self, client: RuntimeHttpClient, number: int) -> None:
        self.number = number
        self._client = client
        self._node, self._run = Node(), 0

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Send heartbeats until the block ends, then close the connection."""
        done = threading.Event()
        thread = threading.Thread(target=self._beat, args=(done,), name=f"heartbeat of task {self.number}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._client.close()

    def _beat(self, done: threading.Event) -> None:
        while not done.is_set():
            try:
                if not _call(lambda: self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())).success:
                    log.warning("the SuperNode has given up task %d; its reply will not be taken", self.number)
                    return
            except RuntimeApiError as error:
                log.warning("no heartbeat for task %d: %s", self.number, error)
            done.wait(BEAT)

    def pull(
        self, tick: Callable[[], None], dropped: Container[str] = (), no_progress: float = NO_PROGRESS
    ) -> Envelope | None:
        """Pull the task's message as its objects arrive, or None where the SuperNode has dropped it.

        Parameters
        ----------
        tick : Callable[[], None]
            Called between objects; what it raises ends the pull.
        dropped : Container[str]
            The ids of messages of which nothing more comes, as they become known.
        no_progress : float
            Seconds without a further object after which the message counts as lost.

        Raises
        ------
        RuntimeApiError
            Where an object does not come, or the SuperNode is gone.
        """
        given = _call(lambda: self._client.PullTaskInput(PullTaskInputRequest()))
        self._run, self._node = given.run.run_id, Node(node_id=given.context.node_id)
        del given  # with the bundle
        found = _call(lambda: self._client.PullMessages(PullAppMessagesRequest()))
        if not found.messages_list:
            return None
        tree = found.message_object_trees[0]
        objects: dict[str, bytes] = {}
        size, delay, last = 0, 0.01, time.monotonic()
        wanted = list(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)))
        while wanted:
            tick()
            content = self._object(wanted[0])
            if content is None:
                if found.messages_list[0].metadata.message_id in dropped:
                    raise RuntimeApiError("the run of a message has ended before it was here.")
                if time.monotonic() - last > no_progress:
                    raise RuntimeApiError(f"{len(wanted)} objects of a message did not come within {no_progress:g} s.")
                time.sleep(delay)
                delay = min(2 * delay, 0.5)
                continue
            objects[wanted.pop(0)] = content
            delay, last, size = 0.01, time.monotonic(), size + len(content)
            if size > MOST_BYTES:
                raise RuntimeApiError(f"a message is above {MOST_BYTES} bytes.")
        confirm = ConfirmMessageReceivedRequest(node=self._node, run_id=self._run, message_object_id=tree.object_id)
        _call(lambda: self._client.ConfirmMessageReceived(confirm))
        header = found.messages_list[0].SerializeToString()
        return Envelope(header, tree.object_id, objects, self.number, self._run, self._node.node_id)

    def _object(self, name: str) -> bytes | None:
        request = PullObjectRequest(node=self._node, run_id=self._run, object_id=name)
        answer = _call(lambda: self._client.PullObject(request))
        if not answer.object_found:
            raise RuntimeApiError("an object of a message is not there any more.")
        return answer.object_content if answer.object_available else None

    def push(self, reply: Sealed, *, ok: bool) -> None:
        """Push the reply and finish the task.

        Raises
        ------
        RuntimeApiError
            Where the SuperNode does not take it: it waits for this reply, so that it must be started again.
        """
        request = PushAppMessagesRequest(
            messages_list=[ProtoMessage.FromString(reply.header)],
            message_object_trees=[ObjectTree.FromString(reply.tree)],
        )
        taken = _call(lambda: self._client.PushMessages(request))
        for name in taken.objects_to_push:
            content = PushObjectRequest(
                node=self._node,
                run_id=self._run,
                object_id=name,
                object_content=reply.objects[name],
                session_id=taken.session_id,
            )
            if not _call(lambda content=content: self._client.PushObject(content)).stored:  # type: ignore[misc]
                raise RuntimeApiError("the SuperNode did not store a part of the reply.")
        self.finish(ok=ok)

    def finish(self, *, ok: bool) -> None:
        """Finish the task, as failed where it was not `ok`. Flower's context stays as it was: nothing here uses it."""
        status, details = (SubStatus.COMPLETED, "") if ok else (SubStatus.FAILED, "refused or failed")
        _call(lambda: self._client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details)))


def _call(call: Callable[[], R], tries: int = TRIES) -> R:
    for attempt in range(1, tries + 1):
        try:
            return call()
        except httpx.TransportError as error:
            if attempt == tries:
                raise RuntimeApiError(f"the SuperNode does not answer ({type(error).__name__}).") from None
            time.sleep(0.1)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            raise RuntimeApiError(f"the SuperNode answers {status} to {error.request.url.path}.", status) from None
    raise AssertionError  # unreachable: the last attempt returns or raises


def header(envelope: Envelope) -> Message:
    """Return the message without its content, which is enough to reply to it."""
    message = message_from_proto(ProtoMessage.FromString(envelope.header))
    message.metadata.__dict__["_message_id"] = envelope.name  # a message is called by its object
    return message


def unseal(envelope: Envelope) -> tuple[Message, Context]:
    """Open a message: in the worker, because what is in it was written by another. Its objects are used up."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = envelope.task, envelope.run, envelope.node
    opened = inflate_object_from_contents(envelope.name, envelope.objects)
    if not isinstance(opened, Message) or not opened.has_content():
        raise TypeError("what came is no message with a content.")
    message = make_message(metadata=header(envelope).metadata, content=opened.content)
    context = Context(
        run_id=envelope.run,
        node_id=envelope.node,
        node_config={},
        state=RecordDict(),
        run_config={},
        series_id=envelope.run,
    )
    return message, context


def seal(reply: Message) -> Sealed:
    """Take a reply apart into what is pushed."""
    reply.metadata.__dict__["_message_id"] = reply.object_id
    bare = message_to_proto(remove_content_from_message(reply)).SerializeToString()
    with no_object_id_recompute():
        tree = get_object_tree(reply).SerializeToString()
        objects = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
    return Sealed(bare, tree, objects)
