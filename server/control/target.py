"""Which coordinator a command talks to, and as whom: options, the environment, or a profile.

# servers.toml, in Moonflower's home or where MOONFLOWER_SERVERS says; paths are relative to the file
default = "north"
[servers.north]
address = "coordinator.example.org:9444"
ca = "ca.pem"
token_file = "token"
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from shared.errors import ConfigError
from shared.paths import home
from shared.run_config import NAME_PATTERN, Section, parse, read_toml

FILE = "servers.toml"
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
HOW = "give --server HOST:PORT, or set MOONFLOWER_SERVER, or take the servers.toml of your kit into {home}"


class Profile(Section):
    """A coordinator as servers.toml has it."""

    address: str
    ca: Annotated[Path, Field(strict=False)] | None = None
    token_file: Annotated[Path, Field(strict=False)] | None = None


class Servers(Section):
    """A whole servers.toml."""

    default: str | None = None
    servers: dict[Annotated[str, Field(pattern=NAME_PATTERN)], Profile] = {}  # noqa: RUF012 - frozen


@dataclass(frozen=True)
class Target:
    """A coordinator, and what proves who it is and who calls."""

    address: str  # HOST:PORT
    ca: bytes | None  # PEM; None: plaintext
    token: str | None = field(repr=False)
    source: str = ""  # where the authority's certificate came from, for messages

    @property
    def host(self) -> str:
        """The host alone."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port alone."""
        return int(self.address.rpartition(":")[2])


def find(server: str | None, ca: Path | None, token_file: Path | None, *, insecure: bool) -> Target:
    """Take what an option gives, else the environment, else the profile.

    Raises
    ------
    ConfigError
        Where it is not said which server, or its authority or the token is missing.
    """
    server = server or os.environ.get("MOONFLOWER_SERVER")
    profile = Profile(address=server) if server and ":" in server else _profile(server)
    host, _, port = profile.address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"server={profile.address!r} must be HOST:PORT, as in coordinator.example.org:9444.")
    if insecure:
        if host.strip("[]") not in LOOPBACK:
            raise ConfigError(f"--insecure is plaintext and only for this machine; {profile.address} is another one.")
        return Target(profile.address, None, None)
    named = os.environ.get("MOONFLOWER_CA")
    authority = ca or (Path(named) if named else profile.ca)
    if authority is None:
        raise ConfigError(
            f"{profile.address}: its authority is not known; give --ca ca.pem of your kit, or set MOONFLOWER_CA."
        )
    return Target(
        profile.address, _read(authority, "the authority's certificate"), _token(token_file, profile), str(authority)
    )


def _token(file: Path | None, profile: Profile) -> str:
    given = os.environ.get("MOONFLOWER_TOKEN") if file is None else None
    if given is None:
        place = file or profile.token_file
        if place is None:
            raise ConfigError(f"{profile.address}: no token; give --token-file, or set MOONFLOWER_TOKEN.")
        given = _read(place, "the token").decode(errors="replace")
    token = given.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError("the token must be one word of ASCII, as in the token file of your kit.")
    return token


def _profile(name: str | None) -> Profile:
    file = Path(os.environ.get("MOONFLOWER_SERVERS") or home() / FILE)
    if not file.exists():
        which = f"server={name!r} is no HOST:PORT and there is no {file}" if name else "no server is named"
        raise ConfigError(f"{which}; {HOW.format(home=home())}.")
    known = parse(Servers, read_toml(file), source=str(file))
    chosen = name or known.default or (next(iter(known.servers)) if len(known.servers) == 1 else None)
    if chosen is None or chosen not in known.servers:
        which = f"server={chosen!r} is not in {file}" if chosen else f"{file} names no default"
        raise ConfigError(f"{which}; it has {', '.join(sorted(known.servers)) or 'no servers'}.")
    profile = known.servers[chosen]
    place = file.absolute().parent
    return Profile(
        address=profile.address,
        ca=place / profile.ca if profile.ca else None,
        token_file=place / profile.token_file if profile.token_file else None,
    )


def _read(path: Path, what: str) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} cannot be read: {path}: {error.strerror}.") from None
