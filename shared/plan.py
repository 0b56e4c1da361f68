"""What a site will release over a whole run, fixed before its first step.

Everything here follows from the run's configuration and the site's declared, rounded size, all of it
public: the coordinator and the site compute the same plan, and neither looks at a record. The noise
multiplier is the smallest that keeps the planned releases, composed as `shared.accounting` does for their
mechanism, within the run's epsilon. It is relative to the sensitivity of what is noised: the clipping norm,
or, where gradients are rounded to a grid, the norm that a rounded one may have (`client.privacy.noise.Grid`).
"""

from dataclasses import dataclass, replace
from typing import Literal

from shared.accounting import Mechanism, PlannedSteps, Release, calibrate
from shared.errors import ConfigError
from shared.run_config import Phase, PrivacyUnit, RunConfig

Part = Literal["train", "validation"]


@dataclass(frozen=True)
class DatasetCard:
    """What a site declares of its dataset: all of it public.

    `records` is the rounded size, in units: of persons, where the `unit` of privacy is the person. `validation` is the
    share of units that a keyed hash keeps for validation.
    """

    dataset: str
    records: int
    validation: float
    unit: PrivacyUnit = "record"

    @property
    def train_records(self) -> int:
        """The public number of training units, on which rates and divisors are based."""
        return max(1, round(self.records * (1 - self.validation)))


@dataclass(frozen=True)
class PhasePlan:
    """One site's part in one phase."""

    sampling_rate: float
    noise_multiplier: float
    steps_per_round: int
    rounds: int
    divisor: float  # expected units a step: the public divisor of the summed gradient
    mechanism: Mechanism = "gaussian"

    def round_release(self) -> Release:
        """What one round of this phase costs."""
        return Release(self.sampling_rate, self.noise_multiplier, self.steps_per_round, self.mechanism)


@dataclass(frozen=True)
class SitePlan:
    """All that a site will release in a run, by part of its dataset."""

    phases: dict[str, PhasePlan]
    evaluation_noise: float
    evaluations: int
    mechanism: Mechanism = "gaussian"

    def evaluation_release(self) -> Release:
        """What one histogram costs."""
        return Release(1.0, self.evaluation_noise, 1, self.mechanism)

    def releases(self, part: Part) -> list[Release]:
        """Planned releases over the whole run; a record is in one part only, so the parts do not add up."""
        if part == "validation":
            return [replace(self.evaluation_release(), steps=self.evaluations)]
        return [
            replace(phase.round_release(), steps=phase.steps_per_round * phase.rounds) for phase in self.phases.values()
        ]


def sampling_rate(phase: Phase, name: str, card: DatasetCard) -> float:
    """Return the rate at which a step draws each training unit, or refuse a batch above the data."""
    if phase.sampling_rate is not None:
        return phase.sampling_rate
    batch = phase.batch_size or 0
    if batch > card.train_records:
        raise ConfigError(
            f"{name}.batch_size={batch} is above the {card.train_records} training {card.unit}s that dataset "
            f"{card.dataset!r} declares; lower it to {card.train_records} or less."
        )
    return batch / card.train_records


def check_unit(config: RunConfig, card: DatasetCard) -> None:
    """Refuse a run whose promise is to another unit than the dataset's, which is one for its life.

    Raises
    ------
    ConfigError
        Naming both.
    """
    if config.privacy.unit == card.unit:
        return
    if card.unit == "person":
        raise ConfigError(
            f"privacy.unit={config.privacy.unit!r}, and dataset {card.dataset!r} has the person as its unit, for its whole life "
            "(site.toml, [dataset] unit_column): set privacy.unit='person' and privacy.records_per_person."
        )
    raise ConfigError(
        f"privacy.unit={config.privacy.unit!r}, and dataset {card.dataset!r} names no column that says whose a record is "
        "(site.toml, [dataset] unit_column): set privacy.unit='record', or run it at sites that do."
    )


def make(config: RunConfig, card: DatasetCard) -> SitePlan:
    """Return the plan of a site that declares `card`.

    Raises
    ------
    ConfigError
        When the card is of another unit than the run, delta is above 1/(10 x units), a batch is above the data, or the noise that epsilon needs is
        above `privacy.max_noise_multiplier`.
    """
    privacy = config.privacy
    check_unit(config, card)
    if privacy.private and privacy.delta > 1 / (10 * card.records):
        raise ConfigError(
            f"privacy.delta={privacy.delta:g} is above 1/(10 x {card.unit}s) = {1 / (10 * card.records):.2g} for dataset "
            f"{card.dataset!r} of {card.records} {card.unit}s; lower privacy.delta."
        )
    phases, mechanism = config.phases, privacy.mechanism
    rates = {name: sampling_rate(phase, name, card) for name, phase in phases.items()}
    sigma = calibrate(
        tuple(PlannedSteps(rates[name], phase.steps, phase.noise_ratio, mechanism) for name, phase in phases.items()),
        privacy.epsilon,
        privacy.delta,
    )
    histograms = PlannedSteps(1.0, config.evaluations, 1.0, mechanism)
    evaluation_noise = calibrate((histograms,), privacy.epsilon, privacy.delta)
    noises = {name: sigma * phase.noise_ratio for name, phase in phases.items()}
    highest = max(noises.values())
    if highest > privacy.max_noise_multiplier:
        raise ConfigError(
            f"privacy.epsilon={privacy.epsilon:g} needs a noise multiplier of {highest:.2f} at dataset {card.dataset!r}, "
            f"above privacy.max_noise_multiplier={privacy.max_noise_multiplier:g}; raise epsilon, or plan fewer "
            "rounds or smaller batches."
        )
    return SitePlan(
        phases={
            name: PhasePlan(
                rates[name], noises[name], phase.local_steps, phase.rounds, rates[name] * card.train_records, mechanism
            )
            for name, phase in phases.items()
        },
        evaluation_noise=evaluation_noise,
        evaluations=config.evaluations,
        mechanism=mechanism,
    )
