"""An exported model on its way: whole or not at all, at both ends."""

import gzip
import hashlib
import io
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from server.control import coordinator_pb2 as pb
from server.control import exporting, receiving
from server.control.client import Client
from server.control.target import Target
from shared.errors import ConfigError, MoonflowerError, NotFoundError

WRITER = '''"""Stands in for the process that exports: writes a folder, or does what FORM and ROUND say."""
import json, sys
from pathlib import Path
run, folder, form, number, out = sys.argv[1:]
if number == "7":
    print(json.dumps({"kind": "NotFoundError", "text": "round 7 has no checkpoint any more."}))
    sys.exit(1)
if number == "8":
    sys.exit("Traceback: the secrets of the state folder")
(Path(out) / "sub").mkdir(parents=True)
(Path(out) / "model.safetensors").write_bytes(bytes(range(256)) * 20_000)
(Path(out) / "sub" / "README.md").write_text(f"{run} {form} {Path(folder).name}")
'''


def tar(*members):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def special(kind, linkname):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo("a")
        member.type, member.linkname = kind, linkname
        archive.addfile(member)
    return packed.getvalue()


def chain_of_links():
    """Write what leads `filter="data"` of older Pythons out of the folder (CVE-2025-4517), to a file above it."""
    packed, folder, steps, path = io.BytesIO(), "d" * 247, "abcdefghijklmnop", ""

    def add(name, kind, linkname=""):
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, linkname
        archive.addfile(member)

    with tarfile.open(fileobj=packed, mode="w") as archive:
        for step in steps:
            add(path + folder, tarfile.DIRTYPE)
            add(path + step, tarfile.SYMTYPE, folder)
            path += folder + "/"
        out = "/".join([*steps, "l" * 254])
        add(out, tarfile.SYMTYPE, "../" * len(steps))
        add("escape", tarfile.SYMTYPE, out + "/../..")
        add("escape/evil", tarfile.REGTYPE)
    return packed.getvalue()


def parts(content, digest=None, size=1000):
    for start in range(0, len(content), size):
        yield pb.ExportModelResponse(data=content[start : start + size])
    yield pb.ExportModelResponse(sha256=hashlib.sha256(content).hexdigest() if digest is None else digest)


def test_what_arrives_whole_is_put_in_place(tmp_path):
    content = tar(("config.json", b"{}"), ("sub/card.md", b"x" * 5000))
    written = receiving.write(parts(content), tmp_path / "model")
    assert written == receiving.Written(
        ["config.json", "sub/card.md"], len(content), hashlib.sha256(content).hexdigest()
    )
    assert (tmp_path / "model" / "sub" / "card.md").read_bytes() == b"x" * 5000
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def cut(content):
    return list(parts(content))[:3]


@pytest.mark.parametrize(
    ("arriving", "said"),
    [
        (lambda content: parts(content, digest="0" * 64), "the model did not arrive whole"),
        (cut, "none was announced"),
        (lambda content: parts(b"no tar at all" * 100), "what arrived is no tar"),
        (lambda content: parts(tar(("../evil", b"x"))), "'../evil', which is no new plain file"),
        (lambda content: parts(tar(("/etc/evil", b"x"), ("../../evil", b"x"))), "'/etc/evil', which is no new plain file"),
        (lambda content: parts(tar(("a", b"x"), ("a", b"y"))), "'a', which is no new plain file"),
        (lambda content: parts(tar(("a", b"x"), ("a/b", b"y"))), "cannot be written"),
        (lambda content: parts(special(tarfile.SYMTYPE, "inner/../../evil")), "'a', which is no new plain file"),
        (lambda content: parts(special(tarfile.LNKTYPE, "/etc/passwd")), "'a', which is no new plain file"),
        (lambda content: parts(special(tarfile.CHRTYPE, "")), "'a', which is no new plain file"),
        (lambda content: parts(special(tarfile.GNUTYPE_SPARSE, "")), "'a', which is no new plain file"),
        (lambda content: parts(gzip.compress(tar(("a", b"x")))), "what arrived is no tar"),
        (lambda content: parts(chain_of_links()), "which is no new plain file"),
    ],
)  # fmt: skip
def test_what_does_not_arrive_whole_leaves_nothing(tmp_path, arriving, said):
    place = tmp_path / "inner"
    place.mkdir()
    with pytest.raises(MoonflowerError, match=said):
        receiving.write(arriving(tar(("config.json", b"{}" * 5000))), place / "model")
    assert list(tmp_path.rglob("*")) == [place]


def test_a_place_that_is_taken_is_refused_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match="exists; name a folder to make"):
        receiving.check(tmp_path)
    with pytest.raises(ConfigError, match="is no folder that can be written to"):
        receiving.check(tmp_path / "none" / "model")


@pytest.fixture
def writer(tmp_path, monkeypatch):
    """Put another program in the place of the one that exports, which needs a trained run."""
    program = tmp_path / "writer.py"
    program.write_text(WRITER, encoding="utf-8")
    monkeypatch.setattr(exporting, "COMMAND", (sys.executable, str(program)))


@pytest.fixture
def run(coordinator, new_round):
    """Enter a run that has committed a round."""
    run = coordinator.submit().id
    coordinator.history.start_attempt(run, engine="flower")
    coordinator.history.commit_round(new_round(1, run=run))
    return run


def test_an_export_is_streamed_and_arrives_as_it_was_written(coordinator, writer, run, tmp_path):
    out = tmp_path / "model"
    done = coordinator.call("run", "export", "last", "--out", str(out), "--form", "adapter")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}: 2 files, 5.1 MB.\n"
    assert (out / "model.safetensors").read_bytes() == bytes(range(256)) * 20_000
    assert (out / "sub" / "README.md").read_text() == f"{run} adapter {run}"
    again = coordinator.call("run", "export", "last", "--out", str(out))
    assert (again.returncode, again.stderr) == (2, f"Error: --out {out} exists; name a folder to make.\n")
    assert not list(coordinator.settings.state.glob(".export-*"))


def test_what_the_exporting_process_says_is_told_and_a_traceback_is_not(coordinator, writer, run):

    def export(number):
        request = pb.ExportModelRequest(run="last", round=number)
        with coordinator.client() as client:
            list(client.stream("ExportModel", request))

    with pytest.raises(NotFoundError, match=r"^round 7 has no checkpoint any more\.$"):
        export(7)
    with pytest.raises(MoonflowerError) as caught:
        export(8)
    assert "the coordinator failed to answer; its log says why." in str(caught.value)
    assert "secrets" not in str(caught.value)
    with pytest.raises(ConfigError, match="round=-1 must be at least 1"):
        export(-1)


def test_a_run_without_a_round_has_nothing_to_export(coordinator):
    run = coordinator.submit().id
    with coordinator.client() as client, pytest.raises(NotFoundError, match=f"Run '{run}' has committed no round yet"):
        list(client.stream("ExportModel", pb.ExportModelRequest(run=run)))


@pytest.mark.slow
def test_the_process_that_exports_tells_what_is_wrong_with_a_run(coordinator, run):
    """The real process, with torch: its run's folder has no checkpoint."""
    with coordinator.client() as client, pytest.raises((NotFoundError, ConfigError)) as caught:
        list(client.stream("ExportModel", pb.ExportModelRequest(run=run)))
    assert "checkpoint" in str(caught.value)


def test_what_a_hostile_server_says_does_not_steer_the_terminal():
    class Hostile(grpc.GenericRpcHandler):
        def service(self, _details):
            def refuse(_request, context):
                context.abort(grpc.StatusCode.PERMISSION_DENIED, "no\x1b]0;owned\x07 \x9b2J")

            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.server(ThreadPoolExecutor(1), [Hostile()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(Target(f"127.0.0.1:{port}", None, None)) as client, pytest.raises(MoonflowerError) as caught:
            client.call("ListRuns", pb.ListRunsRequest())
    finally:
        server.stop(0).wait()
    assert str(caught.value).isprintable()
    assert "no\N{REPLACEMENT CHARACTER}]0;owned" in str(caught.value)
