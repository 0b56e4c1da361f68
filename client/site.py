"""A site's own configuration, site.toml: its data, what it declares of them, its device, its policy and its coordinator.

Nothing here is decided by the coordinator, and nothing but the *public* declarations leaves the site.
"""

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Self

import tomli_w
from pydantic import Field, PrivateAttr, model_validator

from client.privacy.ledger import Ledger
from client.privacy.policy import Policy
from shared.errors import ConfigError, DataError, RefusedError
from shared.plan import DatasetCard
from shared.records import Layout
from shared.run_config import NAME_PATTERN, PrivacyUnit, Section, parse, read_toml

Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class Dataset(Section):
    """Where the records are, and what the site declares of them.

    `id` names the data set for its whole life: its privacy budget is kept under it. `records` is the
    rounded size, public, from which rates and divisors follow; with `unit_column` it is `persons` instead. `labels` are all that a record can have: they
    are declared here because a coordinator that could try labels would learn which ones the file holds.
    `columns` maps what a task reads (`text`, `label`, and `id`) to columns of the file, where they are called otherwise, and
    `label_names` the file's labels to declared ones. `unit_column` is the column that says whose a record is: the unit of
    privacy is then the person, for the dataset's life, and `persons`, how many there are, stands in the place of `records`.
    `shares_no_records_with` names data sets with accounts in the same ledger, of which the site gives its word
    that no record of theirs is in this one: a record in two accounts would have two budgets.
    """

    id: Name
    path: Path = Field(strict=False)  # a file (.jsonl, .csv, .parquet, .arrow) or a folder
    task: Name = "text-classification"
    records: int | None = Field(None, ge=10)
    persons: int | None = Field(None, ge=10)
    validation: float = Field(0.1, ge=0.01, le=0.5)
    labels: tuple[str, ...] = Field((), strict=False)
    columns: dict[str, str] = Field(default_factory=dict)
    label_names: dict[str, str] = Field(default_factory=dict)
    unit_column: str | None = None
    shares_no_records_with: tuple[Name, ...] = Field((), strict=False)

    @model_validator(mode="before")
    @classmethod
    def _columns_are_a_table(cls, values: Any) -> Any:
        for role in ("id", "text", "label") if isinstance(values, dict) else ():
            if f"{role}_column" in values:
                raise ValueError(f"{role}_column is now written as columns.{role}, in the table [dataset.columns]")
        return values

    @model_validator(mode="after")
    def _its_size_is_in_units(self) -> Self:
        if self.unit_column is None and self.persons is not None:
            raise ValueError(
                f"dataset.persons={self.persons} counts persons, and no unit_column names them; declare the number of records"
            )
        if self.unit_column is not None and self.records is not None:
            raise ValueError(
                f"dataset.records={self.records} counts records, and unit_column={self.unit_column!r} makes the person the unit of "
                "privacy; declare how many persons there are, rounded, as dataset.persons"
            )
        if self.records is None and self.persons is None:
            raise ValueError(f"dataset.{'records' if self.unit_column is None else 'persons'} is missing")
        return self

    @property
    def unit(self) -> PrivacyUnit:
        """Who the promise is made to, for the dataset's life."""
        return "record" if self.unit_column is None else "person"

    @property
    def units(self) -> int:
        """The declared, rounded number of units."""
        return self.records or self.persons or 0

    def layout(self) -> Layout:
        """How its file is to be read."""
        return Layout(self.columns, self.label_names, self.unit_column)

    def card(self) -> DatasetCard:
        """What the site declares."""
        return DatasetCard(self.id, self.units, self.validation, self.unit)


class Coordinator(Section):
    """Where the node connects to, and with what. A site that has no node has no such section.

    `name` is the coordinator's own: the site answers runs that carry it and no others, because the certificate that
    `ca` signed is this coordinator's.
    """

    name: Name
    address: str = Field(pattern=r"^([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}$")  # HOST:PORT of its gateway
    ca: Path = Field(Path("ca.pem"), strict=False)  # the federation's authority
    key: Path = Field(Path("site.key"), strict=False)  # the site's, private, as OpenSSH wrote it
    state: Path = Field(Path("state"), strict=False)  # a folder of the node's own


class Site(Section):
    """A whole site.toml. Relative paths are relative to the file. What is in `cache` is as private as the records are."""

    name: Name  # public
    dataset: Dataset
    privacy: Policy
    ledger: Path = Field(Path("ledger.db"), strict=False)
    cache: Path = Field(Path("cache"), strict=False)  # encoded records, mapped into memory; the site's own folder
    # Made at first use; decides for ever which records are validation.
    split_key: Path = Field(Path("split.key"), strict=False)
    device: str = "auto"
    threads: int | None = Field(None, ge=1, le=1024)  # of the processor; None: as many as torch takes
    coordinator: Coordinator | None = None
    _file: Path | None = PrivateAttr(None)  # where it was read from
    _device: str | None = PrivateAttr(None)  # instead of the file's

    @model_validator(mode="before")
    @classmethod
    def _privacy_was_policy(cls, values: Any) -> Any:
        if isinstance(values, dict) and "policy" in values:
            raise ValueError("the section [policy] is now called [privacy]; rename it, its settings stay as they are")
        return values


def load(path: Path, device: str | None = None) -> Site:
    """Read and validate a site.toml; `device` is instead of the one that it names.

    Raises
    ------
    ConfigError
        Naming the file and the setting.
    """
    site = parse(Site, read_toml(path), source=str(path))
    root = path.parent
    dataset = site.dataset.model_copy(update={"path": root / site.dataset.path})
    changes: dict[str, Any] = {"dataset": dataset}
    changes |= {name: root / getattr(site, name) for name in ("ledger", "cache", "split_key")}
    if site.coordinator:
        own = site.coordinator
        paths = {name: root / getattr(own, name) for name in ("ca", "key", "state")}
        changes["coordinator"] = own.model_copy(update=paths)
    if device is not None:
        changes["device"] = device
    site = site.model_copy(update=changes)
    site._file, site._device = path, device
    return site


def virtual(site: Site, **changes: Any) -> Site:
    """Return a changed copy that no file stands behind: a site that a simulation makes."""
    copy = site.model_copy(update=changes)
    copy._file = None
    return copy


def reread(site: Site) -> Site:
    """Return the site as its file says now: the owner may have tightened [privacy] while it was at work.

    Raises
    ------
    DataError
        Where the file cannot be read any more. The reason stays at the site.
    RefusedError
        Where anything but [privacy] is another than before: what was computed rests on it.
    """
    if site._file is None:
        return site
    try:
        now = load(site._file, site._device)
    except ConfigError as error:
        raise DataError(f"{error} It was changed while the site was at work, so that nothing is sent.") from None
    if now.model_copy(update={"privacy": site.privacy}) != site:
        raise RefusedError("this site's site.toml has changed while the answer was made; ask again.")
    return now


def save(site: Site, path: Path) -> None:
    """Write a site.toml."""
    path.write_text(tomli_w.dumps(site.model_dump(mode="json", exclude_none=True)), encoding="utf-8")


def split_key(site: Site) -> bytes:
    """Return the 32 secret bytes that split this site's records, made from the system's entropy at first use."""
    if not site.split_key.exists():
        with tempfile.NamedTemporaryFile(dir=site.split_key.parent, prefix=".split-") as fresh:  # mode 0600
            fresh.write(os.urandom(32))
            fresh.flush()
            os.fsync(fresh.fileno())
            with suppress(FileExistsError):  # another process was quicker: its key is the key
                os.link(fresh.name, site.split_key)
    key = site.split_key.read_bytes()
    if len(key) != 32:
        raise DataError(
            f"{site.split_key} holds {len(key)} bytes, not 32; restore it: a new key would mix the parts of {site.dataset.id!r}."
        )
    return key


def open_ledger(site: Site) -> Ledger:
    """Open the account of the site's dataset."""
    return Ledger.open(
        site.ledger,
        dataset=site.dataset.id,
        unit=site.dataset.unit,
        delta=site.privacy.delta,
        max_epsilon=site.privacy.max_epsilon,
        max_releases=site.privacy.max_releases,
        apart_from=site.dataset.shares_no_records_with,
    )
