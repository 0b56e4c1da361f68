"""One connection at the door: requests one after another, each checked before its body, then streamed through."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from email.utils import formatdate

import h11
import httpx

from server.gateway import letters
from server.gateway.counts import Counts
from server.gateway.identity import Enrolled
from server.gateway.limits import Limits
from server.gateway.rates import Buckets
from server.gateway.request import (
    FOR_NODES,
    FOR_NODES_WITHOUT_KEYS,
    MAX_HEAD,
    MOST_WORDS,
    PULL_MESSAGES,
    PUSH_MESSAGES,
    PUSH_OBJECT,
    Head,
    Refusal,
    check,
)
from server.gateway.room import Room
from server.gateway.upstream import Upstream, outward
from server.gateway.waiting import Answer, Waiting

CHUNK = 64 * 1024
ENVELOPES = (
    16 * 1024
)  # bytes a second of a site: 16 KiB announce 1 GB, and the SuperLink's database takes 0.3 s for them
WITHOUT_KEYS = "any"  # the site of every node where none has a key
Event = h11.Request | h11.Data | h11.EndOfMessage | h11.ConnectionClosed


class Slow(Exception):
    """The other side takes too long. It is cut off without an answer: a SuperNode tries again then."""


@dataclass
class Shared:
    """What the connections of a door have in common."""

    limits: Limits
    enrolled: Enrolled | None  # None: nodes have no keys
    upstream: Upstream
    counts: Counts
    rates: Buckets
    waiting: Waiting
    envelopes: Buckets = field(default_factory=lambda: Buckets(ENVELOPES, MOST_WORDS))
    room: Room | None = None  # on the SuperLink's disk
    received: dict[str, int] = field(default_factory=dict)  # bytes of each site's bodies, since the start
    in_flight: dict[str, int] = field(default_factory=dict)  # of each site
    stopping: bool = False


class Connection:
    """A client's connection after its handshake. `busy` while a request that passed is on its way."""

    def __init__(
        self,
        shared: Shared,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        address: str,
        proven: Callable[[], object],
    ) -> None:
        self._shared, self._reader, self._writer, self._address = shared, reader, writer, address
        self._proven = proven
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._site = ""
        self._method = b""
        self.busy = False

    async def serve(self) -> None:
        """Answer requests until either side has had enough.

        Raises
        ------
        Slow
            Where the client took too long.
        ConnectionError
            Where it broke off.
        """
        patience = self._shared.limits.head_seconds
        try:
            while (request := await self._request(patience)) is not None:
                await self._answer(request)
                if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                    break
                self._http.start_next_cycle()
                self.busy = False
                patience = self._shared.limits.idle_seconds
        except Refusal as refusal:
            await self._refuse(refusal)

    async def _request(self, patience: float) -> h11.Request | None:
        """Return the next request's head, or None where the client has no more."""
        if not self._http.trailing_data[0] and not await self._read(patience):
            return None
        try:
            async with asyncio.timeout(self._shared.limits.head_seconds):
                event = await self._event(self._shared.limits.head_seconds)
        except TimeoutError:
            raise Slow("head") from None
        if not isinstance(event, h11.Request):
            return None
        self._method = event.method
        return event

    async def _answer(self, request: h11.Request) -> None:
        """Check a request, and send it and its reply through."""
        shared = self._shared
        paths = FOR_NODES_WITHOUT_KEYS if shared.enrolled is None else FOR_NODES
        head = check(request, paths, shared.limits.max_request_mib << 20)
        self._site = site = WITHOUT_KEYS if shared.enrolled is None else shared.enrolled.site(head)
        self._proven()
        if shared.stopping:
            raise Refusal(503, "stopping", "the coordinator is restarting")
        if shared.in_flight.get(site, 0) >= shared.limits.requests_in_flight:
            raise Refusal(503, "in flight", f"{shared.limits.requests_in_flight} requests of this site are in flight")
        if head.path == PUSH_OBJECT and shared.room is not None and shared.room.full(shared.received):
            raise Refusal(503, "disk", "the coordinator's disk is nearly full")
        self.busy = True
        shared.in_flight[site] = shared.in_flight.get(site, 0) + 1
        try:
            wait = shared.rates.take(site, time.monotonic(), debt=True)
            if head.path == PUSH_MESSAGES:
                wait += shared.envelopes.take(site, time.monotonic(), amount=head.length, debt=True)
            if wait:
                shared.counts.add("delayed")
                await asyncio.sleep(wait)
            body = self._body()
            if head.path == PUSH_MESSAGES:
                body = _at_once(letters.check(b"".join([part async for part in body])))
            shared.counts.add("passed")
            if head.path == PULL_MESSAGES:
                await self._wait_for_message(head, b"".join([part async for part in body]))
                return
            async with shared.upstream.ask(head, body) as response:
                await self._reply(response, response.aiter_raw())
        finally:
            shared.in_flight[site] -= 1
            if not shared.in_flight[site]:
                del shared.in_flight[site]

    async def _wait_for_message(self, head: Head, question: bytes) -> None:
        """Answer a node's question for messages once there is one, or it has waited for long."""
        shared = self._shared

        async def ask() -> Answer:
            if shared.enrolled is not None:
                shared.enrolled.site(head)  # refuses a key that was revoked meanwhile
            async with shared.upstream.ask(head, _at_once(question)) as response:
                return response, b"".join([chunk async for chunk in response.aiter_raw()])

        try:
            response, content = await shared.waiting.until(ask, self._gone, lambda: shared.stopping)
        except httpx.TransportError as error:
            raise Refusal(503, "superlink", f"the coordinator is restarting ({type(error).__name__})") from error
        await self._reply(response, _at_once(content))

    def _gone(self) -> bool:
        """Whether the client has ended its side, or vanished."""
        return self._reader.at_eof() or self._reader.exception() is not None or self._writer.is_closing()

    async def _body(self) -> AsyncIterator[bytes]:
        """Yield a request's body as it comes, no faster than it is taken.

        The client has `body_seconds` to wait in, and more with each byte: one that trickles is cut off.
        """
        limits, waited, received = self._shared.limits, 0.0, 0
        while True:
            patience = limits.body_seconds + received / limits.body_bytes_per_second - waited
            before = time.monotonic()
            event = await self._event(patience)
            waited += time.monotonic() - before
            if isinstance(event, h11.ConnectionClosed):
                raise ConnectionResetError
            if not isinstance(event, h11.Data):
                return
            received += len(event.data)
            self._shared.counts.add("bytes in", len(event.data))
            self._shared.received[self._site] = self._shared.received.get(self._site, 0) + len(event.data)
            yield bytes(event.data)

    async def _reply(self, response: httpx.Response, content: AsyncIterator[bytes]) -> None:
        """Send the SuperLink's reply as it comes."""
        headers = outward(response)
        if self._shared.stopping:
            headers.append((b"connection", b"close"))
        await self._write(h11.Response(status_code=response.status_code, headers=headers, reason=b""))
        try:
            async for chunk in content:
                self._shared.counts.add("bytes out", len(chunk))
                await self._write(h11.Data(data=chunk))
        except httpx.TransportError as error:  # in the middle of a reply: all that is left is to break off too
            self._shared.counts.refused("superlink", self._address, type(error).__name__)
            raise ConnectionAbortedError from error
        await self._write(h11.EndOfMessage())

    async def _refuse(self, refusal: Refusal) -> None:
        """Answer a refusal, which ends the connection."""
        self._shared.counts.refused(refusal.reason, self._address, self._site or refusal.detail)
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        content = json.dumps({"code": refusal.code, "detail": refusal.text}).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(content))),
            ("date", formatdate(usegmt=True)),  # a site's preflight compares its clock with it
            ("connection", "close"),
        ]
        if refusal.status == 503:
            headers.append(("retry-after", "2"))
        await self._write(h11.Response(status_code=refusal.status, headers=headers, reason=b""))
        if self._method != b"HEAD":
            await self._write(h11.Data(data=content))
        await self._write(h11.EndOfMessage())

    async def _event(self, patience: float) -> Event:
        """Return the next part of a request. Each read may take `patience` seconds."""
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                raise Refusal(error.error_status_hint, "malformed", "this is no HTTP request") from error
            if isinstance(event, Event):
                return event
            if not await self._read(patience) and self._http.their_state is h11.SEND_BODY:
                raise ConnectionResetError

    async def _read(self, patience: float) -> bytes:
        """Read what has come into the parser; b"" at the end."""
        try:
            async with asyncio.timeout(patience):
                data = await self._reader.read(CHUNK)
        except TimeoutError:
            raise Slow("request") from None
        self._http.receive_data(data)
        return data

    async def _write(self, event: h11.Response | h11.Data | h11.EndOfMessage) -> None:
        """Send a part of a reply, and wait while the client does not take what was sent before."""
        self._writer.write(self._http.send(event) or b"")
        try:
            async with asyncio.timeout(self._shared.limits.reply_seconds):
                await self._writer.drain()
        except TimeoutError:
            raise Slow("reply") from None


async def _at_once(body: bytes) -> AsyncIterator[bytes]:
    yield body
