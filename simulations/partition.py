"""A partition: one data set, the pool, cut into many sites, by name and seed.

The pool's rows are numbered from 0, in the order in which `shared.records.each` yields its records. A row is at one site
at most; where persons are the unit of privacy, so is a person. How each kind deals the rows out is in
`simulations.partitioners`; most are those of flwr-datasets.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from shared.errors import ConfigError
from shared.records import person
from shared.run_config import Count, Positive, Section

Kind = Literal[
    "iid",
    "linear",
    "square",
    "exponential",
    "lognormal",
    "dirichlet",
    "inner-dirichlet",
    "shards",
    "pathological",
    "power-law",
    "by-column",
]
Rows = npt.NDArray[np.int64]

MOST_SITES = 1_000_000
MOST_VALUES = 1000  # of the column by which most kinds go: they take time by values x sites
NAME_LENGTH = 20  # of a site that is called as a value: a data set's id has 64 characters, and the run's name is in it
EXACT = ("pathological", "by-column")  # kinds that promise which values a site holds
# Numbers of two digits that a declared size may begin with. Each is at most 1.22 times the one before, so that every size
# is within a tenth of one (`simulations.prepare.ROUNDING`); thirteen a decade, because each may need a noise of its own.
SIZES = (10, 12, 14, 17, 20, 24, 29, 35, 42, 50, 60, 72, 86)

# A kind's own settings: those that it needs, and those that it may have.
SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "iid": ((), ()),
    "linear": ((), ()),
    "square": ((), ()),
    "exponential": ((), ()),
    "lognormal": (("spread",), ()),
    "dirichlet": (("alpha",), ("column", "balanced")),
    "inner-dirichlet": (("alpha",), ("column", "spread")),
    "shards": (("shards_per_site",), ("column",)),
    "pathological": (("values_per_site",), ("column",)),
    "power-law": (("values_per_site", "spread"), ("column",)),
    "by-column": (("column",), ()),
}
LABEL = "label"  # the column, where none is named


class Partition(Section):
    """How the pool becomes sites. Each kind has settings of its own; `simulations.partitioners` says what each kind does.

    `sites` is how many; by-column has as many as the column has values with `min_size` records (persons, where these are the
    unit), which every site has at least. `column` is a role of the task, or a column of the file. `seed` rules who gets what,
    and nothing else.
    """

    kind: Kind
    sites: int | None = Field(None, ge=1, le=MOST_SITES)
    column: str | None = Field(None, min_length=1)
    alpha: Positive | None = None  # of a Dirichlet distribution: 0.1 is very uneven, 100 nearly even
    balanced: bool = False  # dirichlet: a site that has its even share gets no more
    shards_per_site: Count | None = None  # blocks of the pool, sorted by the column
    values_per_site: Count | None = None  # of the column
    spread: float | None = Field(None, ge=0, le=10)  # deviation of the logarithm of the sizes: 0 is even
    min_size: int = Field(10, ge=10)
    seed: int = Field(0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _its_settings_are_its_kinds(self) -> Self:
        needed, optional = SETTINGS[self.kind]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"partition.kind={self.kind!r} needs partition.{name}")
        for name in ("column", "alpha", "balanced", "shards_per_site", "values_per_site", "spread"):
            if name not in (*needed, *optional) and getattr(self, name) not in (None, False):
                whose = ", ".join(kind for kind in get_args(Kind) if name in sum(SETTINGS[kind], ()))
                raise ValueError(
                    f"partition.{name}={getattr(self, name)!r} is a setting of {whose}, and partition.kind is {self.kind!r}; "
                    "leave it out"
                )
        if (self.sites is None) != (self.kind == "by-column"):
            raise ValueError(
                f"partition.sites={self.sites}: "
                + (
                    "by-column has a site for each value; leave it out"
                    if self.kind == "by-column"
                    else f"partition.kind={self.kind!r} needs how many"
                )
            )
        return self

    @property
    def by(self) -> str | None:
        """The column that rows are dealt out by, if any."""
        return self.column or (LABEL if "column" in SETTINGS[self.kind][1] else None)


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which rows of the pool each site holds: site i has `indices[offsets[i] : offsets[i + 1]]`, in the pool's order.

    `units` is how many units of privacy a site has, (sites,): persons, where they are the unit, else rows. Both are true
    counts and private; `declared` gives the public sizes.
    """

    names: tuple[str, ...]
    offsets: Rows  # (sites + 1,)
    indices: Rows  # (rows that are at a site,)
    units: Rows  # (sites,)

    def __len__(self) -> int:
        """How many sites there are."""
        return len(self.names)

    def rows(self, site: int) -> Rows:
        """Return the pool's rows that a site holds, sorted."""
        return self.indices[self.offsets[site] : self.offsets[site + 1]]

    def save(self, folder: Path) -> None:
        """Write the arrays to a folder, which is made."""
        folder.mkdir(parents=True)
        np.save(folder / "names.npy", np.array(self.names))
        for name in ("offsets", "indices", "units"):
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def open(cls, folder: Path) -> "Assignment":
        """Map a folder's arrays into memory."""
        names = tuple(np.load(folder / "names.npy", allow_pickle=False).tolist())
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("offsets", "indices", "units")
        }
        return cls(names, **arrays)


def assign(
    partition: Partition, columns: Mapping[str, Sequence[Any] | npt.NDArray[Any]], *, unit: str | None = None
) -> Assignment:
    """Deal the pool's rows out to sites; the same partition and columns give the same assignment.

    Parameters
    ----------
    columns
        Values by row, all of one length: at least one column, with the partition's own (`Partition.by`) and `unit` among them.
    unit
        The column that says whose a row is: a person's rows go to one site. A person counts as the value that most of their
        rows have (the first in order, of several); kinds that promise which values a site holds want one value a person.

    Raises
    ------
    ConfigError
        Where it cannot be done: fewer units than the sites need, a column that is not there, a person at two sites.
    """
    for name in filter(None, (partition.by, unit)):
        if name not in columns:
            raise ConfigError(
                f"partition: column {name!r} is missing among {', '.join(map(repr, columns))}; name one of these."
            )
    rows = len(next(iter(columns.values())))
    whose = (
        np.arange(rows) if unit is None else np.unique([person(who) for who in columns[unit]], return_inverse=True)[1]
    )
    units, size = int(whose.max(initial=-1)) + 1, "records" if unit is None else "persons"
    needed = (partition.sites or 0) * partition.min_size
    if units < needed:
        raise ConfigError(
            f"partition.sites={partition.sites} of partition.min_size={partition.min_size} {size} need {needed}, and the pool has "
            f"{units}; lower one of them."
        )
    values, codes = np.zeros(1), np.zeros(units, np.int64)
    if partition.by is not None:
        values, by_row = np.unique(np.asarray(columns[partition.by]), return_inverse=True)
        codes = by_row if unit is None else _of_persons(partition, whose, by_row)
    home, names = _dealt(partition, values, codes, size)
    at = home[whose]  # the site of each row, or -1
    held = np.bincount(at[at >= 0], minlength=len(names))
    return Assignment(
        names,
        np.concatenate([[0], np.cumsum(held)]).astype(np.int64),
        np.argsort(at, kind="stable")[int(np.sum(at < 0)) :].astype(np.int64),
        np.bincount(home[home >= 0], minlength=len(names)).astype(np.int64),
    )


def declared(units: npt.ArrayLike) -> Rows:
    """Return the public sizes of sites of these true numbers of units, each 10 or more: the nearest of `SIZES`, scaled.

    A site's noise follows from what it declares, where steps are of a batch size (the rate is batch / size): sites
    of one declared size share one calibration, and a pool of any number of sites has about thirteen a decade. Nothing
    is interpolated. The privacy does not rest on how the size is rounded: sampling is at the public rate that follows from
    it, and that is the rate that is accounted. A size rounded down means a higher rate and more noise, one rounded up
    the contrary; to the nearest, the mean update is at most a tenth too long or too short.
    """
    true = np.asarray(units, dtype=np.int64)
    series = np.array([first * 10**zeros for zeros in range(16) for first in SIZES], np.int64)
    above = np.searchsorted(series, true)
    below = np.maximum(above - 1, 0)
    nearer = np.where(series[above] - true < true - series[below], above, below)
    return np.asarray(series[nearer])


def _dealt(partition: Partition, values: npt.NDArray[Any], codes: Rows, size: str) -> tuple[Rows, tuple[str, ...]]:
    """Return the site of each unit, or -1, and the sites' names."""
    from simulations import partitioners

    if partition.kind == "by-column":
        sizes = np.bincount(codes)
        kept = np.flatnonzero(sizes >= partition.min_size)
        if not len(kept):
            raise ConfigError(
                f"partition.column={partition.column!r} has no value with partition.min_size={partition.min_size} {size}; the most "
                f"that one has is {sizes.max(initial=0)}."
            )
        places = np.full(len(sizes), -1, np.int64)
        places[kept] = np.arange(len(kept))
        return places[codes], _slugs(values[kept].tolist())
    if len(values) > MOST_VALUES:
        raise ConfigError(
            f"partition.column={partition.by!r} has {len(values)} values, and partition.kind={partition.kind!r} takes at most "
            f"{MOST_VALUES}; name another column, or take kind='by-column'."
        )
    home = partitioners.deal(partition, codes)
    sites = partition.sites or 0
    smallest = int(np.bincount(home[home >= 0], minlength=sites).min())
    if smallest < partition.min_size:
        raise ConfigError(
            f"partition.kind={partition.kind!r} leaves one of {sites} sites with {smallest} {size}, below "
            f"partition.min_size={partition.min_size}; {partitioners.REMEDY[partition.kind]}."
        )
    return home, tuple(f"site-{number:0{len(str(sites))}d}" for number in range(1, sites + 1))


def _of_persons(partition: Partition, whose: Rows, by_row: Rows) -> Rows:
    """Return the value, as a number, that each person counts as."""
    pairs, times = np.unique(np.stack([whose, by_row]), axis=1, return_counts=True)
    order = np.lexsort((pairs[1], -times, pairs[0]))
    people, first = np.unique(pairs[0][order], return_index=True)
    if partition.kind in EXACT and len(people) < pairs.shape[1]:
        raise ConfigError(
            f"partition.kind={partition.kind!r} by {partition.by!r}: {pairs.shape[1] - len(people)} times a person has records "
            "of another value too, and a person is at one site; take another kind, or another column."
        )
    return np.asarray(pairs[1][order][first])


def _slugs(values: Sequence[Any]) -> tuple[str, ...]:
    """Name sites as their values, as far as a name may; where two would share one, each has its number too."""
    plain = [re.sub(r"[^a-z0-9]+", "-", str(value).lower()).strip("-")[:NAME_LENGTH].strip("-") for value in values]
    times, width = Counter(plain), len(str(len(values)))
    return tuple(
        slug if slug and times[slug] == 1 else f"{slug or 'site'}.{number:0{width}d}"  # no slug has a dot
        for number, slug in enumerate(plain, 1)
    )
