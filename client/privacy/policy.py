"""What a site allows, whatever a coordinator asks: checked here, at the site, before any work."""

import logging
import math
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field

from shared.errors import PolicyError
from shared.plan import SitePlan
from shared.run_config import RunConfig, Section

log = logging.getLogger("moonflower.site")
SMALLEST_NORM, LARGEST_NORM = 1e-6, 1e6  # of clipping: float32 squares underflow at 1e-23, and overflow at 1e19


class Policy(Section):
    """A site's limits, site.toml [privacy].

    `max_epsilon` bounds the dataset's whole life, over all runs, at `delta`; `max_run_epsilon` one run;
    `max_releases` how many answers, of training and of evaluation together, the dataset ever gives (none: as
    many as `max_epsilon` lets through). `models`, `tasks` and `coordinators` are shell patterns. No model is
    allowed that is not named, because a name is also an order: it may be a folder of this machine, or a
    package to fetch. A task is code that the site has installed, and a coordinator's name is what it claims to
    be, so that those two lists begin open.
    """

    max_epsilon: float = Field(gt=0, allow_inf_nan=False)
    max_run_epsilon: float = Field(8.0, gt=0, allow_inf_nan=False)
    delta: float = Field(1e-5, gt=0, lt=1)
    min_noise_multiplier: float = Field(0.3, ge=0)
    max_releases: Annotated[int, Field(ge=1)] | None = None
    models: tuple[str, ...] = Field((), strict=False)
    tasks: tuple[str, ...] = Field(("*",), strict=False)
    coordinators: tuple[str, ...] = Field(("*",), strict=False)
    allow_non_private: bool = False
    allow_device_noise: bool = False  # let the accelerator's own generator draw the noise: quicker, not cryptographic


def check(policy: Policy, config: RunConfig, plan: SitePlan, dataset: str) -> None:
    """Refuse a run that goes beyond the policy: before any work, and again before each release.

    What depends on the ledger, `max_epsilon` and `max_releases`, is checked there.

    Raises
    ------
    PolicyError
        Naming the setting, its value, the limit and where the limit stands. It travels, so it rests on public values
        alone: what else a list of names allows stands in the site's own log.
    """
    privacy = config.privacy
    coordinator = config.federation.coordinator
    if not _allowed(coordinator, policy.coordinators):
        raise _unlisted("federation.coordinator", coordinator, "coordinators", policy.coordinators)
    if ".." in config.model.name or not _allowed(config.model.name, policy.models):
        raise _unlisted("model.name", config.model.name, "models", policy.models)
    if not _allowed(config.task.name, policy.tasks):
        raise _unlisted("task.name", config.task.name, "tasks", policy.tasks)
    if not privacy.private:
        if not policy.allow_non_private:
            raise PolicyError(
                f"privacy.epsilon=inf is no privacy, and this site requires it for dataset {dataset!r} "
                "(site.toml, [privacy] allow_non_private)."
            )
        return
    for name, phase in config.phases.items():
        if not SMALLEST_NORM <= phase.clipping_norm <= LARGEST_NORM:
            raise PolicyError(
                f"{name}.clipping_norm={phase.clipping_norm:g} is outside {SMALLEST_NORM:g} to {LARGEST_NORM:g}, beyond which "
                "numbers of 32 bits neither bound a record nor carry the noise."
            )
    if privacy.epsilon > policy.max_run_epsilon:
        raise PolicyError(
            f"privacy.epsilon={privacy.epsilon:g} is above this site's limit of {policy.max_run_epsilon:g} "
            f"for dataset {dataset!r} (site.toml, [privacy] max_run_epsilon)."
        )
    if privacy.delta > policy.delta:
        raise PolicyError(
            f"privacy.delta={privacy.delta:g} is above this site's limit of {policy.delta:g} "
            f"for dataset {dataset!r} (site.toml, [privacy] delta)."
        )
    noises = [phase.noise_multiplier for phase in plan.phases.values()] + [plan.evaluation_noise]
    lowest = min(noises)
    if not math.isfinite(lowest) or lowest < policy.min_noise_multiplier:
        raise PolicyError(
            f"the plan's noise multiplier of {lowest:.3f} is below this site's least of {policy.min_noise_multiplier:g} "
            f"for dataset {dataset!r} (site.toml, [privacy] min_noise_multiplier)."
        )


def _unlisted(setting: str, value: str, limit: str, patterns: tuple[str, ...]) -> PolicyError:
    """Return the refusal of a name, without the names that are allowed: they tell of others' runs and of the machine."""
    log.warning("%s=%r is refused: [privacy] %s = %s", setting, value, limit, list(patterns))
    return PolicyError(
        f"{setting}={value!r} is not among this site's {limit} (site.toml, [privacy] {limit}): name it there to allow it."
    )


def _allowed(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
