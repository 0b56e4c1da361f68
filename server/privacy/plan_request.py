"""What `moonflower privacy plan` is asked: a scenario file, options, or options on top of a file.

A file is read as `moonflower simulate` reads it, but only for what privacy follows from: the run's
configuration, the sites' declared sizes, and their lifetime limit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator

from shared.errors import ConfigError
from shared.plan import DatasetCard
from shared.run_config import NAME_PATTERN, Positive, RunConfig, Section, parse, read_toml

LARGEST_DELTA = 1e-5  # of a plan that names none, however small its sites


@dataclass(frozen=True)
class PlanRequest:
    """A run to plan, the datasets it would use, and the limit of a dataset's life, where one is known.

    `delta` is the dataset's, at which `max_epsilon` holds; it may be larger than the run's.
    """

    config: RunConfig
    cards: tuple[DatasetCard, ...]
    max_epsilon: float | None
    delta: float


@dataclass(frozen=True)
class Options:
    """What the command line says; None or nothing where it is silent."""

    records: Sequence[str] = ()  # N or NAME=N
    rounds: int | None = None
    local_steps: int | None = None
    batch: int | None = None
    rate: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    validation: float | None = None
    evaluate_every: int | None = None
    max_epsilon: float | None = None


class _Lenient(Section):
    model_config = ConfigDict(extra="ignore")  # what does not bear on privacy is checked by `simulate`


class _Data(_Lenient):
    validation: float = Field(0.1, ge=0.01, le=0.5)


class _Policy(_Lenient):
    max_epsilon: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None


class _PlannedSite(_Lenient):
    name: str = Field(pattern=NAME_PATTERN)
    records: int | None = Field(None, ge=10)
    persons: int | None = Field(None, ge=10)

    @model_validator(mode="after")
    def _it_has_one_size(self) -> Self:
        if (self.records is None) == (self.persons is None):
            raise ValueError(f"site {self.name!r} declares records, or persons where these are the unit of privacy")
        return self

    @property
    def units(self) -> int:
        """The declared size."""
        return self.records or self.persons or 0


class _File(RunConfig):
    data: _Data = _Data()
    policy: _Policy = _Policy()
    sites: tuple[_PlannedSite, ...] = Field((), strict=False)
    partition: dict[str, Any] | None = None  # how large its sites are is in the data, which no plan reads
    dynamics: dict[str, Any] | None = None  # a plan is for those who take part


def read(path: Path | None, options: Options) -> PlanRequest:
    """Put the options on top of the file's settings, and validate the whole.

    Without a file the run is one phase of training, of any model: neither model nor labels cost privacy.

    Raises
    ------
    ConfigError
        One line that names the setting at fault.
    """
    values: dict[str, Any] = {"model": {"name": "any"}, "task": {"labels": ["any", "other"]}}
    if path is not None:
        values = read_toml(path)
    elif options.rounds is None or (options.batch is None) == (options.rate is None) or not options.records:
        raise ConfigError(
            "a plan needs --records, --rounds and one of --batch and --rate, or a scenario file, "
            "as in --records 2000 --rounds 50 --batch 64 --epsilon 8."
        )
    if options.batch is not None and options.rate is not None:
        raise ConfigError(f"--batch={options.batch} and --rate={options.rate:g} are both given; give one of them.")
    for section, settings in _settings(options).items():
        values[section] = {**_section(values, section), **settings}
    if options.batch is not None:
        values["training"].pop("sampling_rate", None)
    if options.rate is not None:
        values["training"].pop("batch_size", None)
    if options.records:
        values["sites"] = [_site(number, text) for number, text in enumerate(options.records, 1)]
    if path is None and options.delta is None:
        largest = max(site["records"] for site in values["sites"])
        values["privacy"] = {"delta": default_delta(largest), **values.get("privacy", {})}
    plan = parse(_File, values, source=path.name if path is not None else "the plan")
    _check(plan, path)
    config = RunConfig.model_validate({name: getattr(plan, name) for name in RunConfig.model_fields})
    cards = tuple(DatasetCard(site.name, site.units, plan.data.validation, config.privacy.unit) for site in plan.sites)
    delta = plan.policy.delta or max(config.privacy.delta, LARGEST_DELTA)
    return PlanRequest(config, cards, plan.policy.max_epsilon, delta)


def default_delta(records: int) -> float:
    """Return the largest power of ten that is at most 1/(10 x records), and at most 1e-5."""
    power = -len(str(10 * records - 1))  # 10**-power is the first power of ten that is at least 10 x records
    return min(float(f"1e{power}"), LARGEST_DELTA)


def _settings(options: Options) -> dict[str, dict[str, Any]]:
    every: dict[str, dict[str, Any]] = {
        "training": {
            "rounds": options.rounds,
            "local_steps": options.local_steps,
            "batch_size": options.batch,
            "sampling_rate": options.rate,
        },
        "privacy": {"epsilon": options.epsilon, "delta": options.delta},
        "data": {"validation": options.validation},
        "evaluation": {"every": options.evaluate_every},
        "policy": {"max_epsilon": options.max_epsilon},
    }
    given = {
        name: {key: value for key, value in section.items() if value is not None} for name, section in every.items()
    }
    return {name: section for name, section in given.items() if section}


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    held = values.get(name, {})
    if not isinstance(held, dict):
        raise ConfigError(f"{name}={held!r} must be a section of settings.")
    return dict(held)


def _site(number: int, text: str) -> dict[str, Any]:
    name, equals, count = text.rpartition("=")
    try:
        records = int(count)
    except ValueError:
        raise ConfigError(f"--records {text!r} is not N or NAME=N, as in --records north=2500.") from None
    if records < 10:
        raise ConfigError(f"--records {text!r} must be at least 10.")
    return {"name": name if equals else f"site-{number}", "records": records}


def _check(plan: _File, path: Path | None) -> None:
    names = [site.name for site in plan.sites]
    if not names:
        raise ConfigError(
            f"{path} names no [[sites]]; give each site's size, or those of a [partition], with --records N."
        )
    if len(set(names)) != len(names):
        raise ConfigError(f"sites={names} names a site twice; name each once.")
    if not math.isfinite(plan.privacy.epsilon):
        raise ConfigError("privacy.epsilon=inf is no privacy, so that there is no noise to plan; give --epsilon.")
    if plan.policy.delta is not None and plan.privacy.delta > plan.policy.delta:
        raise ConfigError(
            f"privacy.delta={plan.privacy.delta:g} is above the sites' policy.delta={plan.policy.delta:g}; lower it."
        )
