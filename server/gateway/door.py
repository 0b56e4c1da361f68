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
from pathlib import Path

from server.daemon.settings import is_loopback
from server.gateway.connection import Connection, Shared, Slow
from server.gateway.counts import Counts
from server.gateway.identity import Enrolled
from server.gateway.limits import Limits
from server.gateway.rates import Buckets
from server.gateway.upstream import Upstream
from shared.errors import ConfigError

log = logging.getLogger("moonflower.gateway")
CLOSE_SECONDS = 2.0  # for the end of a TLS connection
BURST_SECONDS = 5.0  # of new connections of an address, and of a site's requests, at once
BACKLOG = 512


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
            counts=self._counts,
            rates=Buckets(limits.requests_per_second, limits.requests_per_second * BURST_SECONDS),
        )
        self._arrivals = Buckets(limits.connections_per_second, limits.connections_per_second * BURST_SECONDS)
        self._open: dict[str, int] = {}  # connections of each address
        self._tasks: dict[asyncio.Task[None], Connection | None] = {}  # with its connection, after the handshake
        self._strangers: dict[asyncio.Task[None], socket.socket] = {}  # without an enrolled key yet, oldest first
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
        return {"open": len(self._tasks), **self._counts.snapshot()}

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
        for task, connection in self._tasks.items():
            if connection is None or not connection.busy:
                task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=grace)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._shared.upstream.close()

    async def _accept(self, listener: socket.socket) -> None:
        """Take connections, and reset at once those beyond a limit."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, peer = await loop.sock_accept(listener)
            except OSError as error:  # no descriptors left, or the client has gone already
                log.warning("cannot take a connection: %s", error.strerror)
                await asyncio.sleep(0.2)
                continue
            address = str(peer[0])
            key = _address_key(address)
            limits = self._shared.limits
            if self._open.get(key, 0) >= limits.connections_per_address:
                refused = "connections of an address"
            elif self._arrivals.take(key, time.monotonic()):
                refused = "rate of an address"
            elif len(self._tasks) >= limits.max_connections and not self._make_room():
                refused = "connections"
            else:
                self._counts.add("connections")
                self._open[key] = self._open.get(key, 0) + 1
                task = asyncio.create_task(self._serve(client, address, key))
                self._tasks[task] = None
                self._strangers[task] = client
                continue
            self._counts.refused(refused, address)
            _reset_when_closed(client)
            client.close()

    def _make_room(self) -> bool:
        """Cut off the oldest connection that has shown no enrolled key; False where there is none."""
        for task, client in self._strangers.items():
            del self._strangers[task]
            _reset_when_closed(client)
            task.cancel()
            self._counts.add("displaced")
            return True
        return False

    def _know(self, task: asyncio.Task[None]) -> None:
        """Note that a connection has shown an enrolled key, so that no stranger displaces it."""
        self._strangers.pop(task, None)

    async def _serve(self, client: socket.socket, address: str, key: str) -> None:
        """One connection from its handshake to its end, whatever happens in it."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - it runs in one
        transport: asyncio.Transport | None = None
        try:
            reader = asyncio.StreamReader(limit=64 * 1024)
            protocol = asyncio.StreamReaderProtocol(reader)
            seconds = self._shared.limits.handshake_seconds
            loop = asyncio.get_running_loop()
            try:
                transport, _ = await loop.connect_accepted_socket(
                    lambda: protocol,
                    client,
                    ssl=self._tls,
                    ssl_handshake_timeout=seconds if self._tls else None,
                    ssl_shutdown_timeout=CLOSE_SECONDS if self._tls else None,
                )
            except OSError as error:
                self._counts.refused("handshake", address, type(error).__name__)
                return
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            connection = Connection(self._shared, reader, writer, address, proven=lambda: self._know(task))
            self._tasks[task] = connection
            try:
                await connection.serve()
                transport.close()
                async with asyncio.timeout(CLOSE_SECONDS):
                    await writer.wait_closed()
            except Slow as slow:
                self._counts.refused("slow", address, str(slow))
                _reset_when_closed(client)
            except (OSError, TimeoutError):
                self._counts.add("broken off")
        except Exception:
            log.exception("a connection failed")
            self._counts.add("faults")
        finally:
            if transport is None:
                client.close()
            else:
                transport.abort()
            del self._tasks[task]
            self._strangers.pop(task, None)
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]


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


def _reset_when_closed(client: socket.socket) -> None:
    """Let a socket end with a reset."""
    with suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
