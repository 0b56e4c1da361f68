"""What may pass is a list; everything else does not, however it is written."""

import h11
import pytest
from flwr.superlink.routers.fleet.router import router
from hypothesis import given
from hypothesis import strategies as st

from server.gateway.request import (
    ACTIVATE,
    FOR_NODES,
    FOR_NODES_WITHOUT_KEYS,
    INWARD,
    MAX_HEAD,
    Head,
    Refusal,
    check,
)

MIB = 1 << 20
PULL = b"/v1/fleet/pull-messages"


def parsed(raw: bytes) -> Head:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    connection.receive_data(raw)
    event = connection.next_event()
    assert isinstance(event, h11.Request)
    return check(event, FOR_NODES, MIB)


def request(method: bytes = b"POST", target: bytes = PULL, headers: bytes = b"content-length: 3\r\n") -> bytes:
    return method + b" " + target + b" HTTP/1.1\r\nhost: door\r\n" + headers + b"\r\n"


def refused(raw: bytes) -> int:
    with pytest.raises(Refusal) as refusal:
        parsed(raw)
    return refusal.value.status


def test_the_paths_are_those_of_flowers_fleet_api() -> None:
    theirs = {f"{route.path}".encode() for route in router.routes}
    assert theirs == FOR_NODES_WITHOUT_KEYS
    assert {b"/v1/fleet/register-node", b"/v1/fleet/unregister-node"} == FOR_NODES_WITHOUT_KEYS - FOR_NODES
    assert ACTIVATE in FOR_NODES


def test_a_supernodes_request_passes_with_its_length() -> None:
    assert parsed(request()) == Head(PULL, {}, 3)


@pytest.mark.parametrize(
    "target",
    [
        b"/",
        b"*",
        b"/v1/fleet",
        b"/v1/fleet/",
        b"/v1/fleet/register-node",  # a site's node is enrolled, and registers nobody
        b"/v1/fleet/unregister-node",
        b"/v1/fleet/pull-messages/",
        b"/v1/fleet//pull-messages",
        b"//v1/fleet/pull-messages",
        b"/v1/fleet/pull-messages?",
        b"/v1/fleet/pull-messages?x=/v1/control/start-run",
        b"/v1/fleet/pull-messages#x",
        b"/v1/fleet/pull-messages;x",
        b"/v1/fleet/pull%2Dmessages",
        b"/v1%2ffleet%2fpull-messages",
        b"/v1/fleet/..%2fcontrol/start-run",
        b"/v1/fleet/%2e%2e/control/start-run",
        b"/v1/fleet/../control/start-run",
        b"/v1/fleet/./pull-messages",
        b"/v1/fleet/..;/control/start-run",
        b"/v1/fleet\\..\\control\\start-run",
        b"/v1/control/../fleet/pull-messages",
        b"/V1/FLEET/PULL-MESSAGES",
        b"/v1/control/start-run",
        b"/v1/runtime/acquire-task",
        b"/openapi.json",
        b"https://127.0.0.1/v1/fleet/pull-messages",
        b"http://127.0.0.1:9/v1/control/start-run",
        b"127.0.0.1:443",
    ],
)
def test_any_other_target_is_not_found(target: bytes) -> None:
    assert refused(request(target=target)) == 404


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"PUT", b"OPTIONS", b"CONNECT", b"TRACE", b"post", b"PRI", b"X"])
def test_any_other_method_is_not_found(method: bytes) -> None:
    assert refused(request(method=method)) == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"", 411),
        (b"transfer-encoding: chunked\r\n", 411),
        (b"transfer-encoding: chunked\r\ncontent-length: 3\r\n", 411),
        (b"content-length: 3\r\ntransfer-encoding: chunked\r\n", 411),
        (b"content-length: 3\r\nupgrade: websocket\r\nconnection: upgrade\r\n", 400),
        (b"content-length: 3\r\nupgrade: h2c\r\nconnection: upgrade, http2-settings\r\nhttp2-settings: AA\r\n", 400),
        (b"content-length: 3\r\nexpect: 100-continue\r\n", 400),
        (b"content-length: 3\r\nflwr-public-key: a\r\nflwr-public-key: b\r\n", 400),
        (b"content-length: 3\r\nFlwr-Signature: a\r\nflwr-signature: a\r\n", 400),
        (b"content-length: 1048577\r\n", 413),
        (b"content-length: 99999999999999999999\r\n", 413),
    ],
)
def test_a_head_that_two_readers_could_take_differently_is_refused(headers: bytes, status: int) -> None:
    assert refused(request(headers=headers)) == status


@pytest.mark.parametrize(
    "headers",
    [
        b"content-length: 3\r\ncontent-length: 4\r\n",
        b"content-length: -3\r\n",
        b"content-length: +3\r\n",
        b"content-length: 0x3\r\n",
        b"content-length : 3\r\n",
        b"transfer-encoding: chunked, identity\r\n",
        b"transfer-encoding: \x0bchunked\r\n",
        b"x: a\x00b\r\ncontent-length: 3\r\n",
        b"host: other\r\ncontent-length: 3\r\n",
    ],
)
def test_the_parser_refuses_what_is_no_header(headers: bytes) -> None:
    with pytest.raises(h11.RemoteProtocolError):
        parsed(request(headers=headers))


def test_http_1_0_is_refused() -> None:
    assert refused(request().replace(b"HTTP/1.1", b"HTTP/1.0")) == 505


def test_only_the_headers_of_a_supernode_pass() -> None:
    names = [
        b"connection",
        b"te",
        b"keep-alive",
        b"proxy-authorization",
        b"x-forwarded-for",
        b"cookie",
        b"authorization",
    ]
    extra = b"".join(name + b": flwr-signature\r\n" for name in names)
    head = parsed(request(headers=b"content-length: 3\r\nContent-Type: application/protobuf\r\n" + extra))
    assert head.headers == {b"content-type": b"application/protobuf"}


TOKEN = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=12).map(str.encode)
PIECES = st.lists(
    st.sampled_from(
        [
            b"/",
            b"v1",
            b"fleet",
            b"control",
            b"pull-messages",
            b"push-object",
            b"..",
            b".",
            b"%2f",
            b"%2e",
            b"?",
            b"#",
            b"\\",
            b";",
        ]
    ),
    max_size=9,
).map(b"".join)


@given(
    method=st.one_of(st.just(b"POST"), TOKEN),
    target=st.one_of(PIECES, PIECES.map(lambda tail: PULL + tail), st.sampled_from(sorted(FOR_NODES))),
    headers=st.lists(
        st.tuples(
            st.sampled_from(
                [
                    *INWARD,
                    b"content-length",
                    b"transfer-encoding",
                    b"connection",
                    b"upgrade",
                    b"x-original-url",
                    b"cookie",
                ]
            ),
            st.sampled_from([b"3", b"chunked", b"/v1/control/start-run", b"upgrade", b"close", b"9999999999"]),
        ),
        max_size=8,
    ),
    version=st.sampled_from([b"1.1", b"1.0", b"2.0", b"0.9"]),
)
def test_whatever_passes_is_a_post_to_a_known_path_with_one_length(
    method: bytes, target: bytes, headers: list[tuple[bytes, bytes]], version: bytes
) -> None:
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    raw = method + b" " + target + b" HTTP/" + version + b"\r\nhost: door\r\n" + lines + b"\r\n"
    try:
        head = parsed(raw)
    except (Refusal, h11.RemoteProtocolError):
        return
    names = [name for name, _ in headers]
    assert (method, version, head.path) == (b"POST", b"1.1", target)
    assert head.path in FOR_NODES
    assert head.length <= MIB
    assert names.count(b"content-length") >= 1
    assert not {b"transfer-encoding", b"upgrade"} & set(names)
    assert set(head.headers) <= INWARD
    assert all(names.count(name) == 1 for name in head.headers)
