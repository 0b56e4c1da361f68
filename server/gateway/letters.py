"""What a node may hand in: replies in its own name. The one body that the door looks into.

The SuperLink ties a call's node id to the key that signed it, and leaves what a message says of its own sender as it
is: a site that knew another's node id could ask it for work as the coordinator does, or answer for it.
"""

from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError

from server.gateway.request import Refusal


def check(body: bytes) -> bytes:
    """Return the body of a push-messages call in which each message is a reply by the node that makes the call.

    Raises
    ------
    Refusal
        400 for any other.
    """
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        raise Refusal(400, "letters", "the messages cannot be read") from None
    for message in request.messages_list:
        said = message.metadata
        if not said.reply_to_message_id or said.src_node_id != request.node.node_id:
            raise Refusal(400, "letters", "a node hands in replies in its own name, and nothing else")
    return body
