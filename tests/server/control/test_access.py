"""Who may call what: every method of the service, with each kind of token and certificate."""

import datetime
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from datetime import UTC, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from grpc_health.v1 import health_pb2

from server.control import coordinator_pb2 as pb
from server.control import door
from shared import certificates

METHODS = [
    *(f"/{pb.DESCRIPTOR.package}.{service.name}/{method.name}" for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods),
    *(f"/grpc.health.v1.Health/{method.name}" for method in health_pb2.DESCRIPTOR.services_by_name["Health"].methods),
]  # fmt: skip
FOR_VIEWERS = {"ListRuns", "GetRun", "WatchRun", "ListSites", "Check"}
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def call():
    """Call a method by its path with an empty request; give the status that it ends with, and its text."""

    def ask(coordinator, method, metadata):
        credentials = grpc.ssl_channel_credentials(coordinator.authority.certificate)
        with grpc.secure_channel(coordinator.address, credentials) as channel:
            answers = channel.unary_stream(method)(b"", metadata=metadata, timeout=10)
            try:
                next(iter(answers), None)
            except grpc.RpcError as error:
                return error.code(), error.details()
            answers.cancel()
            return Code.OK, ""

    return ask


def bearer(secret):
    return [("authorization", f"Bearer {secret}")]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_asks_for_a_token_and_for_the_role_that_it_takes(coordinator, call, method):
    name = method.rpartition("/")[2]
    for metadata, said in (
        (None, "a token is needed"),
        ([("authorization", coordinator.secrets["ann"])], "a token is needed"),
        ([("authorization", f"Basic {coordinator.secrets['ann']}")], "a token is needed"),
        (bearer(coordinator.secrets["nobody"]), "unknown token"),
        (bearer(coordinator.secrets["old"]), "the token of 'old' expired"),
    ):
        code, text = call(coordinator, method, metadata)
        assert (code, said in text) == (Code.UNAUTHENTICATED, True), text
    code, text = call(coordinator, method, bearer(coordinator.secrets["vic"]))
    if name in FOR_VIEWERS:
        assert code not in {Code.UNAUTHENTICATED, Code.PERMISSION_DENIED}, text
    else:
        assert (code, text) == (Code.PERMISSION_DENIED, "the token of 'vic' is a viewer's; this takes an admin's.")
    code, text = call(coordinator, method, bearer(coordinator.secrets["ann"]))
    assert code not in {Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.UNKNOWN}, text


def test_the_methods_are_all_there():
    assert {method.rpartition("/")[2] for method in METHODS} >= {
        *("SubmitRun", "ListRuns", "GetRun", "WatchRun", "StopRun", "ListSites", "EnrolSite", "RevokeSite"),
        *("ExportModel", "Check", "Watch"),
    }
    assert set(METHODS) >= door.VIEWERS


def test_a_method_that_nobody_has_named_takes_an_admin(coordinator, call):
    code, _ = call(coordinator, "/moonflower.v1.Coordinator/Later", bearer(coordinator.secrets["vic"]))
    assert code is Code.PERMISSION_DENIED


def test_a_viewer_stops_enrols_and_exports_nothing(coordinator):
    run = coordinator.submit()
    key = coordinator.folder / "key.pub"
    key.write_text(certificates.new_node_key()[1], encoding="utf-8")
    for arguments in (
        ("run", "stop", run.id),
        ("run", "export", run.id, "--out", str(coordinator.folder / "model")),
        ("site", "enrol", "st-marys", str(key)),
    ):
        done = coordinator.call(*arguments, who="vic")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            f"Error: {coordinator.address}: the token of 'vic' is a viewer's; this takes an admin's.\n"
        )
    assert coordinator.history.run(run.id).status == "pending"
    assert coordinator.history.site_keys() == []
    assert run.id in coordinator.call("run", "list", who="vic").stdout


def test_a_token_that_is_revoked_in_the_file_is_refused_from_the_next_call_on(coordinator):
    with coordinator.client() as client:
        client.call("ListRuns", pb.ListRunsRequest())
        (coordinator.folder / "tokens.json").write_text('{"tokens": []}', encoding="utf-8")
        with pytest.raises(Exception, match="unknown token"):
            client.call("ListRuns", pb.ListRunsRequest())
        (coordinator.folder / "tokens.json").write_text("no tokens at all", encoding="utf-8")
        with pytest.raises(Exception, match="the server cannot read its tokens; its log says why"):
            client.call("ListRuns", pb.ListRunsRequest())


@pytest.mark.parametrize(("who", "said"), [("nobody", "unknown token"), ("old", "the token of 'old' expired at 20")])
def test_the_command_line_says_in_one_line_what_is_wrong_with_a_token(coordinator, who, said):
    done = coordinator.call("run", "list", who=who)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: {coordinator.address}: {said}")
    assert len(done.stderr.splitlines()) == 1
    assert coordinator.secrets[who] not in done.stderr


def test_a_certificate_of_another_authority_is_refused_before_the_token_is_sent(coordinator):
    other = coordinator.folder / "other.pem"
    other.write_bytes(certificates.authority("other", 10).certificate)
    done = coordinator.call("run", "list", MOONFLOWER_CA=str(other))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"Error: {coordinator.address}: its certificate is not by the authority of {other}; "
        "is that the ca.pem of this coordinator?\n"
    )


def dated(authority, first, last, host="localhost"):
    """Make a server certificate that holds between two days from today."""
    pair = certificates.issue(authority, "north", [host], 10)
    made, ca = (x509.load_pem_x509_certificate(each.certificate) for each in (pair, authority))
    today = datetime.datetime.now(UTC)
    builder = x509.CertificateBuilder(
        made.issuer,
        made.subject,
        made.public_key(),
        made.serial_number,
        today + timedelta(first),
        today + timedelta(last),
    )
    for extension in made.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    signed = builder.sign(load_pem_private_key(authority.key, None), hashes.SHA384())
    assert signed.issuer == ca.subject
    return certificates.Pair(signed.public_bytes(certificates.Encoding.PEM), pair.key)


@pytest.mark.parametrize(
    ("first", "last", "host", "said"),
    [
        (-20, -1, "localhost", "its certificate has expired; whoever runs it issues a new one with"),
        (1, 9, "localhost", "its certificate is not valid yet; look at the clocks of both machines."),
        (-1, 9, "elsewhere.example.org", "its certificate is for another name; call it by a name that it was issued for."),
    ],
)  # fmt: skip
def test_a_certificate_that_does_not_hold_is_refused_in_one_line(make, sqlite_url, authority, first, last, host, said):
    with make(sqlite_url, dated(authority, first, last, host)).running() as coordinator:
        done = coordinator.call("run", "list")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"Error: {coordinator.address}: {said}")
        assert len(done.stderr.splitlines()) == 1


def test_a_server_that_is_down_is_named_in_one_line(make, sqlite_url):
    with make(sqlite_url).running() as coordinator:
        pass
    done = coordinator.call("run", "list")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"Error: {coordinator.address} does not answer (Connection refused); is the server running, and the port right?\n"
    )


def test_without_tls_everybody_of_this_machine_is_an_admin_and_nobody_of_another(make, sqlite_url):
    with make(sqlite_url).running(insecure=True) as coordinator:
        coordinator.history.enrol("st-marys", "ecdsa-sha2-nistp384 AAAA")
        done = coordinator.call("site", "revoke", "st-marys", "--yes", "--insecure")
        assert (done.returncode, done.stdout) == (0, "st-marys: revoked.\n")
        other = coordinator.call("site", "list", "--insecure", "--server", "192.0.2.7:9444")
        assert other.stderr == (
            "Error: --insecure is plaintext and only for this machine; 192.0.2.7:9444 is another one.\n"
        )
        secure = coordinator.call("site", "list")
        assert secure.returncode == 1
        assert "does not speak TLS as a coordinator does; is that its control port?" in secure.stderr


def test_a_port_that_is_taken_stops_the_service_in_one_line(coordinator):
    script = str(Path(__file__).with_name("serve.py"))
    command = [sys.executable, script, str(coordinator.folder / "server.toml"), str(coordinator.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert f"ConfigError: control.host='127.0.0.1', control.port={coordinator.port}: cannot listen there" in done.stderr


def test_viewers_leave_room_for_an_admin_whatever_they_hold_open(coordinator, monkeypatch):
    monkeypatch.setattr(door, "DEADLINE", 2.0)
    credentials = grpc.ssl_channel_credentials(coordinator.authority.certificate)
    metadata, never = bearer(coordinator.secrets["vic"]), threading.Event()

    def unending():  # a request of which nothing ever comes
        never.wait(30)
        yield b""

    with ExitStack() as opened:
        opened.callback(never.set)
        calls = []
        for _ in range(8):
            channel = opened.enter_context(
                grpc.secure_channel(coordinator.address, credentials, [("grpc.use_local_subchannel_pool", 1)])
            )
            ask = channel.stream_unary(f"/{door.SERVICE}/ListRuns")
            calls += [ask.future(unending(), metadata=metadata, timeout=20) for _ in range(12)]
        time.sleep(0.5)
        with coordinator.client("ann") as admin:
            assert admin.call("ListSites", pb.ListSitesRequest()) is not None
        ended = {call.code() for call in calls}
        assert ended <= {Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED}
    with coordinator.client("vic") as viewer:  # and when the time is over, all is as before
        assert viewer.call("ListSites", pb.ListSitesRequest()) is not None
