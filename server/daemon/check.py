"""The preflight of `moonflower server check`: each thing that a coordinator needs, and what to do where it is not so.

Nothing is made and nothing changed. A check looks at what can be seen from this machine: whether a firewall lets the
sites through is for a site's own `moonflower client check`.
"""

import ctypes
import errno
import os
import re
import resource
import shutil
import socket
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from server.control import tokens
from server.daemon.certificate import inspect
from server.daemon.settings import Settings
from server.provision import enrolment
from shared.errors import MoonflowerError
from shared.locks import holder

LEAST_FREE = 2 * 2**30  # bytes: checkpoints, the link's state and the database's file
FILES, FILES_A_SITE = 512, 4  # open at once: the daemon's own, and a site's connections in and on
CLOCK_SECONDS = 5  # by which a site's clock may be ahead: Flower's limit for signed requests
KNOWN_PAST = datetime(2026, 1, 1, tzinfo=UTC)  # a clock before it was never set
PINNED = re.compile(r"(.+)=([0-9a-f]{64})")
UNSYNCHRONISED = 5  # what adjtimex(2) returns then


@dataclass(frozen=True)
class Finding:
    """What was looked at, whether it is right, and what it is, or what to do."""

    name: str
    ok: bool
    text: str


class _Wrong(MoonflowerError):
    """What a check found wrong, and what to do."""


def check(settings: Settings, models: Sequence[str] = (), *, insecure: bool = False) -> list[Finding]:
    """Look at everything that the daemon needs.

    Parameters
    ----------
    settings
        The daemon's.
    models
        Names of base models, beside those of the queued runs; NAME=SHA256 also checks the weights' digest.
    insecure
        Whether the daemon is to run in plaintext, without certificates, keys and tokens.
    """
    secrets: list[tuple[str, Callable[[], str]]] = [
        ("certificate", lambda: inspect(settings)),
        ("enrolment", lambda: _enrolment(settings)),
        ("tokens", lambda: _tokens(settings)),
    ]
    looks: list[tuple[str, Callable[[], str]]] = [
        *([] if insecure else secrets),
        ("gateway's port", lambda: _port(settings, "gateway", settings.gateway.host, settings.gateway.port)),
        ("control's port", lambda: _port(settings, "control", settings.control.host, settings.control.port)),
        ("Flower", _flower),
        ("disk", lambda: _disk(settings)),
        ("clock", _clock),
        ("open files", lambda: _files(settings)),
        ("database", lambda: _database(settings)),
    ]
    findings = [_look(name, look) for name, look in looks]
    queued = _queued(settings) if findings[-1].ok else []
    for name, digest in dict.fromkeys([*queued, *map(_named, models)]):
        findings.append(_look("model", partial(_model, name, digest)))
    return findings


def render(findings: Sequence[Finding]) -> str:
    """Give a line a finding."""
    width = max(len(finding.name) for finding in findings)
    return "\n".join(f"{'ok   ' if each.ok else 'wrong'}  {each.name:<{width}}  {each.text}" for each in findings)


def _look(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, look())
    except MoonflowerError as error:
        return Finding(name, False, str(error))


def _own(name: str, path: Path) -> None:
    """Refuse a file that decides who comes in, and that others may write."""
    if path.exists() and (mode := path.stat().st_mode & 0o777) & 0o022:
        raise _Wrong(f"{name}={str(path)!r} has mode {mode:04o}: whoever may write it may come in; chmod 600 it.")


def _enrolment(settings: Settings) -> str:
    _own("enrolment", settings.enrolment)
    live = sorted(enrolment.read(settings.enrolment).live().values())
    return f"{len(live)} sites{': ' + ', '.join(live) if live else ', to be enrolled with `moonflower site enrol`'}"


def _tokens(settings: Settings) -> str:
    _own("tokens", settings.tokens)
    now = datetime.now(UTC)
    live = [token for token in tokens.read(settings.tokens).tokens if not token.revoked and now < token.expires_at]
    if not any(token.allows("admin") for token in live):
        raise _Wrong(
            f"no admin's token of {settings.tokens} is valid; make one with `moonflower provision renew --user`."
        )
    return ", ".join(f"{token.name} ({token.role}) until {token.expires_at:%Y-%m-%d}" for token in live)


def _port(settings: Settings, section: str, host: str, port: int) -> str:
    if not port:
        return f"{host}: any free port"
    try:
        where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror:
        raise _Wrong(f"{section}.host={host!r} is no address of this machine and no name of one; correct it.") from None
    family, kind, protocol, _, address = where[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not held up by connections that have ended
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and (daemon := holder(settings.lock)):
                return f"{host}:{port} is in use, and a daemon runs (process {daemon})"
            what = {
                errno.EADDRINUSE: f"port={port} is in use by another program; stop it (`ss -ltnp`) or choose another port.",
                errno.EACCES: f"port={port} needs root; choose one above 1023.",
                errno.EADDRNOTAVAIL: f"host={host!r} is not an address of this machine; use one that it has, or 0.0.0.0.",
            }.get(error.errno or 0, f"port={port} on {host}: {error.strerror}.")
            raise _Wrong(f"{section}.{what}") from None
    return f"{host}:{port} is free"


def _flower() -> str:
    programs = Path(sysconfig.get_path("scripts"))
    missing = [name for name in ("flower-superlink", "flwr-serverapp") if not os.access(programs / name, os.X_OK)]
    if missing:
        raise _Wrong(f"{missing[0]} is not in {programs}; install Moonflower again, with its requirements.")
    from importlib.metadata import version

    return f"flwr {version('flwr')} in {programs}"


def _disk(settings: Settings) -> str:
    there = next(folder for folder in (settings.state, *settings.state.parents) if folder.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise _Wrong(
            f"state={str(settings.state)!r}: this user may not write to {there}; make the folder, and give it to him."
        )
    free = shutil.disk_usage(there).free
    if free < LEAST_FREE:
        raise _Wrong(
            f"state={str(settings.state)!r} has {free / 2**30:.1f} GiB free, below the least of {LEAST_FREE / 2**30:.0f}; make room."
        )
    return f"{free / 2**30:.0f} GiB free for {settings.state}"


def _clock() -> str:
    now = datetime.now(UTC)
    if now < KNOWN_PAST:
        raise _Wrong(f"the clock says {now:%Y-%m-%d}; set it, and keep it with chrony or systemd-timesyncd.")
    kept = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(1024))  # reads only: modes is 0
    if kept == UNSYNCHRONISED:
        said = (
            f"kept by nothing that the kernel knows of: run chrony, sites that are {CLOCK_SECONDS} s ahead are refused"
        )
    else:
        said = "synchronised" if kept >= 0 else "and whether anything keeps it cannot be told"
    return f"{now:%Y-%m-%d %H:%M:%S} UTC, {said}"


def _files(settings: Settings) -> str:
    try:
        sites = len(enrolment.read(settings.enrolment).live())
    except MoonflowerError:
        sites = 0
    needed = FILES + FILES_A_SITE * sites
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        raise _Wrong(
            f"at most {soft} open files, below the {needed} that {sites} sites need; set LimitNOFILE= in the unit, or `ulimit -n`"
            f"{'' if soft < hard else ' as root'}."
        )
    return f"at most {soft}, {needed} needed"


def _database(settings: Settings) -> str:
    from server.history import schema

    status = schema.status(settings.history)
    remedies = {
        "foreign": "holds another program's tables; give Moonflower a database of its own.",
        "older": f"has schema {status.revision}, this is {status.newest}: back it up, then `moonflower database upgrade`.",
        "newer": f"has schema {status.revision}, newer than {status.newest}; install a newer Moonflower.",
    }
    if status.state in remedies:
        raise _Wrong(f"{status.place} {remedies[status.state]}")
    return f"{status.place}, {'to be made' if status.state == 'empty' else f'schema {status.revision}'}"


def _queued(settings: Settings) -> list[tuple[str, str | None]]:
    """Give the models of the runs that wait or play, each with the digest that its run pins."""
    from server.history import schema
    from server.history.store import History

    if schema.status(settings.history).state != "newest":
        return []
    with History.open(settings.history, create=False) as history:
        models = [run.config["model"] for run in history.queue()]
    return [(model["name"], model.get("digest")) for model in models]


def _named(text: str) -> tuple[str, str | None]:
    pinned = PINNED.fullmatch(text)
    return (pinned[1], pinned[2]) if pinned else (text, None)


def _model(name: str, digest: str | None) -> str:
    from shared.models import locate, weights_digest
    from shared.run_config import Model

    folder = Path(locate(Model(name=name, digest=digest)))
    if not folder.is_dir():
        return f"{name}, to be fetched from the hub; pin model.digest to have it checked"
    return f"{name}, weights {digest or weights_digest(folder)}"
