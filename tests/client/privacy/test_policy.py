"""Each limit of a site's policy, at the site, against its own ledger."""

import contextlib
import hashlib
import sqlite3
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import tomli_w

from client.privacy import policy
from client.privacy.policy import Policy
from client.privacy.randomness import Keystream
from shared import plan
from shared.errors import BudgetError, MoonflowerError, PolicyError, RefusedError
from shared.plan import DatasetCard
from shared.run_config import RunConfig

CARD = DatasetCard("notes", 100, 0.2)


def check(limits: dict[str, Any], config: RunConfig) -> None:
    own = Policy.model_validate({"max_epsilon": 50.0, "delta": 1e-3, "models": ["*"]} | limits)
    policy.check(own, config, plan.make(config, CARD), "notes")


@pytest.mark.parametrize(
    ("limits", "changes", "said"),
    [
        ({"models": ["pypi:*"]}, {}, r"model.name=.* is not among this site's models \(.*\[privacy\] models"),
        ({"models": []}, {}, r"model.name=.*\(site.toml, \[privacy\] models\): name it there to allow it"),
        ({"coordinators": ["ward-*"]}, {}, r"federation.coordinator='coordinator' .*\[privacy\] coordinators"),
        ({"coordinators": []}, {}, r"federation.coordinator='coordinator' .*\[privacy\] coordinators"),
        ({"tasks": []}, {}, r"task.name='text-classification'.*\[privacy\] tasks"),
        ({"tasks": ["translation"]}, {}, r"task.name='text-classification'.*\[privacy\] tasks"),
        ({"max_run_epsilon": 7.5}, {}, r"privacy.epsilon=8 is above this site's limit of 7.5 .*max_run_epsilon"),
        ({"delta": 1e-4}, {}, r"privacy.delta=0.001 is above this site's limit of 0.0001 .*\[privacy\] delta"),
        ({"min_noise_multiplier": 3.0}, {}, r"noise multiplier of .* below this site's least of 3 .*min_noise_mult"),
        ({}, {"privacy": {"epsilon": float("inf")}}, r"epsilon=inf is no privacy.*allow_non_private"),
        ({}, {"training": {"clipping_norm": 1e-7}}, r"training.clipping_norm=1e-07 is outside"),
        ({}, {"training": {"clipping_norm": 1e7}}, r"training.clipping_norm=1e\+07 is outside"),
    ],
)
def test_each_limit_refuses_alone_and_names_itself(
    new_config: Callable[..., RunConfig], limits: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    check({}, new_config())
    with pytest.raises(PolicyError, match=said) as refused:
        check(limits, new_config(**changes))
    assert "\n" not in str(refused.value)


def test_a_site_works_for_the_coordinators_that_its_patterns_name(new_config: Callable[..., RunConfig]) -> None:
    config = new_config(federation={"coordinator": "ward-3"})
    for patterns in (["ward-*"], ["other", "ward-3"], ["ward-[0-9]"]):
        check({"coordinators": patterns}, config)
    for patterns in (["ward"], ["ward-"], ["WARD-3"], ["other"]):
        with pytest.raises(PolicyError, match=r"federation\.coordinator='ward-3'"):
            check({"coordinators": patterns}, config)


def test_without_a_list_no_model_is_allowed_and_any_task_and_coordinator_are(
    new_config: Callable[..., RunConfig],
) -> None:
    config = new_config(federation={"coordinator": "ward-3"})
    cautious = Policy(max_epsilon=50.0, delta=1e-3)
    with pytest.raises(
        PolicyError, match=r"is not among this site's models \(site.toml, \[privacy\] models\): name it there"
    ):
        policy.check(cautious, config, plan.make(config, CARD), "notes")
    named = cautious.model_copy(update={"models": (config.model.name,)})
    policy.check(named, config, plan.make(config, CARD), "notes")
    assert not cautious.allow_non_private
    assert not cautious.allow_device_noise


def test_a_limit_that_is_just_met_does_not_refuse(new_config: Callable[..., RunConfig]) -> None:
    noise = plan.make(new_config(), CARD).phases["training"].noise_multiplier
    check({"max_run_epsilon": 8.0, "delta": 1e-3, "min_noise_multiplier": noise}, new_config())


def test_the_phase_with_the_least_noise_and_the_evaluation_are_looked_at(new_config: Callable[..., RunConfig]) -> None:
    warm = {"rounds": 1, "sampling_rate": 0.5, "noise_ratio": 0.5}
    config = new_config(warm_start=warm)
    phases = plan.make(config, CARD).phases
    assert phases["warm_start"].noise_multiplier < 0.6 < phases["training"].noise_multiplier
    with pytest.raises(PolicyError, match="below this site's least"):
        check({"min_noise_multiplier": 0.6}, config)
    config = new_config(training={"sampling_rate": 1.0, "rounds": 1, "local_steps": 40}, evaluation={"every": 1})
    made = plan.make(config, CARD)
    between = (made.evaluation_noise + made.phases["training"].noise_multiplier) / 2
    assert made.evaluation_noise < between
    with pytest.raises(PolicyError, match="below this site's least"):
        check({"min_noise_multiplier": between}, config)


def test_a_pattern_of_models_is_not_left_by_dots(new_config: Callable[..., RunConfig], tiny_model: Any) -> None:
    aside = f"{tiny_model}/../{tiny_model.name}"
    check({"models": [f"{tiny_model}*"]}, new_config())
    with pytest.raises(PolicyError, match="not among this site's models"):
        check({"models": [f"{tiny_model}*"]}, new_config(model={"name": aside}))


def test_a_site_that_allows_no_privacy_lets_such_a_run_through(new_config: Callable[..., RunConfig]) -> None:
    check({"allow_non_private": True}, new_config(privacy={"epsilon": float("inf")}))
    with pytest.raises(PolicyError, match="max_run_epsilon"):
        check({"allow_non_private": True, "max_run_epsilon": 1.0}, new_config())


@pytest.mark.parametrize(
    ("limits", "changes"),
    [
        ({"models": ["pypi:*"]}, {}),
        ({"max_run_epsilon": 1.0}, {}),
        ({"min_noise_multiplier": 3.0}, {}),
        ({"max_epsilon": 1.0}, {}),
        ({}, {"task": {"labels": ["bad", "worse"]}}),
    ],
)
def test_what_the_policy_forbids_is_refused_before_any_record_is_touched(
    new_desk: Callable[..., Any], limits: dict[str, Any], changes: dict[str, Any]
) -> None:
    desk = new_desk(site={"privacy": limits}, config=changes)
    desk.site.dataset.path.unlink()  # whoever read a record would fail otherwise
    for ask in (desk.join, desk.train, desk.evaluate):
        with pytest.raises(MoonflowerError) as refused:
            ask()
        assert isinstance(refused.value, PolicyError) or "task.labels" in str(refused.value)
    assert desk.spent() == 0


def tighten(desk: Any, **limits: Any) -> None:
    """Change the owner's own file: site.toml, [privacy]."""
    file = desk.site.ledger.parent / "site.toml"
    values = tomllib.loads(file.read_text(encoding="utf-8"))
    values["privacy"] |= limits
    file.write_text(tomli_w.dumps(values), encoding="utf-8")


TIGHTER: list[tuple[dict[str, Any], str]] = [
    ({"models": ["pypi:*"]}, r"among this site's models"),
    ({"tasks": []}, r"\[privacy\] tasks"),
    ({"coordinators": ["ward-*"]}, r"\[privacy\] coordinators"),
    ({"max_run_epsilon": 1.0}, "limit of 1 .*max_run_epsilon"),
    ({"min_noise_multiplier": 3.0}, "min_noise_multiplier"),
    ({"max_epsilon": 1.0}, "limit of 1 .*max_epsilon"),
    ({"max_releases": 2}, "limit of 2 .*max_releases"),
    ({"delta": 1e-4}, "limit of 0.0001 .*delta"),
    ({"delta": 5e-3}, "delta or allow_device_noise has changed"),
    ({"allow_device_noise": False}, "delta or allow_device_noise has changed"),
]


@pytest.mark.parametrize(
    ("kind", "limits", "said"),
    [*(("evaluate", *each) for each in TIGHTER), *(("train", *each) for each in TIGHTER[-5:-2])],
)
def test_a_policy_tightened_while_the_answer_is_made_stops_its_release(
    new_desk: Callable[..., Any], kind: str, limits: dict[str, Any], said: str
) -> None:
    desk = new_desk(site={"privacy": {"allow_device_noise": True}})
    desk.evaluate(number=1)
    desk.evaluate(number=2)
    drawn = []

    def at_work(name: str) -> Keystream:  # asked for when the site has checked all and begins to compute
        drawn.append(name)
        tighten(desk, **limits)
        return Keystream(hashlib.sha256(name.encode()).digest())

    desk.randomness = at_work
    ask = desk.train if kind == "train" else desk.evaluate
    with pytest.raises(PolicyError if "delta or" not in said else RefusedError, match=said) as refused:
        ask(number=3)
    assert "\n" not in str(refused.value)
    assert drawn  # it was computed, and not sent
    with contextlib.closing(sqlite3.connect(desk.site.ledger)) as file:
        assert file.execute("SELECT count(*) FROM spends").fetchone() == (2,)
        assert file.execute("SELECT count(*) FROM reservations").fetchone() == (0,)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_policy_loosened_while_the_answer_is_made_does_not_stop_it(new_desk: Callable[..., Any], kind: str) -> None:
    desk = new_desk(site={"privacy": {"max_releases": 6}})

    def at_work(name: str) -> Keystream:
        tighten(desk, max_epsilon=300.0, max_releases=7)
        return Keystream(hashlib.sha256(name.encode()).digest())

    desk.randomness = at_work
    assert (desk.train if kind == "train" else desk.evaluate)().round == 1
    assert desk.spent() == 1


def test_no_more_answers_than_the_policy_allows_are_ever_charged(new_desk: Callable[..., Any]) -> None:
    desk = new_desk(site={"privacy": {"max_releases": 3}})
    for ask in (desk.train, desk.evaluate):
        ask(number=1)
    kept = desk.train(number=2)
    said = (
        r"add 1 to the 3 releases of dataset 'notes-of-clinic' that were charged, above the limit of 3 .*max_releases"
    )
    desk.site.dataset.path.unlink()  # whoever computed before it counted would fail otherwise
    for ask in (desk.train, desk.evaluate):
        with pytest.raises(BudgetError, match=said):
            ask(number=3, run="another")
    with pytest.raises(BudgetError, match=said):
        desk.evaluate(number=2)
    again = desk.train(number=2)  # kept bytes are no new release
    assert all((again.update[name] == kept.update[name]).all() for name in kept.update)
    assert desk.spent() == 3


@pytest.mark.parametrize(("limit", "fits"), [(5, False), (6, True)])  # three rounds, each evaluated
def test_a_site_joins_only_with_room_for_the_whole_run(new_desk: Callable[..., Any], limit: int, fits: bool) -> None:
    desk = new_desk(site={"privacy": {"max_releases": limit}})
    if fits:
        desk.join()
    else:
        with pytest.raises(BudgetError, match=r"would add 6 to the 0 releases .* charged, above the limit of 5"):
            desk.join()
    assert desk.spent() == 0


def test_a_run_that_joins_again_has_room_for_what_is_left_of_it(new_desk: Callable[..., Any]) -> None:
    desk = new_desk(site={"privacy": {"max_releases": 6}})
    desk.train(number=1)
    desk.evaluate(number=1)
    desk.join()
    with pytest.raises(BudgetError, match=r"would add 6 to the 2 releases .* charged, above the limit of 6"):
        desk.join(run="another")


def test_an_answer_that_is_being_made_counts_as_a_release(new_desk: Callable[..., Any]) -> None:
    desk = new_desk(site={"privacy": {"max_releases": 2}})
    desk.evaluate()
    refused = []

    def at_work(name: str) -> Keystream:
        if not refused:  # while the one is computed, the other would be the third
            with (
                desk.ledger() as ledger,
                pytest.raises(BudgetError, match=r"1 releases .* charged and 1 under way") as said,
            ):
                ledger.check_releases(1)
            refused.append(said)
        return Keystream(hashlib.sha256(name.encode()).digest())

    desk.randomness = at_work
    desk.train()
    assert refused
    assert desk.spent() == 2
