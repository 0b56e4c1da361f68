"""The contract with the installed Flower: what the node relies on, and no document promises."""

import inspect
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from flwr.app.message.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse, PullTaskInputResponse
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, iterate_object_tree
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import fleet_http_connection, start_client_internal

from client.node import runtime, supernode
from client.node.runtime import Envelope
from shared.messages import Refusal, TrainRequest, from_record, to_record


def sent() -> Envelope:
    """Make a request as it comes out of the SuperNode."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 1
    request = TrainRequest("run", "{}", 3, {"weight": np.arange(6, dtype=np.float32).reshape(2, 3)})
    message = Message(to_record(request), dst_node_id=7, message_type="train", group_id="3")
    objects = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    name = message.object_id
    message.metadata.__dict__["_message_id"] = name
    bare = message_to_proto(remove_content_from_message(message)).SerializeToString()
    return Envelope(bare, name, objects, task=5, run=2, node=7)


def test_a_message_comes_out_of_its_objects_as_it_was_sent() -> None:
    message, context = runtime.unseal(sent())
    request = from_record(message.content, TrainRequest)
    assert (request.run, request.round) == ("run", 3)
    assert np.array_equal(request.arrays["weight"], np.arange(6, dtype=np.float32).reshape(2, 3))
    assert (context.run_id, context.node_id, context.run_config, context.node_config) == (2, 7, {}, {})


def test_a_reply_names_the_message_that_it_answers_and_all_its_objects() -> None:
    envelope = sent()
    reply = Message(to_record(Refusal("clinic", "failed", "so it is")), reply_to=runtime.header(envelope))
    sealed = runtime.seal(reply)
    metadata = ProtoMessage.FromString(sealed.header).metadata
    assert metadata.reply_to_message_id == envelope.name
    assert (metadata.src_node_id, metadata.run_id, metadata.message_type) == (7, 2, "train")
    tree = ObjectTree.FromString(sealed.tree)
    assert metadata.message_id == tree.object_id
    assert {node.object_id for node in iterate_object_tree(tree)} == set(sealed.objects)


def test_objects_that_are_no_message_are_refused() -> None:
    envelope = sent()
    other = next(name for name in envelope.objects if name != envelope.name)
    with pytest.raises((TypeError, KeyError)):
        runtime.unseal(Envelope(envelope.header, other, envelope.objects, 5, 2, 7))


class HalfASuperNode:
    """A Runtime API with a message of which no object ever comes: its run has ended on the way."""

    def __init__(self, envelope: Envelope) -> None:
        tree = get_all_nested_objects(remove_content_from_message(runtime.header(envelope)))
        self.tree, self.header = ObjectTree(object_id=next(iter(tree))), ProtoMessage.FromString(envelope.header)

    def PullTaskInput(self, _: object) -> PullTaskInputResponse:
        return PullTaskInputResponse()

    def PullMessages(self, _: object) -> PullAppMessagesResponse:
        return PullAppMessagesResponse(messages_list=[self.header], message_object_trees=[self.tree])

    def PullObject(self, _: object) -> PullObjectResponse:
        return PullObjectResponse(object_found=True, object_available=False)


def test_a_message_whose_run_has_ended_on_its_way_is_given_up_at_once() -> None:
    half = HalfASuperNode(sent())
    task = runtime.Task(half, 5)  # type: ignore[arg-type]
    with pytest.raises(runtime.RuntimeApiError, match="has ended"):
        task.pull(lambda: None, {half.header.metadata.message_id})
    with pytest.raises(runtime.RuntimeApiError, match="did not come"):
        task.pull(lambda: None, {"another"}, no_progress=0.05)


def test_the_lines_that_tell_how_the_connection_stands_are_the_installed_releases() -> None:
    from flwr.supercore.retry import http_retry

    started, connection = inspect.getsource(start_client_internal), inspect.getsource(fleet_http_connection)
    assert '"SuperNode ID: %s"' in started
    assert '"Sent successfully"' in started
    assert "time.sleep(3)" in started
    assert '"Failed to receive message %s: %s"' in started
    assert '"Failed to send message %s: %s"' in started
    assert '"Run ID %s is not in `RUNNING` status. Ignoring message %s."' in started
    assert "while not (reply_messages := state.get_messages_legacy(is_reply=True)):" in started  # of whatever message
    assert supernode.IGNORED.match("Run ID 7 is not in `RUNNING` status. Ignoring message ab12.")[1] == "ab12"
    assert issubclass(RunNotRunningException, BaseException)
    assert not issubclass(RunNotRunningException, Exception), "or Flower ends the task itself"
    assert "Connection attempt failed, retrying in" in inspect.getsource(http_retry)
    assert "Connection successful after" in inspect.getsource(http_retry)
    assert f"[code: {ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:d}]" == supernode.ONLINE
    assert 'f"[code: {flower_error.code}]' in connection
    assert "log(ERROR, exc)" in connection, "what ends the main thread is said as an error"


@pytest.mark.parametrize(
    ("line", "level", "said"),
    [
        ("\x1b[92mINFO \x1b[0m:      SuperNode ID: 17", "INFO", "SuperNode ID: 17"),
        ("INFO :      SuperNode ID: 17", "INFO", "SuperNode ID: 17"),
        ("\x1b[91mERROR \x1b[0m:     [SSL] broken", "ERROR", "[SSL] broken"),
    ],
)
def test_a_line_of_the_supernode_is_read_with_and_without_colour(line: str, level: str, said: str) -> None:
    found = supernode.LINE.match(line)
    assert found is not None
    assert found.groups() == (level, said)


def test_the_programs_are_found_beside_the_interpreter() -> None:
    assert Path(supernode.program("flower-supernode")).exists()
