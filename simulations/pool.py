"""Virtual sites by the thousand, of one pool of records: a site is a row of an index, until somebody asks it.

    RUN/pool/  site.toml  records.*  split.key  sites/  rows.npz  study.db  cache/

The pool is read, split and encoded once, as one site's data set would be; `site.toml` says how, and what is the same for all
sites: declaration, policy, device. `sites/` is who holds which rows (`simulations.partition.Assignment`), `rows.npz` which
part and unit of the encoded pool a row went to, and what each site declares. A site's turn copies its own records out of the
pool; its account is in the study's one ledger (`simulations.study`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from client import data, site
from client.data import Parts
from client.privacy.ledger import Ledger
from client.resident import Resident
from client.site import Site
from shared.arrays import Arrays
from shared.examples import Examples
from shared.features import FeatureCache
from shared.plan import Part
from shared.records import Record
from shared.run_config import RunConfig
from simulations.grid import NodeConfig
from simulations.partition import Assignment
from simulations.study import Study

FOLDER = "pool"
SITE_FILE, SITES, ROWS, LEDGER = "site.toml", "sites", "rows.npz", "study.db"
TRAIN, VALIDATION = 0, 1


class Pool:
    """A run's pool, and its sites by their numbers from 0."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole = site.load(folder / SITE_FILE)
        self.assignment = Assignment.open(folder / SITES)
        with np.load(folder / ROWS, allow_pickle=False) as held:
            self._part, self._unit, self._declared = held["part"], held["unit"], held["declared"]

    def __len__(self) -> int:
        return len(self.assignment)

    def site(self, number: int) -> Site:
        """Return one site: what its site.toml would say."""
        name, size = self.assignment.names[number], int(self._declared[number])
        whole = self.whole.dataset
        sized = {"records": size} if whole.unit_column is None else {"persons": size}
        dataset = whole.model_copy(update={"id": f"{whole.id}.{name}", **sized})
        return site.virtual(self.whole, name=name, dataset=dataset, ledger=self.folder / LEDGER)

    def number(self, name: str) -> int:
        """Return the number of a site."""
        return self._numbers[name]

    def units(self, number: int, part: int) -> npt.NDArray[np.int64]:
        """Return a site's units, sorted, as the encoded pool's part numbers them."""
        rows = self.assignment.rows(number)
        return np.unique(self._unit[rows[self._part[rows] == part]])

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.assignment.names)}


def write_rows(
    path: Path, records: Iterable[Record], key: bytes, share: float, declared: npt.NDArray[np.int64]
) -> None:
    """Write which part each of the pool's records goes to, and the number of its unit there, by first appearance."""
    parts, units = list[int](), list[int]()
    seen: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for record in records:
        part = VALIDATION if data.is_validation(record.unit, key, share) else TRAIN
        parts.append(part)
        units.append(seen[part].setdefault(record.unit, len(seen[part])))
    np.savez(path, part=np.array(parts, np.int8), unit=np.array(units, np.int64), declared=declared)


class Nodes(Mapping[int, NodeConfig]):
    """The virtual nodes of a run's pool: node n is site n - 1."""

    def __init__(self, run: Path, sites: int) -> None:
        self._run, self._sites = str(run), sites

    def __getitem__(self, node: int) -> NodeConfig:
        if not 1 <= node <= self._sites:
            raise KeyError(node)
        return {"run": self._run, "partition-id": node - 1}

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, self._sites + 1))

    def __len__(self) -> int:
        return self._sites


class PoolResident(Resident):
    """The warm state of a process that answers for virtual sites: the pool encoded, and one site's records at a time.

    Sites of no pool, with a folder each, are answered for as ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self._studies: dict[Path, Study] = {}
        self._encoded: tuple[object, Parts] | None = None  # the pool, and the model that it was encoded for
        self._seen_by = ""  # the encoder that made the features

    def __reduce__(self) -> tuple[Callable[[], Resident], tuple[()]]:
        """Pickle as the receiving process's own."""
        return of_this_process, ()

    def ledger(self, site: Site) -> Ledger:
        """Open the site's account: a pool's site has it in the study's ledger."""
        if _pool_of(site) is None:
            return super().ledger(site)
        if site.ledger not in self._studies:
            self._studies[site.ledger] = Study(site.ledger)
        return self._studies[site.ledger].ledger(site)

    def probe_is_due(self, kind: str, arrays: str) -> bool:
        """Once for all sites that train from the same arrays: here they share one engine and one model."""
        return self.probed_from != f"{kind} {arrays}"

    def parts(self, site: Site, config: RunConfig) -> Parts:
        """Return the site's records, encoded and split: copied out of the pool."""
        pool = _pool_of(site)
        if pool is None:
            return super().parts(site, config)
        whole = self._whole(pool, config)
        if site.name not in self._parts:
            number = pool.number(site.name)
            train = whole.train.take(pool.units(number, TRAIN))
            validation = whole.validation.take(pool.units(number, VALIDATION))
            self._parts.clear()  # of another site
            self._parts[site.name] = site.name, Parts(train, validation, whole.references)
        return self._parts[site.name][1]

    def features(self, site: Site, part: Part, examples: Examples, config: RunConfig, trained: Arrays) -> Tensor:
        """Return a site's features; those of all sites that were asked are kept for as long as the encoder stands."""
        if _pool_of(site) is not None and self._seen_by != (encoder := self.encoder(trained)):
            self._seen_by, self._features = encoder, FeatureCache()
        return super().features(site, part, examples, config, trained)

    def _whole(self, pool: Pool, config: RunConfig) -> Parts:
        model = self.model(config, pool.whole.device)
        if self._encoded is None or self._encoded[0] is not model:
            self._encoded = model, data.load(pool.whole, model.task, model.processor, self._digests)
        return self._encoded[1]


@cache
def of_this_process() -> PoolResident:
    """Return the warm state that all unpickled ClientApps of this process share."""
    return PoolResident()


@cache
def pool_at(folder: Path) -> Pool:
    """Return the pool in a folder, opened once a process."""
    return Pool(folder)


def _pool_of(site: Site) -> Pool | None:
    """Return the pool that a site is of: its account is in the study's ledger, which lies there."""
    return pool_at(site.ledger.parent) if site.ledger.name == LEDGER else None
