"""enrolment.json: which public key speaks for which site, and which keys never will again.

`moonflower provision` writes it, the coordinator's daemon takes it into its history. Both refuse a key that was
revoked: a site goes on with a new one, under its old name.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from shared.certificates import node_key_line
from shared.errors import ConfigError, NotFoundError
from shared.run_config import NAME_PATTERN, Section, explain


def _key(text: str) -> str:
    try:
        return node_key_line(text)
    except ConfigError as error:
        raise ValueError(str(error)) from None


class SiteKey(Section):
    """A site's public key as its OpenSSH line, without a comment."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]  # of the site
    public_key: Annotated[str, AfterValidator(_key)]
    revoked: bool = False


class Enrolment(Section):
    """All keys that any site ever had, oldest first: one live key a site at most, and no key twice."""

    sites: tuple[SiteKey, ...] = ()

    @model_validator(mode="after")
    def _keys_are_one_sites(self) -> Self:
        keys = Counter(site.public_key for site in self.sites)
        if any(count > 1 for count in keys.values()):
            names = sorted(site.name for site in self.sites if keys[site.public_key] > 1)
            raise ValueError(f"a public key is listed twice, for {' and '.join(names)}: each site has keys of its own")
        live = Counter(site.name for site in self.sites if not site.revoked)
        if several := sorted(name for name, count in live.items() if count > 1):
            raise ValueError(f"{several[0]!r} has {live[several[0]]} live keys; mark all but one as revoked")
        return self

    def live(self) -> dict[str, str]:
        """Give the name of the site that each live key speaks for."""
        return {site.public_key: site.name for site in self.sites if not site.revoked}

    def revoke(self, name: str) -> "Enrolment":
        """Revoke a site's live key, for good.

        Raises
        ------
        NotFoundError
            Where the site has none.
        """
        if name not in self.live().values():
            known = ", ".join(sorted(set(self.live().values()))) or "none"
            raise NotFoundError(f"no key of a site {name!r} is enrolled; enrolled are: {known}.")
        sites = tuple(site.model_copy(update={"revoked": True}) if site.name == name else site for site in self.sites)
        return Enrolment(sites=sites)

    def renew(self, name: str, public_key: str) -> "Enrolment":
        """Enrol a site's new key; one that it had before is revoked by that.

        Raises
        ------
        ConfigError
            Where the key was enrolled before, by whomever, live or revoked.
        """
        if any(site.public_key == node_key_line(public_key) for site in self.sites):
            raise ConfigError(
                f"this key of {name!r} was enrolled before; make a new one: a key that was revoked stays so."
            )
        before = self.revoke(name) if name in self.live().values() else self
        return Enrolment(sites=(*before.sites, SiteKey(name=name, public_key=public_key)))

    def content(self) -> bytes:
        """Give the file's bytes."""
        return self.model_dump_json(indent=2).encode() + b"\n"


def read(path: Path) -> Enrolment:
    """Read an enrolment.json.

    Raises
    ------
    ConfigError
        Where it cannot be read, or is not one.
    """
    try:
        return Enrolment.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"enrolment={str(path)!r} cannot be read: {error.strerror}; `moonflower provision` makes it."
        ) from None
    except ValidationError as error:
        raise ConfigError(explain(error, str(path))) from None
