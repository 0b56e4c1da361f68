"""The preflight of `moonflower client check`: each thing that a site needs, and what to do where it is not so.

Nothing is released, and nothing charged. The model is tried in a process of its own, on made-up records:
should it need more memory than there is, that process dies and not the check.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from client.node.coordinator import AHEAD, Knock, knock
from client.node.node import connection
from client.site import Coordinator, Dataset, Site, open_ledger
from shared import tasks
from shared.errors import ConfigError, DataError, MoonflowerError, NotFoundError
from shared.run_config import RunConfig, parse, read_toml

ROUNDING = 0.1  # a declared size may differ from the true one by this share
LEAST_FREE = 2**30  # bytes, for the ledger and what it keeps
PATTERN = re.compile(r"[*?\[]")
TOKENS = 64  # of a text, where no run says how long they are
STEPS = ("device", "model", "probe", "memory")  # of the trial, in its order
TRIAL = "from client.node.trial import main; main()"


@dataclass(frozen=True)
class Finding:
    """What was looked at, whether it is right, and what it is, or what to do."""

    name: str
    ok: bool
    text: str


class _Wrong(MoonflowerError):
    """What a check found wrong, and what to do."""


def check(site: Site, file: Path, run: Path | None = None, *, insecure: bool = False) -> list[Finding]:
    """Look at everything that the node needs.

    Parameters
    ----------
    site : Site
        As `file`, its site.toml, has it; with the device that is to be used.
    file : Path
        Where it was read from.
    run : Path | None
        A run's configuration: its model and task are tried, and whether policy and budget let it in.
    insecure : bool
        Whether the node is to run in plaintext, without a key.
    """
    config = parse(RunConfig, read_toml(run), source=str(run)) if run else _any_run(site)
    looks: list[tuple[str, Callable[[], str]]] = []
    if not insecure:
        looks += _door(connection(site, file))
    looks += [
        ("data", lambda: _data(site, config)),
        ("budget", lambda: _budget(site)),
        ("disk", lambda: _disk(site)),
    ]
    if run and config:
        looks.append(("run", lambda: _run(site, config)))
    findings = [_look(name, look) for name, look in looks]
    if config is None:
        text = "not tried: name one with --run RUN.TOML" + (
            "" if site.privacy.models else "; [privacy] models allows none"
        )
        return [*findings, Finding("model", bool(site.privacy.models), f"{text}.")]
    return findings + _model(site, config)


def render(findings: Sequence[Finding]) -> str:
    """Give a line a finding."""
    width = max(len(finding.name) for finding in findings)
    return "\n".join(f"{'ok   ' if each.ok else 'wrong'}  {each.name:<{width}}  {each.text}" for each in findings)


def _look(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, look())
    except MoonflowerError as error:
        return Finding(name, False, str(error))


def _door(own: Coordinator) -> list[tuple[str, Callable[[], str]]]:
    said: list[Knock] = []  # one knock, for three lines

    def door() -> Knock:
        if not said:
            said.append(knock(own))
        return said[0]

    def certificate() -> str:
        if not door().reached:
            raise _Wrong(door().trouble)
        return f"{own.address} shows a certificate of this federation's authority"

    def clock() -> str:
        skew = door().skew
        if skew is None:
            raise _Wrong("the coordinator did not say what time it is: it was not reached, or is no coordinator.")
        if not door().in_time:
            raise _Wrong(door().clock())
        return f"{abs(skew):.0f} s from the coordinator's, which takes {AHEAD:.0f} s ahead and 300 s behind"

    def key() -> str:
        if own.key.stat().st_mode & 0o077:
            raise _Wrong(f"[coordinator] key={own.key} can be read by others; chmod 600 it.")
        if door().trouble:
            raise _Wrong(door().trouble if door().reached else "not asked: the coordinator was not reached.")
        return f"coordinator {own.name!r} lets this site in"

    return [("certificate", certificate), ("clock", clock), ("key", key)]


def _any_run(site: Site) -> RunConfig | None:
    """Return a run of the one model that the site allows by name, or None where there are more, or patterns."""
    models = site.privacy.models
    if len(models) != 1 or PATTERN.search(models[0]) or len(site.dataset.labels) == 1:
        return None
    try:
        phases = ("warm_start", "training") if tasks.of(_any(site.dataset)).features else ("training",)
    except ConfigError:
        return None  # what is read of the data says what is wrong
    values = {
        "model": {"name": models[0]},
        "task": {"name": site.dataset.task, "labels": list(site.dataset.labels), "max_length": TOKENS},
        "privacy": {"epsilon": site.privacy.max_run_epsilon, "delta": site.privacy.delta},
        **{phase: {"rounds": 1, "sampling_rate": 0.1} for phase in phases},
    }
    return parse(RunConfig, values, source="the trial run")


def _data(site: Site, config: RunConfig | None) -> str:
    from client import data

    own = site.dataset
    task = tasks.of(config if config else _any(own))
    count = Counter(record.unit for record in data.read(own, task))
    held = len(count)
    if abs(own.units - held) > ROUNDING * held:
        raise DataError(
            f"[dataset] {own.unit}s={own.units} and {own.path} holds {held}; declare its size rounded, within {ROUNDING:.0%}."
        )
    most = max(count.values())
    whose = f" of {held} persons, at most {most} of one" if own.unit == "person" else ""
    labelled = " and a declared label" if own.labels else ""
    return (
        f"{own.path}: {count.total()} records{whose} of {own.task}, each with its columns{labelled}; {own.units} {own.unit}s "
        "are declared"
    )


def _any(own: Dataset) -> RunConfig:
    """A run that this data set fits, where none is named."""
    labels = [*own.labels, "another label"] if len(own.labels) == 1 else list(own.labels)
    values = {
        "model": {"name": "any"},
        "task": {"name": own.task, "labels": labels},
        "training": {"rounds": 1, "batch_size": 1},
    }
    return parse(RunConfig, values, source="the trial run")


def _budget(site: Site) -> str:
    from client.privacy.account import Account
    from client.privacy.events import PARTS

    own = site.privacy
    if not site.ledger.exists():
        return f"nothing is spent of epsilon {own.max_epsilon:g}; the ledger is made with the first run"
    try:
        with Account.read(site.ledger, site.dataset.id) as account:
            spent = {part: account.lifetime_epsilon(part) for part in PARTS}
            answers = len(account.spends())
    except NotFoundError:
        return f"nothing is spent of epsilon {own.max_epsilon:g} for dataset {site.dataset.id!r}"
    if max(spent.values()) >= own.max_epsilon:
        raise _Wrong(
            f"epsilon {max(spent.values()):.3f} of {own.max_epsilon:g} is spent for dataset {site.dataset.id!r} ([privacy] "
            "max_epsilon): it can take part in no further run."
        )
    if own.max_releases is not None and answers >= own.max_releases:
        raise _Wrong(f"{answers} of {own.max_releases} answers are given ([privacy] max_releases).")
    said = ", ".join(f"{part} {value:.3f}" for part, value in spent.items())
    return f"spent of epsilon {own.max_epsilon:g}: {said}; {answers} answers"


def _disk(site: Site) -> str:
    from client.cache import Cache
    from client.privacy.ledger_file import refuse_shared

    refuse_shared(site.ledger)
    Cache(site.cache, site.dataset.id)  # is made, where there is none; refuses what others can read
    folder = site.ledger.parent
    if not os.access(folder, os.W_OK):
        raise _Wrong(f"{folder} cannot be written, where the ledger is; give this user the right to.")
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE:
        raise _Wrong(f"{free / 2**20:.0f} MiB are free in {folder}; the ledger wants {LEAST_FREE // 2**20}.")
    return f"{free / 2**30:.0f} GiB free in {folder}"


def _run(site: Site, config: RunConfig) -> str:
    """See whether the site would join the run: by its policy, and by its budget where it has a ledger."""
    from client import answers
    from client.privacy import policy
    from client.privacy.events import PARTS
    from shared import plan

    answers.check_declared(site, config)
    planned = plan.make(config, site.dataset.card())
    policy.check(site.privacy, config, planned, site.dataset.id)
    if site.ledger.exists():
        with open_ledger(site) as ledger:
            for part in PARTS:
                ledger.check_plan(planned.releases(part), part, allow_unbounded=site.privacy.allow_non_private)
            ledger.check_releases(config.rounds + config.evaluations)
    return f"epsilon {config.privacy.epsilon:g} over {config.rounds} rounds is within policy and budget"


def _model(site: Site, config: RunConfig) -> list[Finding]:
    """Try the model in another process; what it has found before it died counts."""
    command = [sys.executable, "-P", "-c", TRIAL, config.as_json(), site.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    found = [Finding(*json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode == 0:
        return found
    name = STEPS[min(len(found), len(STEPS) - 1)]
    if found and not found[-1].ok:
        return found
    if done.returncode < 0:
        have = psutil.virtual_memory().total / 2**30
        text = (
            f"the trial was killed, as a process is that wants more memory than there is ({have:.0f} GiB); lower "
            "hardware.micro_batch or task.max_length, set hardware.checkpointing, or use a larger machine."
        )
        return [*found, Finding(name, False, text)]
    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return [*found, Finding(name, False, f"the trial failed: {last[:300]}")]
