"""The door's limits: of size, rate, number and time. Behind it, a server that counts what arrives."""

import asyncio
import logging
import socket
import ssl
import struct
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from doors import (
    GENEROUS,
    Door,
    Sink,
    Site,
    dial,
    exchange,
    free_port,
    head,
    new_site,
    opened_before_sink,
    read_all,
    signed,
    status,
    until,
)
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree

from server.gateway import room
from server.gateway.door import Gateway
from server.gateway.identity import Enrolled
from server.gateway.limits import Limits
from shared.certificates import Loopback
from shared.errors import ConfigError

PULL, PIECE = "/v1/fleet/pull-messages", "/v1/fleet/push-object"


def post(site: Site, body: bytes = b"abc", **extra: str) -> bytes:
    return head("POST", PULL, {**signed(site), "content-length": str(len(body)), **extra}) + body


def limits(**changes: float) -> Limits:
    return Limits(**{"connections_per_second": 100_000, "wait_seconds": 0, **changes})  # type: ignore[arg-type]


def client(door: Door) -> httpx.Client:
    assert door.tls is not None
    return httpx.Client(base_url=f"https://{door.address}", verify=ssl.create_default_context(cafile=str(door.tls.ca)))


def is_cut_off(connection: socket.socket) -> bool:
    """Whether the door has ended a connection without a byte of answer."""
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except (ConnectionError, ssl.SSLError):
        return True


def test_what_arrives_is_written_anew_without_hop_by_hop_headers(site: Site, public_tls: Loopback) -> None:
    extra = {
        "connection": "keep-alive, flwr-signature",
        "keep-alive": "timeout=9",
        "te": "trailers",
        "trailer": "x",
        "proxy-authorization": "x",
        "x-forwarded-for": "10.0.0.1",
        "x-original-url": "/v1/control/start-run",
        "cookie": "x=y",
        "authorization": "Bearer x",
        "flwr-task-token": "x",
        "content-type": "application/protobuf",
    }
    sink = Sink(reply_bytes=5)
    with opened_before_sink(sink, public_tls, {site.public: "north"}) as door, dial(door) as connection:
        connection.sendall(post(site, **extra))
        until(lambda: sink.heads)
        answer = connection.recv(4096)
    (line, headers), *rest = sink.heads
    assert line == f"POST {PULL} HTTP/1.1"
    names = sorted(name.lower() for name, _ in headers)
    assert names == ["content-length", "content-type", "flwr-public-key", "flwr-signature", "flwr-timestamp", "host"]
    assert dict(headers)["Host"] == sink.address
    assert not rest
    assert status(answer) == 200
    assert b"cookie" not in answer.lower()
    assert b"server:" not in answer.lower()


def test_requests_follow_one_another_on_a_connection_even_sent_at_once(site: Site, public_tls: Loopback) -> None:
    sink = Sink()
    with opened_before_sink(sink, public_tls, {site.public: "north"}) as door:
        with dial(door) as connection:
            connection.sendall(post(site) + post(site, b"defg") + post(site, connection="close"))
            answers = read_all(connection)
        assert answers.count(b"HTTP/1.1 200") == 3
        assert sink.received == 10
        assert door.counts()["connections"] == 1


def test_a_small_reply_does_not_wait_for_an_acknowledgement(site: Site, public_tls: Loopback) -> None:
    with opened_before_sink(Sink(reply_bytes=5), public_tls, {site.public: "north"}) as door, client(door) as http:
        times = []
        for _ in range(12):
            begin = time.monotonic()
            http.post(PULL, headers=signed(site), content=b"abc")
            times.append(time.monotonic() - begin)
    assert min(times) < 0.03  # 0.04 and more where it does


def test_what_follows_a_body_is_another_request_and_is_checked_like_one(site: Site, public_tls: Loopback) -> None:
    sink = Sink()
    smuggled = b"POST /v1/control/start-run HTTP/1.1\r\nhost: door\r\ncontent-length: 0\r\n\r\n"
    with opened_before_sink(sink, public_tls, {site.public: "north"}) as door:
        answers = exchange(door, post(site) + smuggled)
    assert answers.count(b"HTTP/1.1 200") == 1
    assert answers.count(b"HTTP/1.1 404") == 1
    assert [line for line, _ in sink.heads] == [f"POST {PULL} HTTP/1.1"]


def test_the_signature_is_asked_for_before_a_body_is_read(site: Site, public_tls: Loopback) -> None:
    sink = Sink()
    with opened_before_sink(sink, public_tls, {}) as door, dial(door) as connection:
        connection.sendall(head("POST", PIECE, {**signed(site), "content-length": "1000000"}))  # and no body at all
        assert status(connection.recv(4096)) == 401
    assert not sink.heads


def test_a_body_that_claims_too_much_is_refused_before_it_comes(site: Site, public_tls: Loopback) -> None:
    sink = Sink()
    with opened_before_sink(sink, public_tls, {site.public: "north"}, limits(max_request_mib=1)) as door:
        with client(door) as http:
            assert http.post(PIECE, headers=signed(site), content=bytes(1 << 20)).status_code == 200
            assert http.post(PULL, headers=signed(site), content=bytes(256 << 10)).status_code == 200
            assert http.post(PULL, headers=signed(site), content=bytes((256 << 10) + 1)).status_code == 413
        for size in (2**20 + 1, 2**31, 2**63):
            answer = exchange(door, head("POST", PIECE, {**signed(site), "content-length": str(size)}))
            assert status(answer) == 413
            assert b"above this coordinator's limit of 1048576" in answer
        chunked = {**signed(site), "transfer-encoding": "chunked"}
        assert status(exchange(door, head("POST", PULL, chunked) + b"ffffffff\r\n" + bytes(2 << 20))) in (411, 0)
        assert door.counts()["refused: size"] == 4
    assert sink.received == (1 << 20) + (256 << 10)


@pytest.mark.parametrize("size", [100, 5 << 20])
def test_an_answer_reaches_a_client_that_is_still_sending(size: int, public_tls: Loopback, site: Site) -> None:
    with opened_before_sink(Sink(), public_tls, {}) as door, client(door) as http:
        assert http.post(PIECE, headers=signed(site), content=bytes(size)).status_code == 401


@pytest.mark.parametrize("method", ["HEAD", "CONNECT", "OPTIONS"])
def test_methods_with_rules_of_their_own_are_refused_like_others(method: str, public_tls: Loopback) -> None:
    with opened_before_sink(Sink(), public_tls, {}) as door:
        answer = exchange(door, head(method, "/v1/fleet/pull-messages", {"content-length": "0"}))
        assert status(answer) == 404
        assert answer.endswith(b"\r\n\r\n") == (method == "HEAD")
        until(lambda: door.counts()["open"] == 0)
        assert door.counts().get("faults", 0) == 0


def test_a_body_cut_short_does_not_pass_as_a_whole_one(site: Site, public_tls: Loopback) -> None:
    sink = Sink()
    with opened_before_sink(sink, public_tls, {site.public: "north"}) as door:
        with dial(door) as connection:
            connection.sendall(head("POST", PULL, {**signed(site), "content-length": "10"}) + b"abc")
        until(lambda: door.counts()["open"] == 0)
        assert door.counts().get("broken off", 0) == 1
    assert sink.received <= 3


def test_a_busy_site_waits_its_turn_and_does_not_hold_up_another(
    site: Site, public_tls: Loopback, tmp_path: Path
) -> None:
    other = new_site(tmp_path, "south")
    keys = {site.public: "north", other.public: "south"}
    few = limits(requests_per_second=1)
    with opened_before_sink(Sink(), public_tls, keys, few) as door, client(door) as north, client(door) as south:
        begin = time.monotonic()
        for _ in range(8):  # five at once, and one a second from then on
            assert north.post(PULL, headers=signed(site), content=b"a").status_code == 200
        assert time.monotonic() - begin > 2.9
        delayed = door.counts()["delayed"]
        assert south.post(PULL, headers=signed(other), content=b"a").status_code == 200
        assert door.counts()["delayed"] == delayed


def test_a_site_has_so_many_requests_in_flight_and_is_asked_to_try_again(site: Site, public_tls: Loopback) -> None:
    few = limits(requests_in_flight=2)
    with (
        opened_before_sink(Sink(seconds_to_read=1.0), public_tls, {site.public: "north"}, few) as door,
        ExitStack() as stack,
    ):
        connections = [stack.enter_context(dial(door)) for _ in range(2)]
        for connection in connections:
            connection.sendall(post(site))
        until(lambda: door.counts().get("passed") == 2)
        answer = exchange(door, post(site))
        assert status(answer) == 503
        assert b"retry-after" in answer
        assert [status(connection.recv(4096)) for connection in connections] == [200, 200]
        assert status(exchange(door, post(site, connection="close"))) == 200


def test_an_address_has_so_many_connections_and_others_are_not_concerned(site: Site, public_tls: Loopback) -> None:
    few = limits(connections_per_address=3)
    with opened_before_sink(Sink(), public_tls, {site.public: "north"}, few) as door, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(dial(door, "127.0.0.2"))
        with pytest.raises(ConnectionResetError):
            dial(door, "127.0.0.2")
        assert status(exchange(door, post(site, connection="close"))) == 200
        assert door.counts()["refused: connections of an address"] == 1


def test_an_address_opens_so_many_connections_a_second(site: Site, public_tls: Loopback) -> None:
    few = Limits(connections_per_second=1)
    with opened_before_sink(Sink(), public_tls, {site.public: "north"}, few) as door:
        with ExitStack() as stack:  # five at once, one a second from then on
            begin = time.monotonic()
            for _ in range(20):
                stack.enter_context(socket.create_connection(("127.0.0.1", door.port), source_address=("127.0.0.2", 0)))
            until(
                lambda: door.counts().get("connections", 0) + door.counts().get("refused: rate of an address", 0) == 20
            )
            assert 5 <= door.counts()["connections"] <= 6 + time.monotonic() - begin
        assert status(exchange(door, post(site, connection="close"))) == 200
        until(lambda: is_let_in(door, "127.0.0.2"), 5)


def is_let_in(door: Door, source: str) -> bool:
    try:
        dial(door, source).close()
    except ConnectionResetError:
        return False
    return True


def test_when_full_the_oldest_stranger_gives_way_and_never_a_site(site: Site, public_tls: Loopback) -> None:
    few = limits(max_connections=5)
    with opened_before_sink(Sink(), public_tls, {site.public: "north"}, few) as door, ExitStack() as stack:
        node = stack.enter_context(dial(door))
        node.sendall(post(site))
        assert status(node.recv(4096)) == 200
        strangers = [stack.enter_context(dial(door, f"127.0.0.{n}")) for n in range(2, 12)]
        assert status(exchange(door, post(site, connection="close"))) == 200  # a site that comes later finds room
        assert is_cut_off(strangers[0])
        node.sendall(post(site))
        assert status(node.recv(4096)) == 200
        assert door.counts()["displaced"] >= 6
        assert door.counts()["open"] <= 5


def test_a_crowd_at_once_leaves_nothing_behind(site: Site, public_tls: Loopback) -> None:
    few = limits(max_connections=4, connections_per_address=1000)
    with opened_before_sink(Sink(), public_tls, {site.public: "north"}, few) as door:
        with ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(socket.create_connection(("127.0.0.1", door.port)))
            until(lambda: door.counts().get("connections") == 100)
            assert door.counts()["displaced"] == 96
        until(lambda: door.counts()["open"] == 0)
        assert status(exchange(door, post(site, connection="close"))) == 200


@pytest.mark.parametrize("sent", [b"", b"POST /v1/fleet/pull-messages HTTP/1.1\r\n", b"P"])
def test_whoever_is_slow_with_a_head_is_cut_off(sent: bytes, public_tls: Loopback) -> None:
    with opened_before_sink(Sink(), public_tls, {}, limits(head_seconds=0.3)) as door, dial(door) as connection:
        connection.sendall(sent)
        begin = time.monotonic()
        assert is_cut_off(connection)
        assert 0.1 < time.monotonic() - begin < 5
        assert door.counts()["refused: slow"] == 1


def test_a_head_that_trickles_is_cut_off_all_the_same(public_tls: Loopback) -> None:
    with opened_before_sink(Sink(), public_tls, {}, limits(head_seconds=0.5)) as door, dial(door) as connection:
        begin = time.monotonic()
        with suppress(ConnectionError, ssl.SSLError):
            for byte in b"POST /v1/fleet/pull-messages HTTP/1.1\r\nx: " + b"y" * 1000:
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
        assert time.monotonic() - begin < 8


def test_a_head_that_does_not_end_is_refused(public_tls: Loopback) -> None:
    with opened_before_sink(Sink(), public_tls, {}) as door:
        assert status(exchange(door, b"POST / HTTP/1.1\r\nx: " + b"y" * 100_000)) in (431, 0)
        assert door.counts()["refused: malformed"] == 1


def test_a_handshake_that_does_not_come_is_cut_off(public_tls: Loopback) -> None:
    with opened_before_sink(Sink(), public_tls, {}, limits(handshake_seconds=0.3)) as door:
        with socket.create_connection(("127.0.0.1", door.port), 5) as raw:
            raw.sendall(bytes.fromhex("160301"))  # the beginning of a ClientHello
            assert is_cut_off(raw)
        until(lambda: door.counts()["open"] == 0)
        assert door.counts()["refused: handshake"] == 1


def test_a_body_that_trickles_is_cut_off_and_a_steady_one_is_not(site: Site, public_tls: Loopback) -> None:
    keys = {site.public: "north"}
    with opened_before_sink(Sink(), public_tls, keys, limits(body_seconds=0.4, body_bytes_per_second=1000)) as door:
        with dial(door) as connection:
            connection.sendall(head("POST", PULL, {**signed(site), "content-length": "1000"}))
            begin = time.monotonic()
            with suppress(ConnectionError, ssl.SSLError):
                for _ in range(200):
                    connection.sendall(b"x")
                    time.sleep(0.02)
            assert 0.2 < time.monotonic() - begin < 4
        assert door.counts()["refused: slow"] == 1
        with dial(door) as connection:  # slower than body_seconds in all, at more bytes a second than it must
            connection.sendall(head("POST", PULL, {**signed(site), "content-length": "3000"}))
            for _ in range(10):
                time.sleep(0.1)
                connection.sendall(bytes(300))
            assert status(connection.recv(4096)) == 200


def test_an_idle_connection_is_ended_and_so_is_one_that_takes_no_reply(site: Site, public_tls: Loopback) -> None:
    keys = {site.public: "north"}
    sink = Sink(reply_bytes=64 << 20)
    with opened_before_sink(sink, public_tls, keys, limits(idle_seconds=0.3, reply_seconds=0.5)) as door:
        with dial(door) as connection:
            connection.sendall(post(site))
            time.sleep(0.2)  # and reads nothing
            until(lambda: door.counts()["open"] == 0, 10)
        assert door.counts()["refused: slow"] == 1
    with opened_before_sink(Sink(), public_tls, keys, limits(idle_seconds=0.3)) as door, dial(door) as connection:
        connection.sendall(post(site))
        assert status(connection.recv(4096)) == 200
        assert is_cut_off(connection)


def test_a_superlink_that_is_down_is_a_503_that_nodes_try_again(site: Site, public_tls: Loopback) -> None:
    enrolled = Enrolled({site.public: "north"})
    door = Door(f"127.0.0.1:{free_port()}", None, public_tls, enrolled, GENEROUS)
    try:
        assert status(exchange(door, post(site))) == 503
        assert door.counts()["refused: superlink"] == 1
    finally:
        door.close()


@pytest.mark.parametrize(
    "reply", [b"content-length: 100\r\n\r\nhalf", b"transfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n"]
)
def test_a_superlink_that_breaks_off_in_its_reply_is_not_taken_for_a_whole_one(
    reply: bytes, site: Site, public_tls: Loopback
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def break_off() -> None:
            upstream, _ = listener.accept()
            with upstream:
                upstream.recv(65536)
                upstream.sendall(b"HTTP/1.1 200 OK\r\n" + reply)

        threading.Thread(target=break_off, daemon=True).start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        door = Door(address, None, public_tls, Enrolled({site.public: "north"}), GENEROUS)
        try:
            with client(door) as http, pytest.raises(httpx.TransportError):
                http.post("/v1/fleet/pull-object", headers=signed(site), content=b"abc")
            until(lambda: door.counts()["open"] == 0)
            assert door.counts().get("faults", 0) == 0
            assert door.counts()["refused: superlink"] == 1
        finally:
            door.close()


def test_stopping_lets_a_request_on_its_way_end_and_nobody_in(site: Site, public_tls: Loopback) -> None:
    sink = Sink(reply_bytes=5, seconds_to_read=0.6)
    with opened_before_sink(sink, public_tls, {site.public: "north"}) as door:
        with dial(door) as idle, dial(door) as busy:
            busy.sendall(post(site))
            until(lambda: sink.heads)
            port = door.port
            begin = time.monotonic()
            door.stop(grace=20)
            assert time.monotonic() - begin < 8
            answer = read_all(busy)
            assert status(answer) == 200
            assert b"connection: close" in answer
            assert is_cut_off(idle)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 1)


def test_stopping_takes_no_longer_than_the_time_given(site: Site, public_tls: Loopback) -> None:
    sink = Sink(seconds_to_read=30)
    with opened_before_sink(sink, public_tls, {site.public: "north"}) as door, dial(door) as busy:
        busy.sendall(post(site))
        until(lambda: sink.heads)
        begin = time.monotonic()
        door.stop(grace=0.5)
        assert time.monotonic() - begin < 4
        assert is_cut_off(busy)


def test_without_tls_the_door_opens_on_loopback_only(public_tls: Loopback, tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.0.2.7", "example.org", "::"):  # noqa: S104
        with pytest.raises(ConfigError, match="is not loopback"):
            Gateway(host, 0, None, None, "127.0.0.1:1", None, GENEROUS, None)
    with pytest.raises(ConfigError, match="together"):
        Gateway("127.0.0.1", 0, public_tls.certificate, public_tls.key, "127.0.0.1:1", None, GENEROUS, None)
    with pytest.raises(ConfigError, match="together"):
        Gateway("127.0.0.1", 0, None, None, "127.0.0.1:1", None, GENEROUS, Enrolled())


def test_without_tls_nodes_need_no_keys_and_the_paths_are_still_the_only_ones() -> None:
    sink = Sink()
    door = Door(sink.address, None, None, None, GENEROUS)
    try:
        for path, expected in (("/v1/fleet/register-node", 200), ("/v1/control/start-run", 404)):
            request = head("POST", path, {"content-length": "1", "connection": "close"}) + b"x"
            assert status(exchange(door, request)) == expected
    finally:
        door.close()
        sink.close()


def test_a_wrong_setting_is_one_line_that_names_it(public_tls: Loopback, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[tls\] certificate=.*nothing.pem"):
        Gateway("127.0.0.1", 0, tmp_path / "nothing.pem", public_tls.key, "127.0.0.1:1", None, GENEROUS, Enrolled())
    with pytest.raises(ConfigError, match=r"\[tls\] certificate="):
        Gateway("127.0.0.1", 0, public_tls.ca, public_tls.key, "127.0.0.1:1", None, GENEROUS, Enrolled())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        gateway = Gateway("127.0.0.1", port, None, None, "127.0.0.1:1", None, GENEROUS, None)
        with pytest.raises(ConfigError, match=f"port={port}: .*in use"):
            asyncio.run(gateway.start())


def test_only_tls_1_3_and_http_1_1_are_spoken(public_tls: Loopback) -> None:
    with opened_before_sink(Sink(), public_tls, {}) as door:
        context = ssl.create_default_context(cafile=str(public_tls.ca))
        context.set_alpn_protocols(["h2", "http/1.1"])
        with (
            socket.create_connection(("127.0.0.1", door.port)) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1") as it,
        ):
            assert (it.version(), it.selected_alpn_protocol()) == ("TLSv1.3", "http/1.1")
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection(("127.0.0.1", door.port)) as raw, pytest.raises(ssl.SSLError):
            context.wrap_socket(raw, server_hostname="127.0.0.1")


def test_refusals_are_logged_a_few_and_hold_no_keys(
    site: Site, public_tls: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), opened_before_sink(Sink(), public_tls, {}) as door:
        for _ in range(40):
            exchange(door, post(site, b"secret body"))
        assert status(exchange(door, b"GET /\x7f%0aforged HTTP/1.1\r\nhost: x\r\n\r\n")) in (400, 404)
        assert door.counts()["refused: unknown key"] == 40
    lines = [record.getMessage() for record in caplog.records if record.name == "moonflower.gateway"]
    assert 10 <= len(lines) <= 25
    assert "refused 127.0.0.1: unknown key" in lines
    text = "\n".join(lines)
    assert "secret body" not in text
    assert signed(site)["flwr-public-key"][:40] not in text


def test_resets_and_garbage_leave_no_descriptor_behind(public_tls: Loopback) -> None:
    with opened_before_sink(Sink(), public_tls, {}, limits(handshake_seconds=1, connections_per_address=1000)) as door:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for n in range(60):
            raw = socket.create_connection(("127.0.0.1", door.port))
            if n % 3:
                raw.sendall(b"GET / HTTP/1.1\r\n\r\n" if n % 2 else bytes(range(n)))
            if n % 5 == 0:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raw.close()
        until(lambda: door.counts().get("connections") == 60 and door.counts()["open"] == 0, 5)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before
        assert door.counts().get("faults", 0) == 0


def test_pieces_wait_while_the_disk_is_nearly_full_and_the_log_says_who_sent_most(
    site: Site, public_tls: Loopback, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [10 << 30]
    monkeypatch.setattr(room, "LOOK", 0.0)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    sink = Sink()
    door = Door(sink.address, None, public_tls, Enrolled({site.public: "north"}), limits(), tmp_path)
    try:
        with client(door) as http:
            assert http.post(PIECE, headers=signed(site), content=bytes(3 << 20)).status_code == 200
            free[0] = 1 << 29
            for _ in range(2):
                refused = http.post(PIECE, headers=signed(site), content=b"x")
                assert (refused.status_code, "disk is nearly full" in refused.text) == (503, True)
            assert http.post(PULL, headers=signed(site), content=b"x").status_code == 200
            free[0] = 10 << 30
            assert http.post(PIECE, headers=signed(site), content=b"x").status_code == 200
    finally:
        door.close()
        sink.close()
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 1
    assert "512 MiB free, below gateway.least_free_mib=1024" in said[0]
    assert "north 3 MiB" in said[0]


def test_a_site_that_announces_without_end_waits_longer_and_longer(site: Site, public_tls: Loopback) -> None:
    """Each piece that an envelope announces is work for the SuperLink's database, on which all sites wait."""

    def envelope(pieces: int) -> bytes:
        children = [ObjectTree(object_id=f"{number:064x}") for number in range(pieces)]
        return PushMessagesRequest(message_object_trees=[ObjectTree(children=children)]).SerializeToString()

    with opened_before_sink(Sink(), public_tls, {site.public: "north"}, limits()) as door, client(door) as http:
        seconds = []
        for pieces in (3500, 1000, 500):
            started = time.monotonic()
            sent = http.post("/v1/fleet/push-messages", headers=signed(site), content=envelope(pieces), timeout=30)
            assert sent.status_code == 200
            seconds.append(time.monotonic() - started)
        assert seconds[0] < 1 < min(seconds[1:]) < max(seconds[1:]) < 6
        assert http.post(PULL, headers=signed(site), content=b"x").elapsed.total_seconds() < 1
