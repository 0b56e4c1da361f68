"""The preflight: what is right says ok, and each fault says what to do, and nothing else complains."""

import ctypes
import os
import resource
import shutil
import socket
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from server.daemon import certificate as certificates
from server.daemon import check as module
from server.daemon import settings as server_settings
from server.daemon.check import Finding, check, render
from server.daemon.settings import Settings, is_loopback
from server.history.store import History
from server.provision import provisioning
from shared import locks
from shared.certificates import Pair, authority, issue
from shared.models import weights_digest

FEDERATION = """
name = "north"
[coordinator]
hosts = ["coordinator.example.org"]
gateway_port = {gateway}
control_port = {control}
[[sites]]
name = "county"
dataset = {{ id = "county-2026", path = "county.jsonl", records = 2000, labels = ["routine", "urgent"] }}
privacy = {{ max_epsilon = 4 }}
[[users]]
name = "ada"
role = "admin"
"""
EVERYTHING = [
    *("certificate", "enrolment", "tokens", "gateway's port", "control's port"),
    *("Flower", "disk", "clock", "open files", "database"),
]


class Place(NamedTuple):
    """A coordinator's kit, the settings in it, and who signs for it."""

    folder: Path
    settings: Settings
    ca: Pair


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.delenv("MOONFLOWER_DATABASE", raising=False)
    monkeypatch.setattr(module, "LEAST_FREE", 1)
    text = FEDERATION.format(gateway=free_port(), control=free_port())
    (tmp_path / "federation.toml").write_text(text)
    provisioning.make(tmp_path / "federation.toml", tmp_path / "kits")
    folder = tmp_path / "kits/coordinator"
    ca = Pair(*((tmp_path / "kits/authority" / name).read_bytes() for name in ("ca.pem", "ca.key")))
    return Place(folder, server_settings.load(folder / "server.toml"), ca)


def wrong(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.text for finding in findings if not finding.ok}


def put(place: Place, pair: Pair) -> None:
    (place.folder / "server.pem").write_bytes(pair.certificate)
    (place.folder / "server.key").write_bytes(pair.key)


def with_section(settings: Settings, section: str, **values: Any) -> Settings:
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})


def test_a_fresh_kit_is_ok_in_everything_and_nothing_is_made(place: Place) -> None:
    before = sorted(place.folder.rglob("*"))
    findings = check(place.settings)
    assert [finding.name for finding in findings] == EVERYTHING
    assert wrong(findings) == {}
    said = render(findings)
    assert "for coordinator.example.org, localhost" in said
    assert "ada (admin) until 20" in said
    assert "1 sites: county" in said
    assert all(line.startswith("ok ") for line in said.splitlines())
    assert sorted(place.folder.rglob("*")) == before


def test_every_line_says_what_is_wrong(place: Place) -> None:
    (place.folder / "tokens.json").unlink()
    findings = check(place.settings)
    assert list(wrong(findings)) == ["tokens"]
    lines = render(findings).splitlines()
    assert len(lines) == len(EVERYTHING)
    assert [line.split()[1] for line in lines if line.startswith("wrong")] == ["tokens"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda p: (p.folder / "ca.pem").unlink(), "tls.ca="),
        (lambda p: (p.folder / "server.key").unlink(), "cannot be read: No such file"),
        (lambda p: (p.folder / "server.key").chmod(0o640), "has mode 0640, so that others may read it: chmod 600"),
        (lambda p: (p.folder / "server.key").write_bytes(issue(p.ca, "n", ["a.org"], 1).key), "is not the key of"),
        (lambda p: (p.folder / "server.key").write_bytes(b"no key"), "cannot be used"),
        (lambda p: (p.folder / "server.pem").write_bytes(b"no certificate"), "is no server's certificate"),
        (lambda p: (p.folder / "server.pem").write_bytes(p.ca.certificate), "is no server's certificate"),
        (lambda p: (p.folder / "ca.pem").write_bytes(b"nothing"), "tls.ca="),
        (
            lambda p: (p.folder / "ca.pem").write_bytes(authority("north", 9).certificate),
            "is refused for coordinator.ex",
        ),
        (lambda p: put(p, issue(p.ca, "north", ["coordinator.example.org"], 0)), "ended on 20"),
        (lambda p: put(p, issue(p.ca, "north", ["coordinator.example.org"], 13)), "ends on 20"),
        (lambda p: put(p, issue(p.ca, "north", ["localhost", "127.0.0.1"], 99)), "names this machine's loopback alone"),
    ],
)
def test_a_certificate_that_others_would_refuse_is_found(
    place: Place, fault: Callable[[Place], object], said: str
) -> None:
    fault(place)
    found = wrong(check(place.settings))
    assert list(found) == ["certificate"]
    assert said in found["certificate"]
    assert "\n" not in found["certificate"]
    assert wrong(check(place.settings, insecure=True)) == {}


def test_without_security_nothing_secret_is_needed(place: Place) -> None:
    for name in ("ca.pem", "server.pem", "server.key", "enrolment.json", "tokens.json"):
        (place.folder / name).unlink()
    findings = check(place.settings, insecure=True)
    assert [finding.name for finding in findings] == EVERYTHING[3:]
    assert wrong(findings) == {}


def test_a_certificate_that_holds_long_enough_is_fine(place: Place) -> None:
    put(place, issue(place.ca, "north", ["coordinator.example.org"], certificates.RENEW.days + 1))
    assert wrong(check(place.settings)) == {}


def test_a_port_in_use_is_found_unless_our_own_daemon_has_it(place: Place) -> None:
    place.settings.state.mkdir()
    with socket.socket() as other:
        other.bind(("0.0.0.0", place.settings.gateway.port))  # noqa: S104
        other.listen()
        found = wrong(check(place.settings))
        assert list(found) == ["gateway's port"]
        assert f"gateway.port={place.settings.gateway.port} is in use by another program" in found["gateway's port"]
        with locks.hold(place.settings.lock, "the state"):
            findings = check(place.settings)
        assert wrong(findings) == {}
        assert f"a daemon runs (process {os.getpid()})" in render(findings)


@pytest.mark.parametrize(
    ("host", "said"),
    [("192.0.2.1", "is not an address of this machine"), ("no such host", "is no address of this machine")],
)
def test_a_host_that_is_not_ours_is_found(place: Place, host: str, said: str) -> None:
    found = wrong(check(with_section(place.settings, "control", host=host)))
    assert list(found) == ["control's port"]
    assert said in found["control's port"]


def test_any_free_port_is_fine(place: Place) -> None:
    assert wrong(check(with_section(place.settings, "gateway", port=0))) == {}


def test_without_a_valid_token_of_an_admin_nobody_could_submit(place: Place) -> None:
    provisioning.revoke_user(place.folder.parent, "ada")
    found = wrong(check(place.settings))
    assert list(found) == ["tokens"]
    assert "provision renew --user" in found["tokens"]


def test_an_enrolment_that_broke_is_found(place: Place) -> None:
    (place.folder / "enrolment.json").write_text("{")
    assert list(wrong(check(place.settings))) == ["enrolment"]


def test_a_full_disk_is_found(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_FREE", shutil.disk_usage(place.folder).total + 1)
    found = wrong(check(place.settings))
    assert list(found) == ["disk"]
    assert "GiB free, below the least of" in found["disk"]


def test_a_state_folder_that_cannot_be_written_is_found(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access  # root may write anywhere: ask on behalf of another
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0 and access(path, mode))
    found = wrong(check(place.settings))
    assert list(found) == ["disk"]
    assert "may not write to" in found["disk"]


def test_too_few_open_files_are_found(place: Place) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (515, hard))
    try:
        found = wrong(check(place.settings))
        resource.setrlimit(resource.RLIMIT_NOFILE, (516, hard))
        assert wrong(check(place.settings)) == {}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert list(found) == ["open files"]
    assert "at most 515 open files, below the 516 that 1 sites need; set LimitNOFILE=" in found["open files"]


@pytest.mark.parametrize(("answer", "said"), [(0, "UTC, synchronised"), (5, "run chrony"), (-1, "cannot be told")])
def test_the_clock_says_whether_anything_keeps_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, answer: int, said: str
) -> None:
    class Library:
        def adjtimex(self, _: object) -> int:
            return answer

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    findings = check(place.settings)
    assert wrong(findings) == {}
    assert said in render(findings)


def test_flower_that_is_not_installed_is_found(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sysconfig, "get_path", lambda _: str(tmp_path))
    found = wrong(check(place.settings))
    assert list(found) == ["Flower"]
    assert "flower-superlink is not in" in found["Flower"]


def test_another_programs_database_is_found(place: Place) -> None:
    place.settings.state.mkdir()
    with sqlite3.connect(place.settings.state / "history.db") as connection:
        connection.execute("CREATE TABLE orders (id INTEGER)")
    connection.close()
    found = wrong(check(place.settings))
    assert list(found) == ["database"]
    assert "holds another program's tables" in found["database"]


def test_a_database_that_does_not_answer_is_found_without_its_password(place: Place) -> None:
    url = f"postgresql://me:hidden-word@127.0.0.1:{free_port()}/history"
    found = wrong(check(place.settings.model_copy(update={"database": url})))
    assert list(found) == ["database"]
    assert "does not answer" in found["database"]
    assert "hidden-word" not in found["database"]


def test_an_older_schema_is_found_with_its_remedy(place: Place) -> None:
    place.settings.state.mkdir()
    shutil.copy(Path(__file__).parents[2] / "assets/history-0002.db", place.settings.state / "history.db")
    found = wrong(check(place.settings))
    assert list(found) == ["database"]
    assert "has schema 0002" in found["database"]
    assert "moonflower database upgrade" in found["database"]


@pytest.fixture
def queued(place: Place, tiny_model: Path) -> Iterator[Callable[[str | None], None]]:
    """Give a function that enters a run which waits for the tiny model, under a digest."""
    place.settings.state.mkdir()
    with History.open(place.settings.history) as history:

        def enter(digest: str | None) -> None:
            model = {"name": str(tiny_model), "digest": digest}
            values: dict[str, Any] = {"config_digest": "c", "rounds_planned": 1, "private": True, "version": "0.1.0"}
            history.create_run("run-1", name="Run", config={"model": model}, origin="daemon", **values)

        yield enter


def test_the_model_of_a_run_that_waits_is_looked_at(
    place: Place, tiny_model: Path, queued: Callable[[str | None], None]
) -> None:
    queued(weights_digest(tiny_model))
    findings = check(place.settings)
    assert wrong(findings) == {}
    assert [finding.name for finding in findings] == [*EVERYTHING, "model"]
    assert weights_digest(tiny_model) in findings[-1].text


def test_a_model_of_another_digest_is_found(
    place: Place, tiny_model: Path, queued: Callable[[str | None], None]
) -> None:
    queued("0" * 64)
    found = wrong(check(place.settings))
    assert list(found) == ["model"]
    assert "model.digest=000000000000" in found["model"]


def test_models_can_be_named(place: Place, tiny_model: Path) -> None:
    digest = weights_digest(tiny_model)
    findings = check(place.settings, [str(tiny_model), f"{tiny_model}={digest}", str(tiny_model)])
    assert wrong(findings) == {}
    assert len(findings) == len(EVERYTHING) + 2
    found = wrong(check(place.settings, [f"{tiny_model}={'1' * 64}", "/no/such/model"]))
    assert list(found) == ["model"]


@pytest.mark.parametrize("name", ["enrolment", "tokens"])
def test_a_file_that_lets_people_in_and_that_others_may_write_is_found(place: Place, name: str) -> None:
    file: Path = getattr(place.settings, name)
    file.chmod(0o660)
    (finding,) = (each for each in check(place.settings) if each.name == name)
    assert not finding.ok
    assert "has mode 0660: whoever may write it may come in; chmod 600 it." in finding.text


def test_localhost_is_loopback_only_where_this_machine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_loopback("localhost")
    where = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.0.1", "192.0.2.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: where)
    assert not is_loopback("localhost")
    for host in ("::", "0.0.0.0", "127.1", "", "::ffff:192.0.2.7"):  # noqa: S104
        assert not is_loopback(host)
