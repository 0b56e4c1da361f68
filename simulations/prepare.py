"""Lay out a simulated federation on the disk: a run's folder, as its coordinator and its sites see it.

    RUN/run.json  test.jsonl  checkpoints/  sites/NAME/{site.toml, records.jsonl, split.key, ledger.db, cache/}

A simulated site is born with its run: its policy and its ledger lie in the run's folder, and its data (`origins`).
"""

import glob
import hashlib
import json
import secrets
import shutil
from pathlib import Path
from typing import Any

from client import site as sites
from client.privacy import policy
from client.privacy.events import PARTS
from client.site import Dataset, Site, open_ledger
from server.history.store import History
from server.job import RUN_FILE
from shared import __version__, models, plan
from shared.errors import ConfigError, NotFoundError, PolicyError
from shared.paths import home
from shared.plan import SitePlan
from shared.run_config import RunConfig
from simulations import origins
from simulations.scenario import Scenario, VirtualSite

ROUNDING = 0.1  # a declared size may differ from the true one by this share


def prepare(scenario: Scenario, history: History, device: str = "auto") -> str:
    """Check everything that can be checked, lay out the federation, enter the run; return the run's id.

    Raises
    ------
    ConfigError, DataError, ModelError
        With nothing left behind.
    """
    config, own = scenario.run_config(), _policy(scenario)
    origin = origins.of(scenario)
    for site in scenario.sites:
        dataset = _dataset(scenario, site)
        held, size = origin.units(site.name, dataset), f"{dataset.unit}s"
        if abs(site.units - held) > ROUNDING * held:
            raise ConfigError(
                f"sites: {site.name!r} declares {size}={site.units} and holds {held}; declare its size rounded, as {_rounded(held)}."
            )
    models.pick_device(device)
    configs = {site.name: _site(scenario, site, own, device) for site in scenario.sites}
    plans = {name: plan.make(config, site_config.dataset.card()) for name, site_config in configs.items()}
    models.load(config)  # a model that is missing, or of which nothing would be trained, is found out now

    run = f"{scenario.name}-{secrets.token_hex(3)}"
    folder = run_folder(run)
    folder.mkdir(parents=True)
    try:
        for name, site_config in configs.items():
            place = folder / "sites" / name
            place.mkdir(parents=True)
            where = origin.lay_out(name, place)
            (place / "split.key").write_bytes(hashlib.sha256(f"{scenario.data.split_seed}/{name}".encode()).digest())
            dataset = site_config.dataset.model_copy(update={"path": where})
            sites.save(site_config.model_copy(update={"dataset": dataset}), place / "site.toml")
            _check_policy(sites.load(place / "site.toml"), config, plans[name])
        origin.lay_out_test(folder)
        described = {"run": run, "sites": len(configs), "device": device, "config": config.as_dict()}
        (folder / RUN_FILE).write_text(json.dumps(described, indent=1), encoding="utf-8")
        history.create_run(
            run,
            name=scenario.name,
            config=config.as_dict(),
            config_digest=config.digest,
            rounds_planned=config.rounds,
            private=config.privacy.private,
            version=__version__,
        )
    except BaseException:
        shutil.rmtree(folder)
        raise
    return run


def _check_policy(site: Site, config: RunConfig, planned: SitePlan) -> None:
    """Refuse what the site will refuse, by its policy or its budget, before the run is entered."""
    try:
        policy.check(site.privacy, config, planned, site.dataset.id)
        with open_ledger(site) as ledger:
            for part in PARTS:
                ledger.check_plan(planned.releases(part), part, allow_unbounded=site.privacy.allow_non_private)
            ledger.check_releases(config.rounds + config.evaluations)
    except PolicyError as error:
        raise ConfigError(f"{error} In a simulation the scenario's [policy] sets the sites' limits.") from None


def run_folder(run: str) -> Path:
    """Where a run's folder is."""
    return (home() / "runs" / run).absolute()


def site_files(run: str) -> dict[int, dict[str, str | int | float | bool]]:
    """Return each virtual node's configuration, as Flower would give it.

    Raises
    ------
    NotFoundError
        Where the run was not simulated here.
    """
    found = sorted((run_folder(run) / "sites").glob("*/site.toml"))
    if not found:
        raise NotFoundError(
            f"{run_folder(run)} holds no simulated sites; resume where the run was started (MOONFLOWER_HOME)."
        )
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
