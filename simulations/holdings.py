"""Who holds what: how many records of each label every site of a scenario has. All of it is private at a real site.

How far a site's labels are from those of all sites together is their total variation: half of the sum, over labels, of the
differences between its shares and theirs. It is 0 where they agree, and 1 where they have no label in common.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from shared import record_files
from shared.errors import ConfigError, DataError
from shared.records import ID, person
from shared.run_config import PrivacyUnit
from simulations import pool_columns, vader
from simulations.partition import LABEL, MOST_VALUES, Partition, Rows, assign, declared
from simulations.scenario import Scenario


@dataclass(frozen=True, eq=False)
class Holdings:
    """Sites and what they hold. `column` is what `values` are of; without values there is nothing to tell records apart."""

    names: tuple[str, ...]
    units: Rows  # (sites,): persons where they are the unit of privacy, else records
    declared: Rows  # (sites,), public
    unit: PrivacyUnit
    left_out: int  # records of the pool that are at no site
    column: str | None
    values: tuple[str, ...]
    counts: Rows  # (sites, values), records; (sites, 1) without values

    @cached_property
    def records(self) -> Rows:
        """How many records each site has, (sites,)."""
        return np.asarray(self.counts.sum(axis=1))

    @cached_property
    def kinds(self) -> Rows:
        """How many different values each site has, (sites,)."""
        return np.asarray((self.counts > 0).sum(axis=1))

    @cached_property
    def shares(self) -> npt.NDArray[np.float64]:
        """The share of each value at a site, (sites, values); every site has a record."""
        return np.asarray(self.counts / self.records[:, None])

    @cached_property
    def variation(self) -> npt.NDArray[np.float64]:
        """Total variation between each site's values and all sites', (sites,)."""
        whole = self.counts.sum(axis=0) / self.counts.sum()
        return np.asarray(np.abs(self.shares - whole).sum(axis=1) / 2)


def of(scenario: Scenario, column: str | None = None) -> Holdings:
    """Read a scenario's records, and count who holds what; nothing is written.

    Parameters
    ----------
    column
        A role of the task or a column of the files; by default `label`, or else what the partition goes by, where every record
        has one such value.

    Raises
    ------
    ConfigError, DataError
        Where the records cannot be read, or not be dealt out.
    """
    return (
        _one_by_one(scenario, column)
        if scenario.partition is None
        else _of_a_pool(scenario, scenario.partition, column)
    )


def _of_a_pool(scenario: Scenario, partition: Partition, column: str | None) -> Holdings:
    held = pool_columns.read(scenario, [column or LABEL])
    shown = column or (LABEL if LABEL in held else partition.by)
    labels = _shown(shown, held, asked=column is not None)
    made = assign(partition, held, unit=scenario.data.unit_column)
    sites = np.repeat(np.arange(len(made)), np.diff(made.offsets))
    values, counts = _count(sites, None if labels is None else labels[made.indices], len(made), scenario)
    return Holdings(
        made.names,
        made.units,
        declared(made.units),
        _unit(scenario),
        len(held[ID]) - len(made.indices),
        shown if values else None,
        values,
        counts,
    )


def _one_by_one(scenario: Scenario, column: str | None) -> Holdings:
    shown, unit = column or LABEL, scenario.data.unit_column
    domains = vader.split(vader.sentences())[0] if scenario.data.source == "vader" else {}
    whole: dict[str, list[str]] = {}
    units, sizes = list[int](), list[int]()
    for site in scenario.sites:
        if scenario.data.source == "folder":
            found = record_files.rows(pool_columns.path(scenario, site.name))
        else:
            found = pool_columns.domain_rows(site.name, domains.get(site.name, []))
        held = pool_columns.columns(scenario, [ID, *([unit] if unit else [])], found, [shown])
        if not held[ID]:
            raise DataError(f"sites: there are no records of {site.name!r}.")
        sizes.append(len(held[ID]))
        units.append(len(set(map(person, held[unit]))) if unit else len(held[ID]))
        for name, values in held.items():
            whole.setdefault(name, []).extend(values)
    if len(whole.get(shown, ())) < sum(sizes):
        whole.pop(shown, None)  # a site lacks it
    labels = _shown(shown, whole, asked=column is not None)
    names, counts = _count(np.repeat(np.arange(len(sizes)), sizes), labels, len(sizes), scenario)
    return Holdings(
        tuple(site.name for site in scenario.sites),
        np.array(units),
        np.array([site.units for site in scenario.sites]),
        _unit(scenario),
        0,
        shown if names else None,
        names,
        counts,
    )


def _shown(column: str | None, held: dict[str, list[str]], *, asked: bool) -> npt.NDArray[Any] | None:
    """Return the column that is counted, or None where there is none to count."""
    if column not in held:
        if asked:
            raise DataError(f"--by {column}: a record lacks this column, or has neither text nor a whole number in it.")
        return None
    found = len(set(held[column]))
    if found > MOST_VALUES:
        if asked:
            raise ConfigError(f"--by {column} has {found} values; at most {MOST_VALUES} can be told apart.")
        return None
    return np.asarray(held[column])


def _count(
    site_of: Rows, labels: npt.NDArray[Any] | None, sites: int, scenario: Scenario
) -> tuple[tuple[str, ...], Rows]:
    """Return the values, in the order in which the task declares them, and how many of each every site has."""
    if labels is None:
        return (), np.bincount(site_of, minlength=sites)[:, None]
    values, codes = np.unique(labels, return_inverse=True)
    counts = np.bincount(site_of * len(values) + codes, minlength=sites * len(values)).reshape(sites, len(values))
    names, known = values.tolist(), list(scenario.task.labels)
    order = sorted(
        range(len(names)), key=lambda place: known.index(names[place]) if names[place] in known else len(known)
    )
    return tuple(names[place] for place in order), np.asarray(counts[:, order])


def _unit(scenario: Scenario) -> PrivacyUnit:
    return "record" if scenario.data.unit_column is None else "person"
