"""A scenario: a run's configuration and the virtual sites that take part, in one TOML file."""

import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, Field, model_validator

from client.privacy.policy import Policy
from client.site import Name
from shared.errors import ConfigError
from shared.records import Layout
from shared.run_config import RunConfig, Section, parse, read_toml
from simulations.dynamics import Dynamics
from simulations.partition import Partition

DEFAULT = "vader"


class Data(Section):
    """Where the virtual sites' records come from.

    `vader` is the built-in data set. `folder` holds one SITE.jsonl (or .csv, .parquet, .arrow, or a folder SITE, of images
    say) a site, and an optional public `test` in any of these forms. Each record has the task's columns and an id; `columns`
    and `label_names` say where they are called otherwise, as in a site.toml. With a `[partition]` it holds one `pool` instead, of which
    all sites are made; the built-in data are a pool too. `unit_column` names the column that says whose a record is: the unit of privacy
    is then the person, as in a site.toml.
    """

    source: Literal["vader", "folder"] = "vader"
    folder: Path | None = Field(None, strict=False)
    split_seed: int = 0  # which of a site's records are validation
    validation: float = Field(0.1, ge=0.01, le=0.5)
    unit_column: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    label_names: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _folder_is_named(self) -> Self:
        if (self.source == "folder") != (self.folder is not None):
            raise ValueError(
                "data.folder is needed with source='folder', and only then; --set data.folder=DIR gives it"
            )
        if self.unit_column is not None and self.source != "folder":
            raise ValueError(
                f"data.unit_column={self.unit_column!r} needs source='folder': the built-in data names no persons"
            )
        if (self.columns or self.label_names) and self.source != "folder":
            raise ValueError("data.columns and data.label_names need source='folder': the built-in data has its own")
        return self

    def layout(self) -> Layout:
        """How the files are to be read."""
        return Layout(self.columns, self.label_names, self.unit_column)


class VirtualSite(Section):
    """A site of the simulation: its name and the rounded size that it declares, in persons where they are the unit."""

    name: Name
    records: int | None = Field(None, ge=10)
    persons: int | None = Field(None, ge=10)

    @property
    def units(self) -> int:
        """The declared size."""
        return self.records or self.persons or 0


class Scenario(RunConfig):
    """A run and its sites: each by its own name and file, or many of one pool, by a partition."""

    data: Data = Data()
    policy: Policy = Policy(max_epsilon=20.0)
    sites: tuple[VirtualSite, ...] = Field((), strict=False)
    partition: Partition | None = None
    dynamics: Dynamics | None = None

    @model_validator(mode="after")
    def _sites_come_from_one_place(self) -> Self:
        if bool(self.sites) == (self.partition is not None):
            raise ValueError(
                "sites are given one by one, as [[sites]], or made of a pool, by [partition]; "
                + (
                    "give one of the two"
                    if self.partition is None
                    else "--set sites= or --set partition= takes one out"
                )
            )
        return self

    @model_validator(mode="after")
    def _sites_differ(self) -> Self:
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError(f"sites={names} names a site twice")
        size, other = ("records", "persons") if self.data.unit_column is None else ("persons", "records")
        for site in self.sites:
            if getattr(site, size) is None or getattr(site, other) is not None:
                raise ValueError(
                    f"sites: {site.name!r} declares its size as {size}=N, because data.unit_column={self.data.unit_column!r}"
                )
        number = len(names) if self.partition is None else self.partition.sites
        for name in ("min_sites", "buffer_size"):
            least = getattr(self.federation, name) or 0
            if number is not None and least > number:
                raise ValueError(f"federation.{name}={least} is above the {number} sites")
        return self

    def run_config(self) -> RunConfig:
        """The part that travels."""
        return RunConfig.model_validate({name: getattr(self, name) for name in RunConfig.model_fields})


def load(name: str, overrides: dict[str, Any]) -> Scenario:
    """Read a built-in scenario by name, or a TOML file, with dotted `overrides` on top.

    Raises
    ------
    ConfigError
        One line that names the file and each setting at fault.
    """
    path = Path(name)
    if not name.endswith(".toml"):
        built_in = files("simulations") / "scenarios" / f"{name}.toml"
        if not built_in.is_file():
            known = sorted(item.name.removesuffix(".toml") for item in (files("simulations") / "scenarios").iterdir())
            raise ConfigError(
                f"scenario {name!r} is not built in ({', '.join(known)}); name one of these or a .toml file."
            )
        path = Path(str(built_in))
    values = read_toml(path)
    for key, value in overrides.items():
        _put(values, key, value)
    scenario = parse(Scenario, values, source=path.name)
    if scenario.data.folder is not None:
        root = Path() if "data.folder" in overrides else path.parent  # as whoever wrote it sees it
        scenario = scenario.model_copy(
            update={"data": scenario.data.model_copy(update={"folder": root / scenario.data.folder})}
        )
    return scenario


def override(text: str) -> tuple[str, Any]:
    """Read `--set KEY=VALUE`; the value is TOML, or else the text itself. No value takes the setting out.

    A key may leave out the sections that it lies in, where no other setting is called so.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r} is not KEY=VALUE, as in --set training.learning_rate=1e-3.")
    try:
        read = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        read = {}
    return full_key(key.strip()), read["value"] if len(read) == 1 else value


def full_key(key: str) -> str:
    """Give the setting that a key is the end of: `lora.rank` is `model.lora.rank`. Of a key that ends none, the key itself.

    Raises
    ------
    ConfigError
        Where several settings end so.
    """
    if key.partition(".")[0] in Scenario.model_fields:
        return key
    found = sorted(name for name in _settings(Scenario) if name.endswith(f".{key}"))
    if len(found) > 1:
        raise ConfigError(f"{key} may be {' or '.join(found)}; name it in full.")
    return found[0] if found else key


def _settings(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Name every setting of a section, and of the sections in it."""
    for name, described in kind.model_fields.items():
        yield prefix + name
        held = described.annotation
        for inner in get_args(held) if isinstance(held, UnionType) else (held,):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _settings(inner, f"{prefix}{name}.")


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    at = values
    for section in sections:
        at = at.setdefault(section, {})
        if not isinstance(at, dict):
            raise ConfigError(f"--set {key}: {section!r} is a value and not a section.")
    if value == "":
        at.pop(last, None)
    else:
        at[last] = value
