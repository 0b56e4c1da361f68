"""Lay out a simulated federation on the disk: a run's folder, as its coordinator and its sites see it.

    RUN/run.json  test.jsonl  checkpoints/  sites/NAME/{site.toml, records.jsonl, split.key, ledger.db}

A simulated site is born with its run: its data, its policy and its ledger lie in the run's folder.
"""

import glob
import hashlib
import json
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from client import data
from client import site as sites
from client.answers import open_ledger
from client.privacy import policy
from client.privacy.events import PARTS
from client.site import Dataset, Site
from server.history.store import History
from server.job import RUN_FILE, TEST_FILE
from shared import __version__, models, plan, tasks
from shared import records as shared_records
from shared.errors import ConfigError, DataError, NotFoundError, PolicyError
from shared.paths import home
from shared.plan import SitePlan
from shared.records import person
from shared.run_config import RunConfig
from simulations import vader
from simulations.scenario import Scenario, VirtualSite

ROUNDING = 0.1  # a declared size may differ from the true one by this share


def prepare(scenario: Scenario, history: History) -> str:
    """Check everything that can be checked, lay out the federation, enter the run; return the run's id.

    Raises
    ------
    ConfigError, DataError, ModelError
        With nothing left behind.
    """
    config, own = scenario.run_config(), _policy(scenario)
    records, test = _records(scenario)
    for site in scenario.sites:
        held, size = _units(scenario, records[site.name])
        if abs(site.units - held) > ROUNDING * held:
            raise ConfigError(
                f"sites: {site.name!r} declares {size}={site.units} and holds {held}; declare its size rounded, as {_rounded(held)}."
            )
    configs = {site.name: _site(scenario, site, own) for site in scenario.sites}
    plans = {name: plan.make(config, site_config.dataset.card()) for name, site_config in configs.items()}
    models.load(config)  # a model that is missing, or of which nothing would be trained, is found out now

    run = f"{scenario.name}-{secrets.token_hex(3)}"
    folder = run_folder(run)
    folder.mkdir(parents=True)
    try:
        for name, site_config in configs.items():
            place = folder / "sites" / name
            place.mkdir(parents=True)
            _write(place / "records.jsonl", records[name])
            (place / "split.key").write_bytes(hashlib.sha256(f"{scenario.data.split_seed}/{name}".encode()).digest())
            sites.save(site_config, place / "site.toml")
            _check_policy(sites.load(place / "site.toml"), config, plans[name])
        if test:
            _write(folder / TEST_FILE, test)
        described = {"run": run, "sites": len(configs), "config": config.as_dict()}
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


def _records(scenario: Scenario) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    names = [site.name for site in scenario.sites]
    if scenario.data.source == "vader":
        unknown = sorted(set(names) - vader.DOMAINS.keys())
        if unknown:
            raise ConfigError(f"sites: {unknown[0]!r} is not a domain of the vader data ({', '.join(vader.DOMAINS)}).")
        held, kept = vader.split(vader.sentences())
        test = [_row(sentence) for name in names for sentence in kept[name]]
        # Not by domain, so that any first part of the test set is like the whole.
        test.sort(key=lambda row: hashlib.sha256(row["id"].encode()).digest())
        return {name: [_row(sentence) for sentence in held[name]] for name in names}, test
    folder = scenario.data.folder or Path()
    test_file = folder / TEST_FILE
    task = tasks.of(scenario.run_config())
    if test_file.exists():
        shared_records.read(test_file, task, identified=False)
    for site in scenario.sites:
        list(data.read(_dataset(scenario, site, folder / f"{site.name}.jsonl"), task))
    return {name: _read(folder / f"{name}.jsonl") for name in names}, _read(test_file) if test_file.exists() else []


def _row(sentence: vader.Sentence) -> dict[str, Any]:
    return {"id": sentence.id, "text": sentence.text, "label": sentence.label}


def _policy(scenario: Scenario) -> policy.Policy:
    """Return the sites' policy; what the scenario does not say of models or asks without privacy, its sites allow."""
    allowed: dict[str, Any] = {}
    if "models" not in scenario.policy.model_fields_set:
        allowed["models"] = (glob.escape(scenario.model.name),)
    if not scenario.privacy.private:
        allowed["allow_non_private"] = True
    return scenario.policy.model_copy(update=allowed)


def _units(scenario: Scenario, rows: list[dict[str, Any]]) -> tuple[int, str]:
    """How many units a site's rows are of, and what these are called."""
    column = scenario.data.unit_column
    return (len(rows), "records") if column is None else (len({person(row[column]) for row in rows}), "persons")


def _site(scenario: Scenario, site: VirtualSite, own: policy.Policy) -> Site:
    dataset = _dataset(scenario, site, Path("records.jsonl"))
    return Site(name=site.name, dataset=dataset, privacy=own, device="auto")


def _dataset(scenario: Scenario, site: VirtualSite, path: Path) -> Dataset:
    return Dataset(
        id=f"{scenario.name}.{site.name}",
        path=path,
        records=site.records,
        persons=site.persons,
        unit_column=scenario.data.unit_column,
        validation=scenario.data.validation,
        labels=scenario.task.labels,
    )


def _rounded(count: int) -> int:
    """Two leading digits."""
    unit: int = 10 ** max(0, len(str(count)) - 2)
    return round(count / unit) * unit


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:  # and not splitlines(): a text may hold U+2028
            return [json.loads(line) for line in lines]
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; data.folder needs one SITE.jsonl for each site."
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON lines: {error}.") from None


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
