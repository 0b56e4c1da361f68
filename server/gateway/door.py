"""The door itself: a listening socket, whom it lets in, and how it closes.

It owns its sockets, because what must be bounded happens before a request: connections in all and of an address,
their rate, and the TLS handshake. A connection that is not let in, or is too slow, is reset rather than closed:
SuperNodes try again after a reset, and give up at a TLS connection that ends in its handshake.
"""

import asyncio
import ipaddress
import logging
import socket
import ssl
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from server.daemon.settings import is_loopback
from server.gateway import waiting
from server.gateway.connection import Connection, Shared, Slow
from server.gateway.counts import Counts
from server.gateway.identity import Enrolled
from server.gateway.limits import Limits
from server.gateway.rates import Buckets
from server.gateway.room import Room
from server.gateway.upstream import Upstream
from shared.errors import ConfigError

log = logging.getLogger("moonflower.gateway")
CLOSE_SECONDS = 2.0  # for the end of a TLS connection
BURST_SECONDS = 5.0  # of new connections of an address, and of a site's requests, at once
BACKLOG = 512


@dataclass
class Guest:
    """A connection that was let in, from its first byte on."""

    client: socket.socket
    address: str
    key: str  # whose connections it counts with
    transport: asyncio.Transport | None = None  # owns the socket, after the handshake
    connection: Connection | None = None

    def reset_when_closed(self) -> None:
        """Let it end with a reset."""
        with suppress(OSError):  # where it has ended already
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(self) -> None:
        """End it, at once."""
        if self.transport is None:
            self.client.close()
        else:
            self.transport.abort()


class Gateway:
    """TLS in front of a SuperLink on loopback, in the running event loop.

    Parameters
    ----------
    host, port
        Where sites come in; port 0 takes a free one.
    tls_certificate, tls_key : Path | None
        What sites are shown, PEM. None for both: plaintext and nodes without keys, on loopback only.
    upstream : str
        The SuperLink, "127.0.0.1:port".
    upstream_ca : Path | None
        The authority of the SuperLink's certificate; None: plaintext.
    limits : Limits
        Sizes, rates, times.
    enrolled : Enrolled | None
        Keys that may enter. None only in plaintext.
    disk : Path | None
        A folder on the disk that the SuperLink writes to, whose room is watched.

    Raises
    ------
    ConfigError
        Where plaintext would leave this machine, or the certificate and key cannot be used.
    """

    def __init__(
        self,
        host: str,
        port: int,
        tls_certificate: Path | None,
        tls_key: Path | None,
        upstream: str,
        upstream_ca: Path | None,
        limits: Limits,
        enrolled: Enrolled | None,
        disk: Path | None = None,
    ) -> None:
        if (tls_certificate is None or tls_key is None or enrolled is None) and not is_loopback(host):
            raise ConfigError(
                f"gateway.host={host!r} is not loopback, and sites need TLS and enrolled keys there; "
                "set [tls] certificate and key, or gateway.host to 127.0.0.1."
            )
        if (tls_certificate is None) is not (enrolled is None):
            raise ConfigError("the gateway takes TLS and enrolled keys together, or neither (--insecure).")
        self._host, self._asked_port = host, port
        self._tls = None if tls_certificate is None or tls_key is None else _server_context(tls_certificate, tls_key)
        self._counts = Counts()
        self._shared = Shared(
            limits=limits,
            enrolled=enrolled,
            upstream=Upstream(upstream, upstream_ca, limits.upstream_seconds),
            waiting=waiting.Waiting(limits.wait_seconds),
            counts=self._counts,
            room=None if disk is None else Room(disk, limits.least_free_mib << 20),
            rates=Buckets(limits.requests_per_second, limits.requests_per_second * BURST_SECONDS),
        )
        self._arrivals = Buckets(limits.connections_per_second, limits.connections_per_second * BURST_SECONDS)
        self._open: dict[str, int] = {}  # connections of each address
        self._guests: dict[asyncio.Task[None], Guest] = {}
        self._strangers: dict[asyncio.Task[None], Guest] = {}  # those without an enrolled key yet, oldest first
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port that sites come in by, once started."""
        if self._listener is None:
            raise RuntimeError("the gateway is not started")
        return int(self._listener.getsockname()[1])

    def counts(self) -> dict[str, int]:
        """Return counters since the start, by name, and how many connections are open now."""
        return {"open": len(self._guests), **self._counts.snapshot()}

    async def start(self) -> None:
        """Listen, and let in.

        Raises
        ------
        ConfigError
            Where host and port cannot be listened on.
        """
        try:
            family = socket.getaddrinfo(self._host, None, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((self._host, self._asked_port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise ConfigError(
                f"[gateway] host={self._host!r}, port={self._asked_port}: {error.strerror}; choose a host of this machine "
                "and a free port."
            ) from error
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(self._listener))

    async def stop(self, grace: float) -> None:
        """Let nobody in any more, give requests on their way `grace` seconds, and end all connections."""
        self._shared.stopping = True
        if self._accepting is not None:
            self._accepting.cancel()
            with suppress(asyncio.CancelledError):
                await self._accepting
        if self._listener is not None:
            self._listener.close()
        for task, guest in self._guests.items():
            if guest.connection is None or not guest.connection.busy:
                task.cancel()
        if self._guests:
            await asyncio.wait(list(self._guests), timeout=grace)
        for task in self._guests:
            task.cancel()
        await asyncio.gather(*self._guests, return_exceptions=True)
        await self._shared.upstream.close()

    async def _accept(self, listener: socket.socket) -> None:
        """Take connections, and reset at once those beyond a limit."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0)  # those who are in have their turn, however many knock
            try:
                client, peer = await loop.sock_accept(listener)
            except OSError as error:  # no descriptors left, or the client has gone already
                log.warning("cannot take a connection: %s", error.strerror)
                await asyncio.sleep(0.2)
                continue
            guest = Guest(client, str(peer[0]), _address_key(str(peer[0])))
            if reason := self._full(guest.key):
                self._counts.refused(reason, guest.address)
                guest.reset_when_closed()
                guest.close()
                continue
            self._counts.add("connections")
            self._open[guest.key] = self._open.get(guest.key, 0) + 1
            task = asyncio.create_task(self._serve(guest))
            self._guests[task] = self._strangers[task] = guest
            task.add_done_callback(self._ended)

    def _full(self, key: str) -> str:
        """Say which limit a new connection of an address is beyond; "" where there is room, or room was made."""
        limits = self._shared.limits
        if self._open.get(key, 0) >= limits.connections_per_address:
            return "connections of an address"
        if self._arrivals.take(key, time.monotonic()):
            return "rate of an address"
        if len(self._guests) < limits.max_connections:
            return ""
        oldest = next(iter(self._strangers), None)
        if oldest is None:
            return "connections"
        self._strangers.pop(oldest).reset_when_closed()
        oldest.cancel()
        self._counts.add("displaced")
        return ""

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Forget a connection, however it ended, even before it began."""
        guest = self._guests.pop(task)
        self._strangers.pop(task, None)
        guest.close()
        self._open[guest.key] -= 1
        if not self._open[guest.key]:
            del self._open[guest.key]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a connection failed", exc_info=error)
            self._counts.add("faults")

    async def _serve(self, guest: Guest) -> None:
        """One connection: its handshake, and its requests."""
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=64 * 1024)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            guest.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a reply's last piece waits 40 ms
            waiting.keep_alive(guest.client)
            guest.transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                guest.client,
                ssl=self._tls,
                ssl_handshake_timeout=self._shared.limits.handshake_seconds if self._tls else None,
                ssl_shutdown_timeout=CLOSE_SECONDS if self._tls else None,
            )
        except OSError as error:
            self._counts.refused("handshake", guest.address, type(error).__name__)
            return
        writer = asyncio.StreamWriter(guest.transport, protocol, reader, loop)
        # Once it has shown an enrolled key, no stranger displaces it.
        proven = partial(self._strangers.pop, task, None)
        guest.connection = Connection(self._shared, reader, writer, guest.address, proven)
        try:
            await guest.connection.serve()
            guest.transport.close()
            async with asyncio.timeout(CLOSE_SECONDS):
                await writer.wait_closed()
        except Slow as slow:
            self._counts.refused("slow", guest.address, str(slow))
            guest.reset_when_closed()
        except OSError:
            self._counts.add("broken off")


def _server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:
        raise ConfigError(
            f"[tls] certificate={str(certificate)!r}, key={str(key)!r}: {error.strerror or error.args[-1]}; "
            "both are PEM files in the coordinator's kit."
        ) from error
    return context


def _address_key(address: str) -> str:
    """Whose connections count together: an IPv4 address, or the /64 that a single IPv6 customer has."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)
