"""A site that plays its SuperNode by hand: it says what an honest one never would, with its own, enrolled key."""

from base64 import b64decode
from collections.abc import Sequence
from typing import Any

import httpx
from doors import Door, Site, signed
from flwr.app import Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree


class Hand:
    """A node's calls, as its key may make them through a door."""

    def __init__(self, door: Door, site: Site, node: int) -> None:
        self.site, self.node = site, NodeProto(node_id=node)
        self._client = httpx.Client(base_url=f"https://{door.address}", verify=door.trust or False, timeout=60)

    def close(self) -> None:
        self._client.close()

    def call(self, name: str, request: Any, answer: Any) -> Any:
        """Make a call, and return its answer, or the response where it is refused."""
        headers = {**signed(self.site), "content-type": "application/protobuf"}
        response = self._client.post(f"/v1/fleet/{name}", headers=headers, content=request.SerializeToString())
        return answer.FromString(response.content) if response.status_code == 200 else response

    def activate(self) -> None:
        key = b64decode(signed(self.site)["flwr-public-key"])
        request = fleet_pb2.ActivateNodeRequest(public_key=key, heartbeat_interval=60)
        self.call("activate-node", request, fleet_pb2.ActivateNodeResponse)

    def pull(self) -> Message:
        """Take the next message."""
        request = fleet_pb2.PullMessagesRequest(node=self.node)
        (told,) = self.call("pull-messages", request, fleet_pb2.PullMessagesResponse).messages_list
        return make_message(metadata=metadata_from_proto(told.metadata), content=RecordDict())

    def announce(self, reply: Message, tree: message_pb2.ObjectTree | None = None) -> Any:
        """Push a message's envelope and its pieces' ids; return the answer, with the session of the upload."""
        reply.metadata.__dict__["_message_id"] = reply.object_id if tree is None else tree.object_id
        request = fleet_pb2.PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[tree or get_object_tree(reply)],
        )
        return self.call("push-messages", request, fleet_pb2.PushMessagesResponse)

    def upload(self, run: int, told: fleet_pb2.PushMessagesResponse, pieces: dict[str, bytes]) -> list[bool]:
        """Push those of the pieces, by their ids, that were asked for; return which were taken."""
        taken = []
        for piece in [piece for piece in pieces if piece in told.objects_to_push]:
            content, session = pieces[piece], told.session_id
            request = message_pb2.PushObjectRequest(
                node=self.node, run_id=run, object_id=piece, object_content=content, session_id=session
            )
            taken.append(self.call("push-object", request, message_pb2.PushObjectResponse).stored)
        return taken


def pieces_of(message: Message) -> dict[str, bytes]:
    """Return the pieces that a message is sent in, by their ids."""
    return {key: value.deflate() for key, value in get_all_nested_objects(message).items()}


def tree_of(root: str, children: Sequence[str] = ()) -> message_pb2.ObjectTree:
    """Write a tree of pieces by hand."""
    return message_pb2.ObjectTree(
        object_id=root, children=[message_pb2.ObjectTree(object_id=child) for child in children]
    )
