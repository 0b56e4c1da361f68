"""The coordinator's own configuration, server.toml: where it listens, where its state is, and who it is."""

import ipaddress
import os
import socket
from pathlib import Path
from typing import Annotated

from pydantic import Field

from server.gateway.limits import Limits
from shared.errors import ConfigError
from shared.run_config import NAME_PATTERN, Section, parse, read_toml

Place = Annotated[Path, Field(strict=False)]
Port = Annotated[int, Field(ge=0, le=65535)]  # 0: any free one, which the status file names
Count = Annotated[int, Field(ge=1)]


class Tls(Section):
    """The coordinator's certificate, by the federation's authority; gateway and control service show it."""

    ca: Place = Path("ca.pem")
    certificate: Place = Path("server.pem")
    key: Place = Path("server.key")


class Gateway(Limits):
    """The only door for sites: where it is, and what it lets through (`server.gateway.limits`)."""

    host: str = "0.0.0.0"  # noqa: S104 - sites come from elsewhere
    port: Port = 9443


class Control(Section):
    """The service for the federation's own people: submit, watch, stop and export runs."""

    host: str = "127.0.0.1"
    port: Port = 9444


class Queue(Section):
    """How many submitted runs play at once."""

    max_concurrent_runs: Count = 1


class Settings(Section):
    """A whole server.toml. Relative paths are relative to the file."""

    name: str = Field(pattern=NAME_PATTERN)  # public: federation.coordinator of all its runs
    state: Place = Path("state")
    database: str | None = None  # a history's URL; None: $MOONFLOWER_DATABASE, else history.db in the state folder
    device: str = "auto"  # where the public test set is scored
    enrolment: Place = Path("enrolment.json")
    tokens: Place = Path("tokens.json")
    tls: Tls = Tls()
    gateway: Gateway = Gateway()
    control: Control = Control()
    queue: Queue = Queue()

    @property
    def lock(self) -> Path:
        """The file that a running daemon holds (shared/locks.py)."""
        return self.state / "daemon.lock"

    @property
    def runs(self) -> Path:
        """The folder of the runs' folders."""
        return self.state / "runs"

    @property
    def history(self) -> str:
        """The URL of the history."""
        return self.database or os.environ.get("MOONFLOWER_DATABASE") or f"sqlite:///{self.state / 'history.db'}"

    def run(self, run: str) -> Path:
        """Return a run's folder."""
        return self.runs / run


def load(path: Path, *, insecure: bool = False) -> Settings:
    """Read and validate a server.toml; all paths come back absolute.

    Parameters
    ----------
    path : Path
        The file.
    insecure : bool
        Plaintext and no node authentication, for trying things out on one machine.

    Raises
    ------
    ConfigError
        Naming the file and the setting; and where `insecure` meets a host that is not loopback.
    """
    settings = parse(Settings, read_toml(path), source=str(path))
    root = path.absolute().parent
    places = {name: root / getattr(settings, name) for name in ("state", "enrolment", "tokens")}
    tls = Tls(ca=root / settings.tls.ca, certificate=root / settings.tls.certificate, key=root / settings.tls.key)
    settings = settings.model_copy(update={**places, "tls": tls})
    for section, host in (("gateway", settings.gateway.host), ("control", settings.control.host)):
        if insecure and not is_loopback(host):
            raise ConfigError(
                f"{path}: {section}.host={host!r} is not loopback; --insecure is plaintext without node authentication, "
                f"so set {section}.host to 127.0.0.1 or start without --insecure."
            )
    return settings


def is_loopback(host: str) -> bool:
    """Whether a host is this machine and nothing else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" and all(ipaddress.ip_address(address).is_loopback for address in _addresses(host))


def _addresses(host: str) -> list[str]:
    """Return what a name stands for here: /etc/hosts may say anything, of localhost too."""
    try:
        return [str(where[0]) for *_, where in socket.getaddrinfo(host, None)]
    except OSError:
        return []  # then nothing can listen there
