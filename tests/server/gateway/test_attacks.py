"""What a site's kit, or anyone, may try at the coordinator's public port: nothing but a node's own calls gets through."""

import random
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from doors import GENEROUS, Door, Site, SuperLink, exchange, head, new_site, opened, signed, status, until
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from server.gateway.request import FOR_NODES
from shared.certificates import Loopback

BUNDLE = """
[project]
name = "hostile"
version = "1.0.0"
[tool.flwr.app]
publisher = "anyone"
[tool.flwr.app.components]
serverapp = "hostile:app"
clientapp = "hostile:app"
"""


@pytest.fixture(scope="module")
def insider(superlink: SuperLink, tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, int]:
    """Give a site that is enrolled and registered: its kit holds the authority's certificate and its own key."""
    site = new_site(tmp_path_factory.mktemp("insider"), "insider")
    return site, superlink.register(site)


@pytest.fixture(scope="module")
def door(superlink: SuperLink, public_tls: Loopback, insider: tuple[Site, int]) -> Iterator[Door]:
    with opened(superlink, public_tls, {insider[0].public: "insider"}) as it:
        yield it


def test_flwr_run_and_flwr_supernode_register_work_on_loopback_and_not_at_the_door(
    superlink: SuperLink, door: Door, public_tls: Loopback, tmp_path: Path
) -> None:
    bundle = tmp_path / "hostile"
    bundle.mkdir()
    (bundle / "pyproject.toml").write_text(BUNDLE)
    (bundle / "hostile.py").write_text("app = None\n")
    site = new_site(tmp_path, "uninvited")
    (tmp_path / "key.pub").write_text(site.public)
    register = ("supernode", "register", str(tmp_path / "key.pub"), "--name", "uninvited")
    before = door.counts().get("refused: path", 0)
    for command in (("run", str(bundle)), register):
        with pytest.raises(ValueError, match=r"404|Not Found|not found"):
            superlink.command(*command, address=door.address, ca=public_tls.ca)
    assert door.counts()["refused: path"] >= before + 2
    assert superlink.command("list")["runs"] == []
    assert superlink.command(*register)["success"]


def test_every_call_of_flower_but_a_nodes_own_is_not_found_signed_or_not(door: Door, insider: tuple[Site, int]) -> None:
    others = {path for method, path in PROTOBUF_REQUEST_TYPES if path.encode() not in FOR_NODES}
    assert {"/v1/runtime/acquire-task", "/v1/control/start-run", "/v1/fleet/register-node"} <= others
    passed = door.counts().get("passed", 0)
    with httpx.Client(base_url=f"https://{door.address}", verify=door.trust or False) as client:
        for path in sorted(others | {"/docs", "/openapi.json", "/health", "/v1/runtime/responses"}):
            headers = {**signed(insider[0]), "content-type": "application/protobuf"}
            assert client.post(path, headers=headers, content=b"").status_code == 404, path
        assert client.get("/docs").status_code == 404
    assert door.counts().get("passed", 0) == passed


def test_a_site_cannot_speak_for_another(
    superlink: SuperLink, door: Door, insider: tuple[Site, int], tmp_path: Path
) -> None:
    site, node_id = insider
    victim = superlink.register(new_site(tmp_path, "victim"))
    assert status(exchange(door, pull(site, node_id))) == 200
    assert status(exchange(door, pull(site, victim))) == 401


def pull(site: Site, node_id: int) -> bytes:
    """Write a request for a node's messages, signed by a site, as the last on its connection."""
    body = PullMessagesRequest(node=NodeProto(node_id=node_id)).SerializeToString()
    headers = {"content-type": "application/protobuf", "content-length": str(len(body)), "connection": "close"}
    return head("POST", "/v1/fleet/pull-messages", {**signed(site), **headers}) + body


def garbage(luck: random.Random, insider: Site) -> tuple[bool, bytes]:
    """Return whether to speak TLS, and what to send then. None of it may pass."""
    kind = luck.randrange(8)
    if kind == 0:
        return False, luck.randbytes(luck.randrange(300))
    if kind == 1:  # a TLS record with a wrong content
        return False, bytes([luck.choice((20, 21, 22, 23, 24)), 3, luck.randrange(5)]) + luck.randbytes(
            luck.randrange(300)
        )
    if kind == 2:
        return False, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    if kind == 3:
        return True, luck.randbytes(luck.randrange(2000))
    if kind == 4:
        return True, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + luck.randbytes(100)
    request = bytearray(
        head(
            luck.choice(("POST", "GET", "PUT", "CONNECT", "\x00")),
            luck.choice(
                ("/v1/control/start-run", "/v1/fleet/register-node", "/v1/fleet/../runtime/acquire-task", "/", "*")
            ),
            {
                **signed(insider),
                luck.choice(("content-length", "transfer-encoding", "upgrade")): luck.choice(
                    ("5", "chunked", "h2c", "-1")
                ),
            },
        )
    )
    for _ in range(luck.randrange(4) if kind > 5 else 0):
        request[luck.randrange(len(request))] = luck.randrange(256)
    if b"/v1/fleet/p" in request:  # by one chance in a great many, it has become a right one
        return True, b""
    return True, bytes(request) + luck.randbytes(luck.randrange(50))


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_door_stays_as_it_was_under_garbage(
    count: int, superlink: SuperLink, public_tls: Loopback, insider: tuple[Site, int]
) -> None:
    luck = random.Random(count)  # noqa: S311 - a test's
    site, node_id = insider
    limits = GENEROUS.model_copy(update={"head_seconds": 0.1, "handshake_seconds": 5.0})
    with opened(superlink, public_tls, {site.public: "insider"}, limits) as door:
        before = descriptors()
        for _ in range(count):
            tls, sent = garbage(luck, site)
            if tls:
                answer = exchange(door, sent) if sent else b""
                assert not 200 <= status(answer) < 300, (sent, answer)
                continue
            with socket.create_connection(("127.0.0.1", door.port)) as raw, suppress(ConnectionError):
                raw.sendall(sent)
        begin = time.monotonic()
        assert status(exchange(door, pull(site, node_id))) == 200
        assert time.monotonic() - begin < 5
        until(lambda: door.counts()["open"] == 0, 15)
        counts = door.counts()
        assert counts["passed"] == 1
        assert counts.get("faults", 0) == 0
        assert descriptors() <= before + 1  # the kept connection to the SuperLink


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
