"""Replies, fetched from the SuperLink piece by piece: bounded in bytes, never waited for, and read at one's own risk.

Flower's `HttpGrid.pull_messages` fetches a reply whole before anyone can say how large it may be, waits two hours for a
piece that a site has announced and not sent, and lets what cannot be read fail the whole attempt: one site could end
a run so. This is one of the places that know Flower's internals; a contract test holds it against a real SuperLink.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from shared.errors import let_interrupts_through

if TYPE_CHECKING:
    from flwr.superlink.grid.http_grid import HttpGrid

MOST_PIECES = 10_000  # of a reply: 50 GB of arrays
FRAME = 4096  # bytes of a piece beside its content
SLACK = 2**20  # bytes of a reply beside what it says
NOT_WHOLE = "the reply was announced, and did not arrive whole."


@dataclass
class Parcel:
    """A reply that a site has announced: its envelope, as the SuperLink checked it, and its pieces' ids."""

    envelope: Metadata
    pieces: list[str]  # the one that its sender sends last comes first
    missing: str | None = None  # the piece that was not there at the last look


class Lost(Exception):
    """A piece will not come any more."""


class TooLarge(Exception):
    """The reply is larger than it may be."""


class Parcels:
    """The replies of a Flower run that are announced and not fetched yet."""

    def __init__(self, grid: "HttpGrid") -> None:
        self._grid = grid
        self._open: dict[str, Parcel] = {}  # by the message that they answer

    def fetch(self, ids: Sequence[str], largest: int) -> Iterator[Message]:
        """Yield the replies to these messages that are there whole, one in memory at a time.

        A reply of more than `largest` bytes, one that cannot be read and one that will never be whole are yielded as
        Flower's own errors are: with what they answer, and a reason.
        """
        self._look(ids)
        for key in [key for key in ids if key in self._open]:
            parcel = self._open[key]
            try:
                contents = self._contents(parcel, largest)
                if contents is None:
                    continue
                message = _read(parcel, contents)
            except Lost:
                message = _failed(parcel, NOT_WHOLE, ErrorCode.MESSAGE_UNAVAILABLE)
            except TooLarge as error:
                message = _failed(parcel, str(error))
            del self._open[key]
            self._confirm(parcel)
            yield message

    def _look(self, ids: Sequence[str]) -> None:
        """See what has been announced."""
        asked = [key for key in ids if key not in self._open]
        if not asked:
            return
        told = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=asked))
        for envelope, tree in zip(told.messages_list, told.message_object_trees, strict=True):
            pieces = list(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)))[::-1]
            if envelope.metadata.reply_to_message_id in asked:
                parcel = Parcel(metadata_from_proto(envelope.metadata), pieces)
                self._open[envelope.metadata.reply_to_message_id] = parcel

    def _contents(self, parcel: Parcel, largest: int) -> dict[str, bytes] | None:
        """Return a reply's pieces, or None where one is still on its way; then none is kept."""
        if len(parcel.pieces) > MOST_PIECES:
            raise TooLarge(f"the reply has {len(parcel.pieces)} pieces, and at most {MOST_PIECES} are expected.")
        if parcel.missing is not None and self._piece(parcel.missing) is None:
            return None
        contents: dict[str, bytes] = {}
        left = largest + SLACK
        for piece in parcel.pieces:
            content = self._piece(piece)
            if content is None:
                parcel.missing = piece
                return None
            left -= max(0, len(content) - FRAME)
            if left < 0:
                raise TooLarge(f"the reply has more than {largest} bytes, which is the most that is expected.")
            contents[piece] = content
        return contents

    def _piece(self, piece: str) -> bytes | None:
        """Return a piece, or None where it is still on its way."""
        request = PullObjectRequest(node=self._grid.node, run_id=self._grid.run.run_id, object_id=piece)
        answer = self._grid._runtime_client.PullObject(request)
        if not answer.object_found:
            raise Lost
        return answer.object_content if answer.object_available else None

    def _confirm(self, parcel: Parcel) -> None:
        """Let the SuperLink forget a reply, its pieces with it."""
        message, run = parcel.envelope.message_id, self._grid.run.run_id
        request = ConfirmMessageReceivedRequest(node=self._grid.node, run_id=run, message_object_id=message)
        self._grid._runtime_client.ConfirmMessageReceived(request)


def _read(parcel: Parcel, contents: dict[str, bytes]) -> Message:
    """Put a reply together. Whom it answers is what the SuperLink checked, not what the reply says."""
    try:
        message = cast(Message, inflate_object_from_contents(parcel.envelope.message_id, contents))
        if message.has_error():
            return make_message(metadata=parcel.envelope, error=message.error)
        return make_message(metadata=parcel.envelope, content=message.content)
    except Exception as error:  # whatever Flower makes of another's bytes
        let_interrupts_through(error)
        return _failed(parcel, f"the reply cannot be read ({type(error).__name__}).")


def _failed(parcel: Parcel, reason: str, code: int = ErrorCode.UNKNOWN) -> Message:
    return make_message(metadata=parcel.envelope, error=Error(code, reason))
