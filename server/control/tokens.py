"""Who may call the coordinator: API tokens, of which the server keeps only digests.

A token is 32 random bytes from the operating system. Nobody can try so many, so one SHA-256 without salt or
stretching is enough, unlike for a password that a person chose. What the file holds is no secret in itself, but
whoever can write it can let himself in.
"""

import hashlib
import hmac
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, ValidationError

from shared.errors import ConfigError, MoonflowerError
from shared.run_config import NAME_PATTERN, Section, explain

Role = Literal["admin", "viewer"]
PREFIX = "moonflower_"  # by which scanners and people know a token that leaked
SECRET_BYTES = 32
UNKNOWN = "unknown token: it is not one of this server's; ask whoever runs it for a new one."


class TokenError(MoonflowerError):
    """A caller's token is unknown, expired or revoked. The message is for the caller."""


class Token(Section):
    """A token as the server knows it. An admin may do everything, a viewer only look."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]  # of the user
    role: Role
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")  # of the secret text
    expires_at: AwareDatetime
    revoked: bool = False

    def allows(self, role: Role) -> bool:
        """Whether its holder may do what `role` is needed for."""
        return self.role == "admin" or role == "viewer"


class TokenFile(Section):
    """A tokens.json, whole. Tokens that were revoked stay in it, so that a caller is told so."""

    tokens: tuple[Token, ...] = ()

    def content(self) -> bytes:
        """Give the file's bytes."""
        return self.model_dump_json(indent=2).encode() + b"\n"


def new(name: str, role: Role, days: int, now: datetime | None = None) -> tuple[Token, str]:
    """Make a token that holds for `days` from now; give what the server keeps, and the secret text for its user."""
    secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    expires_at = (now or datetime.now(UTC)).replace(microsecond=0) + timedelta(days=days)
    return Token(name=name, role=role, sha256=_digest(secret), expires_at=expires_at), secret


def read(path: Path) -> TokenFile:
    """Read a tokens.json.

    Raises
    ------
    ConfigError
        Where it cannot be read, or is not one.
    """
    try:
        return TokenFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"tokens={str(path)!r} cannot be read: {error.strerror}; `moonflower provision` makes it."
        ) from None
    except ValidationError as error:
        raise ConfigError(explain(error, str(path))) from None


class Tokens:
    """The tokens of a file, read again whenever the file has changed: a revocation holds from the next call.

    Threads may share one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = self._fresh()

    @classmethod
    def load(cls, path: Path) -> "Tokens":
        """Read a tokens.json.

        Raises
        ------
        ConfigError
            Where it cannot be read, or is not one.
        """
        return cls(path)

    def authenticate(self, secret: str, now: datetime) -> Token:
        """Give the token that a secret text belongs to.

        Raises
        ------
        TokenError
            Where it is unknown, revoked or expired.
        ConfigError
            Where the file has changed and is not a tokens.json any more: then nobody is let in.
        """
        if self._read[0] != _mark(self._path):
            self._read = self._fresh()
        digest = _digest(secret)
        found = None
        for token in self._read[1]:  # all of them, each in constant time: how long it takes tells nothing
            if hmac.compare_digest(token.sha256, digest):
                found = token
        if found is None:
            raise TokenError(UNKNOWN)
        if found.revoked:
            raise TokenError(
                f"the token of {found.name!r} has been revoked; ask whoever runs this server for a new one."
            )
        if now >= found.expires_at:
            raise TokenError(
                f"the token of {found.name!r} expired at {found.expires_at:%Y-%m-%d %H:%M} UTC; "
                "ask whoever runs this server for a new one."
            )
        return found

    def _fresh(self) -> tuple[tuple[int, int, int] | None, tuple[Token, ...]]:
        mark = _mark(self._path)  # before reading: a change in between is read again
        return mark, read(self._path).tokens


def _mark(path: Path) -> tuple[int, int, int] | None:
    """What differs when a file was written again or replaced; None where it is gone."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()
