"""A node that asks for messages waits at the door until one is there.

Flower's SuperNode sleeps three seconds after each question that found nothing, twice a round; here the question itself lasts,
and the SuperLink is asked again in its name. It is asked in the name of nobody who has gone: what it gives out, it gives out once.
"""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable

import httpx
from flwr.proto.fleet_pb2 import PullMessagesResponse
from google.protobuf.message import DecodeError

EVERY = 0.1  # seconds between the door's questions, for each node that waits: ten ask once a second each
Answer = tuple[httpx.Response, bytes]
KEEPALIVE = {  # a peer that vanished without a word is known after about 7 s
    socket.TCP_KEEPIDLE: 3,
    socket.TCP_KEEPINTVL: 2,
    socket.TCP_KEEPCNT: 2,
}


class Waiting:
    """How many nodes wait, and with it how often the SuperLink is asked for each.

    Parameters
    ----------
    seconds : float
        The longest that one question lasts.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._nodes = 0

    async def until(
        self, ask: Callable[[], Awaitable[Answer]], gone: Callable[[], bool], stopping: Callable[[], bool]
    ) -> Answer:
        """Ask until there is a message, the time is over or the door stops; return the last answer.

        Raises
        ------
        ConnectionResetError
            Where whoever asked has gone.
        """
        last = time.monotonic() + self._seconds
        self._nodes += 1
        try:
            while True:
                response, content = await ask()
                if response.status_code != httpx.codes.OK or not _empty(content):
                    return response, content
                pause = EVERY * max(2, self._nodes)
                if stopping() or time.monotonic() + pause > last:
                    return response, content
                await asyncio.sleep(pause)
                if gone():
                    raise ConnectionResetError
        finally:
            self._nodes -= 1


def keep_alive(client: socket.socket) -> None:
    """Let the kernel find out that a peer has vanished."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        client.setsockopt(socket.IPPROTO_TCP, option, value)


def _empty(content: bytes) -> bool:
    try:
        return not PullMessagesResponse.FromString(content).messages_list
    except DecodeError:
        return False
