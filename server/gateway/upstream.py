"""The way from the door to the SuperLink: one request, streamed both ways, on connections that are kept."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from server.gateway.request import OUTWARD, Head, Refusal

CONNECT_SECONDS = 5.0
KEPT_SECONDS = 2.0  # idle: less than the SuperLink's own 5, so that it never closes one that is about to be used


class Upstream:
    """A SuperLink on loopback.

    Parameters
    ----------
    address : str
        "127.0.0.1:port".
    ca : Path | None
        The authority of its certificate; None: plaintext.
    seconds : float
        How long it may take between two bytes.
    """

    def __init__(self, address: str, ca: Path | None, seconds: float) -> None:
        self._base = f"{'http' if ca is None else 'https'}://{address}"
        self._timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS, pool=None).as_dict()
        # The transport alone: a client would add headers, cookies, redirects and the environment's proxies.
        self._transport = httpx.AsyncHTTPTransport(
            verify=ssl.create_default_context(cafile=str(ca)) if ca else False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEPT_SECONDS),
            trust_env=False,
        )

    @asynccontextmanager
    async def ask(self, head: Head, body: AsyncIterator[bytes]) -> AsyncIterator[httpx.Response]:
        """Send a request; the reply's body is read from `Response.stream` while the context is open.

        Raises
        ------
        Refusal
            503 where the SuperLink is down, restarting or silent, until its reply's head has come: SuperNodes try again.
        """
        request = httpx.Request(
            "POST",
            self._base + head.path.decode("ascii"),
            headers=[*head.headers.items(), (b"content-length", str(head.length).encode())],
            content=body,
            extensions={"timeout": self._timeout},
        )
        try:
            response = await self._transport.handle_async_request(request)
        except httpx.TransportError as error:
            raise Refusal(503, "superlink", f"the coordinator is restarting ({type(error).__name__})") from error
        try:
            yield response
        finally:
            await response.aclose()

    async def close(self) -> None:
        """Close what is kept."""
        await self._transport.aclose()


def outward(response: httpx.Response) -> list[tuple[bytes, bytes]]:
    """Return the headers of a reply that pass outward, lower-case."""
    return [(name.lower(), value) for name, value in response.headers.raw if name.lower() in OUTWARD]
