"""Whatever is sent to the port, the service answers or hangs up, and lives."""

import socket
import ssl
import sys

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.control import coordinator_pb2 as pb
from server.control import exporting

METHODS = {method.name: method for method in pb.DESCRIPTOR.services_by_name["Coordinator"].methods}
MESSAGES = {name: getattr(pb, method.input_type.name) for name, method in METHODS.items()}
TEXT = st.text(max_size=60) | st.sampled_from(["last", "lungs", "../../etc", "\0", "%s", "'; DROP TABLE runs; --"])
VALUES = {"string": TEXT, "bytes": st.binary(max_size=200), "bool": st.booleans()}
NUMBERS = {"int32": 31, "int64": 63}
TOLD = {  # all that may be answered to nonsense: no crash, no INTERNAL
    *(grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND),
}
GARBAGE = st.binary(max_size=400) | st.sampled_from(
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 100,
        b"\x16\x03\x01\xff\xff",
        b"\0" * 5000,
    ]
)


NOTHING = "import json; print(json.dumps({'kind': 'NotFoundError', 'text': 'nothing'})); raise SystemExit(1)"


@pytest.fixture(autouse=True)
def exports_nothing(monkeypatch):
    """Spare each export the process that loads torch."""
    monkeypatch.setattr(exporting, "COMMAND", (sys.executable, "-I", "-S", "-c", NOTHING))


def request_of(draw, kind):
    """Fill a message with values of the right types and no sense."""
    made = kind()
    for field in kind.DESCRIPTOR.fields:
        if draw(st.booleans()):
            continue
        name = {9: "string", 12: "bytes", 8: "bool", 5: "int32", 3: "int64"}[field.type]
        bits = NUMBERS.get(name)
        value = draw(st.integers(-(2**bits), 2**bits - 1) if bits else VALUES[name])
        try:
            setattr(made, field.name, value)
        except UnicodeEncodeError:  # half a surrogate pair is no protobuf string
            continue
    return made.SerializeToString()


@st.composite
def calls(draw):
    """Draw a method, and bytes for it: nonsense, or a message full of it."""
    name = draw(st.sampled_from(sorted(METHODS)))
    return name, draw(st.binary(max_size=200)) if draw(st.booleans()) else request_of(draw, MESSAGES[name])


def alive(coordinator):
    with coordinator.client() as client:
        client.call("ListRuns", pb.ListRunsRequest())


def throw(coordinator, data, *, tls):
    """Open a connection, send bytes, and hang up, with the other end's answer unread or read."""
    with socket.create_connection(("127.0.0.1", coordinator.port), timeout=10) as raw:
        if not tls:
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
            return
        context = ssl.create_default_context(cadata=coordinator.authority.certificate.decode())
        context.set_alpn_protocols(["h2"])
        with context.wrap_socket(raw, server_hostname="localhost") as wrapped:
            wrapped.sendall(data)


def call(channel, name, data, metadata):
    answers = channel.unary_stream(f"/{pb.DESCRIPTOR.package}.Coordinator/{name}")(data, metadata=metadata, timeout=20)
    try:
        next(answers, None)
    except grpc.RpcError as error:
        return error.code(), error.details()
    finally:
        answers.cancel()
    return grpc.StatusCode.OK, ""


def fuzz(coordinator, new_round, times):
    """Throw so many things at the port: a third raw bytes, a third bytes after TLS, a third calls of an admin."""
    share = settings(
        max_examples=times // 3,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    run = coordinator.submit().id
    coordinator.history.start_attempt(run, engine="flower")
    coordinator.history.commit_round(new_round(1, run=run))
    metadata = [("authorization", f"Bearer {coordinator.secrets['ann']}")]
    credentials = grpc.ssl_channel_credentials(coordinator.authority.certificate)
    with grpc.secure_channel(coordinator.address, credentials) as channel:

        @share
        @given(GARBAGE, st.booleans())
        def bytes_to_the_port(data, tls):
            throw(coordinator, data, tls=tls)

        @share
        @given(calls())
        def calls_of_nobody(drawn):
            code, _ = call(channel, *drawn, [("authorization", "Bearer no")])
            assert code is grpc.StatusCode.UNAUTHENTICATED

        @share
        @given(calls())
        def calls_of_an_admin(drawn):
            code, text = call(channel, *drawn, metadata)
            assert code in TOLD, (code, text)

        bytes_to_the_port()
        calls_of_nobody()
        calls_of_an_admin()
    alive(coordinator)


def test_nonsense_is_answered_and_survived(coordinator, new_round):
    fuzz(coordinator, new_round, 240)


@pytest.mark.slow
def test_ten_thousand_times_nonsense_is_survived(coordinator, new_round):
    fuzz(coordinator, new_round, 10_000)


@pytest.mark.slow
def test_nonsense_is_survived_on_postgresql(make, postgres_url, new_round):
    with make(postgres_url).running() as running:
        fuzz(running, new_round, 1000)


def test_a_request_beyond_the_limit_is_refused_and_not_kept(coordinator):
    with coordinator.client() as client, pytest.raises(Exception, match="larger than max"):
        client.call("GetRun", pb.GetRunRequest(run="x" * (66 << 20)))
    alive(coordinator)


def test_a_stranger_cannot_make_the_server_take_a_large_request_in(coordinator):
    """A caller without a token is answered before his request is read."""
    credentials = grpc.ssl_channel_credentials(coordinator.authority.certificate)
    options = [("grpc.max_send_message_length", -1)]
    with grpc.secure_channel(coordinator.address, credentials, options) as channel:
        code, text = call(channel, "SubmitRun", b"\x0a" + b"\xff" * (200 << 20), [])
    assert code is grpc.StatusCode.UNAUTHENTICATED, text
    alive(coordinator)
