"""What streams through the door does not stay in it. The door is a process of its own here, so that its memory can be read."""

import json
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
import pytest
from doors import Sink, Site, dial, exchange, head, signed, status

from shared.certificates import Loopback

PUSH = "/v1/fleet/push-object"
PIECE = bytes(1 << 20)

PROGRAM = """
import asyncio, json, sys
from pathlib import Path
from server.gateway.door import Gateway
from server.gateway.identity import Enrolled
from server.gateway.limits import Limits

async def main(certificate, key, upstream, limits, keys):
    gateway = Gateway("127.0.0.1", 0, Path(certificate), Path(key), upstream, None, Limits(**limits), Enrolled(keys))
    await gateway.start()
    print(gateway.port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await gateway.stop(1)

asyncio.run(main(*json.loads(sys.argv[1])))
"""


@dataclass
class Process:
    """A door's process: enough of a `Door` to dial it."""

    port: int
    tls: Loopback
    trust: ssl.SSLContext
    process: psutil.Process

    def memory(self) -> float:
        """MiB that it holds."""
        return self.process.memory_info().rss / 2**20


@contextmanager
def apart(sink: Sink, tls: Loopback, site: Site, max_request_mib: int) -> Iterator[Process]:
    limits = {"max_request_mib": max_request_mib, "connections_per_second": 1000}
    arguments = [str(tls.certificate), str(tls.key), sink.address, limits, {site.public: site.name}]
    command = [sys.executable, "-c", PROGRAM, json.dumps(arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        trust = ssl.create_default_context(cafile=str(tls.ca))
        yield Process(int(child.stdout.readline()), tls, trust, psutil.Process(child.pid))
        child.stdin.close()
        assert child.wait(10) == 0
    sink.close()


def push(site: Site, **headers: str) -> bytes:
    return head("POST", PUSH, {**signed(site), "connection": "close", **headers})


@pytest.mark.parametrize("mib", [96, pytest.param(2048, marks=pytest.mark.slow)])
def test_a_large_body_streams_through_in_flat_memory(mib: int, site: Site, public_tls: Loopback) -> None:
    sink = Sink()
    with apart(sink, public_tls, site, max_request_mib=4096) as door:
        exchange(door, push(site, **{"content-length": "1"}) + b"x")
        before, most = door.memory(), 0.0
        with dial(door, timeout=30) as connection:
            connection.sendall(push(site, **{"content-length": str(mib << 20)}))
            for n in range(mib):
                connection.sendall(PIECE)
                if n % 16 == 0:
                    most = max(most, door.memory())
            assert status(connection.recv(4096)) == 200
        assert sink.received == (mib << 20) + 1
        assert most - before < 24


def test_a_slow_superlink_holds_the_sender_back_and_not_the_body(site: Site, public_tls: Loopback) -> None:
    sink = Sink(seconds_to_read=2.0)
    with apart(sink, public_tls, site, max_request_mib=4096) as door:
        before, sent = door.memory(), 0
        with dial(door, timeout=30) as connection, suppress(TimeoutError):
            connection.sendall(push(site, **{"content-length": str(1 << 30)}))
            connection.settimeout(0.5)
            while sent < 200:
                connection.sendall(PIECE)
                sent += 1
        assert sent < 40
        assert door.memory() - before < 24


def test_2_gib_more_than_allowed_are_neither_read_nor_kept(site: Site, public_tls: Loopback) -> None:
    sink = Sink()
    with apart(sink, public_tls, site, max_request_mib=64) as door:
        before = door.memory()
        for headers in ({"content-length": str(2 << 30)}, {"transfer-encoding": "chunked"}):
            with dial(door, timeout=30) as connection, suppress(ConnectionError, ssl.SSLError, TimeoutError):
                connection.sendall(push(site, **headers))
                begin, sent = time.monotonic(), 0
                for n in range(2048):
                    connection.sendall(PIECE if "content-length" in headers else b"100000\r\n" + PIECE + b"\r\n")
                    sent = n + 1
                    assert time.monotonic() - begin < 20
            assert sent < 64
        assert sink.received == 0
        assert door.memory() - before < 24


def test_a_large_reply_streams_through_and_waits_for_its_reader(site: Site, public_tls: Loopback) -> None:
    with apart(Sink(reply_bytes=256 << 20), public_tls, site, max_request_mib=1) as door:
        before = door.memory()
        with dial(door, timeout=30) as connection:
            connection.sendall(push(site, **{"content-length": "1"}) + b"x")
            time.sleep(1.5)  # the SuperLink would have sent it all by now
            assert door.memory() - before < 24
            received = 0
            while received < 64 << 20:
                received += len(connection.recv(1 << 20))
        assert door.memory() - before < 24
