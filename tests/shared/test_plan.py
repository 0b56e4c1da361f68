"""A run's plan: noise that keeps the whole within epsilon, rates from the declared size, and what cannot be."""

import math
from typing import Any

import pytest

from shared import accounting, plan
from shared.accounting import Release
from shared.errors import ConfigError
from shared.plan import DatasetCard, Part
from shared.run_config import RunConfig

CARD = DatasetCard("notes", 1000, 0.1)
WARM = {"rounds": 2, "local_steps": 3, "sampling_rate": 1.0, "noise_ratio": 4.0}


def config(**changes: Any) -> RunConfig:
    base: dict[str, Any] = {
        "model": {"name": "m"},
        "task": {"labels": ["bad", "good"]},
        "training": {"rounds": 4, "sampling_rate": 0.1, "local_steps": 2},
        "privacy": {"epsilon": 3.0, "delta": 1e-5},
    }
    for name, value in changes.items():
        base[name] = base.get(name, {}) | value
    return RunConfig.model_validate(base)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"privacy": {"epsilon": 0.5, "max_noise_multiplier": 50.0}},
        {"privacy": {"epsilon": 30.0}},
        {"training": {"rounds": 1, "local_steps": 1}},
        {"training": {"sampling_rate": 1.0}},
        {"training": {"sampling_rate": None, "batch_size": 900}},
        {"warm_start": WARM},
        {"warm_start": WARM, "refit": {"rounds": 1, "batch_size": 7, "noise_ratio": 0.7}},
        {"evaluation": {"every": 3}},
        {"privacy": {"noise": "discrete", "grid": 0.5}},
    ],
)
def test_all_planned_releases_together_spend_at_most_epsilon_and_nearly_all_of_it(changes: dict[str, Any]) -> None:
    run = config(**changes)
    made = plan.make(run, CARD)
    parts: tuple[Part, Part] = ("train", "validation")
    for part in parts:
        spent = accounting.epsilon(made.releases(part), run.privacy.delta)
        assert 0.99 * run.privacy.epsilon <= spent <= run.privacy.epsilon


def test_the_rounds_and_evaluations_of_the_run_are_what_was_planned() -> None:
    run = config(warm_start=WARM, evaluation={"every": 4})
    made = plan.make(run, CARD)
    by_round = [made.phases[run.place(number)[0]].round_release() for number in range(1, run.rounds + 1)]
    assert accounting.epsilon(by_round, 1e-5) == accounting.epsilon(made.releases("train"), 1e-5)
    assert [release.steps for release in by_round] == [3, 3, 2, 2, 2, 2]
    evaluated = sum(run.evaluated(number) for number in range(1, run.rounds + 1))
    assert made.releases("validation") == [Release(1.0, made.evaluation_noise, evaluated)]
    assert evaluated == 2


def test_a_discrete_run_plans_discrete_releases_and_more_noise_for_them() -> None:
    usual, made = plan.make(config(), CARD), plan.make(config(privacy={"noise": "discrete"}), CARD)
    releases = [*made.releases("train"), *made.releases("validation"), made.evaluation_release()]
    assert {release.mechanism for release in releases} == {"discrete-gaussian"}
    assert made.phases["training"].round_release().mechanism == "discrete-gaussian"
    assert 1.02 < made.phases["training"].noise_multiplier / usual.phases["training"].noise_multiplier < 1.2
    assert 1.02 < made.evaluation_noise / usual.evaluation_noise < 1.2
    # The multiplier is relative to the sensitivity: the grid's share of it does not change the plan.
    assert plan.make(config(privacy={"noise": "discrete", "grid": 0.5}), CARD) == made


def test_a_phase_has_its_ratio_of_the_noise() -> None:
    phases = plan.make(config(warm_start=WARM), CARD).phases
    assert phases["warm_start"].noise_multiplier == pytest.approx(4 * phases["training"].noise_multiplier)


def test_rate_and_divisor_follow_from_the_declared_size() -> None:
    by_batch = config(training={"sampling_rate": None, "batch_size": 90})
    for records, rate in ((1000, 0.1), (2000, 0.05)):
        phase = plan.make(by_batch, DatasetCard("notes", records, 0.1)).phases["training"]
        assert phase.sampling_rate == pytest.approx(rate)
        assert phase.divisor == pytest.approx(90)
    by_rate = plan.make(config(), DatasetCard("notes", 2000, 0.1)).phases["training"]
    assert (by_rate.sampling_rate, by_rate.divisor) == (0.1, pytest.approx(180))


def test_without_a_promise_there_is_no_noise_and_epsilon_is_inf() -> None:
    run = config(privacy={"epsilon": math.inf, "delta": 0.5}, warm_start=WARM)
    made = plan.make(run, CARD)
    assert {phase.noise_multiplier for phase in made.phases.values()} == {0.0}
    assert made.evaluation_noise == 0.0
    assert accounting.epsilon(made.releases("train"), 1e-5) == math.inf
    assert accounting.epsilon(made.releases("validation"), 1e-5) == math.inf
    assert not run.privacy.private


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"privacy": {"delta": 2e-4}}, r"privacy.delta=0.0002 is above 1/\(10 x records\) = 0.0001 .*'notes'"),
        (
            {"training": {"sampling_rate": None, "batch_size": 901}},
            r"training.batch_size=901 is above the 900 training records that dataset 'notes' declares; lower it to 900",
        ),
        (
            {"privacy": {"epsilon": 0.01}},
            r"privacy.epsilon=0.01 needs a noise multiplier of .* above privacy.max_noise_multiplier=20",
        ),
        (
            {"warm_start": WARM | {"noise_ratio": 50.0}},
            r"needs a noise multiplier of .* above privacy.max_noise_multiplier=20; raise epsilon",
        ),
        ({"privacy": {"epsilon": 1e-9}}, r"privacy.epsilon=1e-09 .*"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_the_setting(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        plan.make(config(**changes), CARD)
    assert "\n" not in str(refused.value)


def test_delta_may_be_just_a_tenth_of_one_over_the_records() -> None:
    plan.make(config(privacy={"delta": 1e-4}), CARD)
