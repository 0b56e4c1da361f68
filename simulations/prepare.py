"""Lay out a simulated federation on the disk: a run's folder, as its coordinator and its sites see it.

    RUN/run.json  test.jsonl  checkpoints/  sites/NAME/{site.toml, records.jsonl, split.key, ledger.db, cache/}

A simulated site is born with its run: its policy and its ledger lie in the run's folder, and its data (`origins`). Where a
scenario has a partition, its sites have no folders: they lie in a pool (`simulations.pool`).
"""

import glob
import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from client import data
from client import site as sites
from client.privacy import policy
from client.privacy.events import PARTS
from client.privacy.ledger import Ledger
from client.site import Dataset, Site, open_ledger
from server.history.records import Trial
from server.history.store import History
from server.job import RUN_FILE
from shared import __version__, models, plan, tasks
from shared.errors import ConfigError, NotFoundError, PolicyError
from shared.paths import home
from shared.plan import SitePlan
from shared.run_config import RunConfig
from simulations import origins, pool, pool_columns
from simulations.grid import NodeConfig
from simulations.origins import Origin
from simulations.partition import assign, declared
from simulations.scenario import Scenario, VirtualSite
from simulations.study import Study

ROUNDING = 0.1  # a declared size may differ from the true one by this share


class Layout(Protocol):
    """A scenario's sites, checked, and how they come onto the disk."""

    sites: int

    def write(self, folder: Path) -> None:
        """Write the sites into a run's folder, and check that each would take part."""


def prepare(scenario: Scenario, history: History, device: str = "auto", *, trial: Trial | None = None) -> str:
    """Check everything that can be checked, lay out the federation, enter the run; return the run's id.

    With `trial` it is entered as a sweep's, in the place that no other run has.

    Raises
    ------
    ConfigError, DataError, ModelError
        With nothing left behind.
    """
    config, own = scenario.run_config(), _policy(scenario)
    origin = origins.of(scenario)
    models.pick_device(device)
    layout: Layout = (Apart if scenario.partition is None else Pooled)(scenario, config, origin, own, device)
    models.load(config)  # a model that is missing, or of which nothing would be trained, is found out now

    run = f"{scenario.name}-{secrets.token_hex(3)}"
    folder = run_folder(run)
    folder.mkdir(parents=True)
    try:
        layout.write(folder)
        origin.lay_out_test(folder)
        described = {
            "run": run,
            "sites": layout.sites,
            "device": device,
            "config": config.as_dict(),
        }
        if scenario.dynamics is not None:
            described["dynamics"] = scenario.dynamics.model_dump(mode="json")
        (folder / RUN_FILE).write_text(json.dumps(described, indent=1), encoding="utf-8")
        history.create_run(
            run,
            name=scenario.name,
            config=config.as_dict(),
            config_digest=config.digest,
            rounds_planned=config.rounds,
            private=config.privacy.private,
            version=__version__,
            trial=trial,
        )
    except BaseException:
        shutil.rmtree(folder)
        raise
    return run


class Apart:
    """Sites one by one: each with a folder, its own site.toml and its own ledger, as at a real site."""

    def __init__(self, scenario: Scenario, config: RunConfig, origin: Origin, own: policy.Policy, device: str) -> None:
        self._split_seed, self._config, self._origin = scenario.data.split_seed, config, origin
        for site in scenario.sites:
            dataset = _dataset(scenario, site)
            held, size = origin.units(site.name, dataset), f"{dataset.unit}s"
            if abs(site.units - held) > ROUNDING * held:
                raise ConfigError(
                    f"sites: {site.name!r} declares {size}={site.units} and holds {held}; declare its size rounded, as {_rounded(held)}."
                )
        self._configs = {site.name: _site(scenario, site, own, device) for site in scenario.sites}
        self._plans = {name: plan.make(config, held.dataset.card()) for name, held in self._configs.items()}
        self.sites = len(self._configs)

    def write(self, folder: Path) -> None:
        """Write each site's folder."""
        for name, site_config in self._configs.items():
            place = folder / "sites" / name
            place.mkdir(parents=True)
            where = self._origin.lay_out(name, place)
            (place / "split.key").write_bytes(_split_key(self._split_seed, name))
            dataset = site_config.dataset.model_copy(update={"path": where})
            sites.save(site_config.model_copy(update={"dataset": dataset}), place / "site.toml")
            own = sites.load(place / "site.toml")
            with open_ledger(own) as ledger:
                _check_policy(own, ledger, self._config, self._plans[name])


class Pooled:
    """Many sites of one pool: see `simulations.pool`."""

    def __init__(self, scenario: Scenario, config: RunConfig, origin: Origin, own: policy.Policy, device: str) -> None:
        self._split_seed, self._config, self._origin = scenario.data.split_seed, config, origin
        self._task = tasks.of(config)
        partition = scenario.partition
        if partition is None:
            raise ValueError("the scenario has no partition")
        self._assignment = assign(partition, pool_columns.read(scenario), unit=scenario.data.unit_column)
        self._sizes = declared(self._assignment.units)
        total = int(self._assignment.units.sum())
        size = {"records": total} if scenario.data.unit_column is None else {"persons": total}
        whole = _site(scenario, VirtualSite.model_validate({"name": pool_columns.POOL} | size), own, device)
        self._dataset = whole.dataset.model_copy(update={"id": scenario.name})
        self._site, card = whole, self._dataset.card()
        self._plans = {size: plan.make(config, replace(card, records=size)) for size in set(self._sizes.tolist())}
        self.sites = len(self._assignment)

    def write(self, folder: Path) -> None:
        """Write the pool, and who holds what of it."""
        place = folder / pool.FOLDER
        place.mkdir()
        where = self._origin.lay_out(pool_columns.POOL, place)
        key = _split_key(self._split_seed, pool_columns.POOL)
        (place / "split.key").write_bytes(key)
        dataset = self._dataset.model_copy(update={"path": where})
        sites.save(self._site.model_copy(update={"dataset": dataset}), place / pool.SITE_FILE)
        self._assignment.save(place / pool.SITES)
        records = data.read(sites.load(place / pool.SITE_FILE).dataset, self._task)
        pool.write_rows(place / pool.ROWS, records, key, dataset.validation, self._sizes)
        written = pool.Pool(place)
        with closing(Study(place / pool.LEDGER)) as study:
            for size, planned in self._plans.items():
                own = written.site(int(np.flatnonzero(self._sizes == size)[0]))
                _check_policy(own, study.ledger(own), self._config, planned)


def _check_policy(site: Site, ledger: Ledger, config: RunConfig, planned: SitePlan) -> None:
    """Refuse what the site will refuse, by its policy or its budget, before the run is entered."""
    try:
        policy.check(site.privacy, config, planned, site.dataset.id)
        for part in PARTS:
            ledger.check_plan(planned.releases(part), part, allow_unbounded=site.privacy.allow_non_private)
        ledger.check_releases(config.rounds + config.evaluations)
    except PolicyError as error:
        raise ConfigError(f"{error} In a simulation the scenario's [policy] sets the sites' limits.") from None


def _split_key(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def run_folder(run: str) -> Path:
    """Where a run's folder is."""
    return (home() / "runs" / run).absolute()


def nodes(run: str) -> Mapping[int, NodeConfig]:
    """Return each virtual node's configuration, as Flower would give it.

    Raises
    ------
    NotFoundError
        Where the run was not simulated here.
    """
    folder = run_folder(run)
    if (folder / pool.FOLDER).is_dir():
        return pool.Nodes(folder, len(pool.pool_at(folder / pool.FOLDER)))
    found = sorted((folder / "sites").glob("*/site.toml"))
    if not found:
        raise NotFoundError(f"{folder} holds no simulated sites; resume where the run was started (MOONFLOWER_HOME).")
    return {number: {"site": str(path)} for number, path in enumerate(found, 1)}


def _policy(scenario: Scenario) -> policy.Policy:
    """Return the sites' policy; what the scenario does not say of models or asks without privacy, its sites allow."""
    allowed: dict[str, Any] = {}
    if "models" not in scenario.policy.model_fields_set:
        allowed["models"] = (glob.escape(scenario.model.name),)
    if not scenario.privacy.private:
        allowed["allow_non_private"] = True
    return scenario.policy.model_copy(update=allowed)


def _site(scenario: Scenario, site: VirtualSite, own: policy.Policy, device: str) -> Site:
    return Site(name=site.name, dataset=_dataset(scenario, site), privacy=own, device=device)


def _dataset(scenario: Scenario, site: VirtualSite) -> Dataset:
    return Dataset(
        id=f"{scenario.name}.{site.name}",
        path=Path(),
        task=scenario.task.name,
        records=site.records,
        persons=site.persons,
        unit_column=scenario.data.unit_column,
        validation=scenario.data.validation,
        labels=scenario.task.labels,
        columns=scenario.data.columns,
        label_names=scenario.data.label_names,
    )


def _rounded(count: int) -> int:
    """Two leading digits."""
    unit: int = 10 ** max(0, len(str(count)) - 2)
    return round(count / unit) * unit
