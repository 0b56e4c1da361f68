"""The configuration: every mistake in one line that names setting, value and limit; a digest that stays."""

import json
import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.errors import ConfigError
from shared.run_config import Phase, Privacy, RunConfig, parse

LEAST = {"model": {"name": "x"}, "task": {"labels": ["a", "b"]}, "training": {"rounds": 4, "sampling_rate": 0.1}}


def merged(changes):
    values = json.loads(json.dumps(LEAST))
    for key, value in changes.items():
        *sections, last = key.split(".")
        at = values
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
    return values


def read(**changes):
    return parse(RunConfig, merged(changes), source="run.toml")


def refused(changes):
    with pytest.raises(ConfigError) as error:
        parse(RunConfig, merged(changes), source="run.toml")
    said = str(error.value)
    assert said.startswith("run.toml: ")
    assert said.endswith(".")
    assert said.isprintable()  # hence one line
    for jargon in (
        "Input should",
        "input should",
        "Field required",
        "instance of",
        "dictionary",
        "value_error",
        "pydantic",
    ):
        assert jargon not in said
    return said


FAULTS = {
    "privacy.epsilon": [
        (0, "must be above 0"),
        (-3.5, "must be above 0"),
        ("8", "must be a number"),
        (math.nan, "above 0"),
    ],
    "privacy.delta": [(0, "must be above 0"), (1, "must be below 1"), (math.nan, "must be ")],
    "privacy.clipping": [("round", "must be 'flat', 'normalise' or 'none'")],
    "privacy.max_noise_multiplier": [(math.inf, "must be finite")],
    "training.rounds": [
        (-1, "must be at least 0"),
        (True, "whole number"),
        ("8", "whole number"),
        (1.5, "whole number"),
    ],
    "training.sampling_rate": [(0, "above 0"), (1.01, "at most 1"), (True, "must be a number"), (math.nan, "must be ")],
    "training.clipping_norm": [
        (0, "above 0"),
        (math.inf, "finite"),
        ("1", "must be a number"),
        ([1], "must be a number"),
    ],
    "training.learning_rate": [(-1e-3, "above 0")],
    "training.momentum": [(1, "below 1"), (-0.1, "at least 0")],
    "training.local_steps": [(0, "at least 1")],
    "training.server_optimizer": [("adamw", "must be 'adam', 'sgd', 'yogi' or 'adagrad'")],
    "training.proximal": [(-1, "at least 0"), (math.inf, "finite")],
    "federation.aggregation": [("krum", "'median', 'trimmed-mean', 'multi-krum' or 'norm-bound'")],
    "compression.update": [("int4", "must be 'none', 'float16', 'int8' or 'top-k'")],
    "compression.keep": [(0, "above 0"), (1.1, "at most 1")],
    "compression.block": [(7, "at least 8"), (2**20 + 1, "at most 1048576"), (64.0, "whole number")],
    "federation.trimmed_share": [(0.5, "below 0.5"), (0, "above 0")],
    "training": [(5, "must be a section of settings"), (None, "must be a section of settings")],
    "model.name": [("", "at least 1 characters"), (3, "must be text")],
    "model.digest": [("abc", "must match")],
    "model.trainable": [("lorra", "must be 'lora', 'full', 'head', 'bias' or 'last'")],
    "model.lora.rank": [(0, "at least 1")],
    "model.lora.targets": [([], "at least 1 items"), (5, "must be a list")],
    "model.lora.layers": [([], "at least 1 items"), ([-1], "at least 0")],
    "task.labels": [(["a"], "at least 2 items"), (["a", "a"], "names a label twice"), ("ab", "must be a list")],
    "task.max_length": [(3, "at least 4"), (8193, "at most 8192")],
    "federation.min_sites": [(0, "at least 1")],
    "federation.deadline": [(0, "above 0"), (math.inf, "finite")],
    "evaluation.confidence_bins": [(0, "at least 1"), (101, "at most 100")],
    "seed": [(-1, "at least 0"), (2**31, "below 2147483648"), (1.0, "whole number")],
    "name": [("Two Words", "must match")],
}


@pytest.mark.parametrize(
    ("key", "value", "limit"), [(k, v, limit) for k, faults in FAULTS.items() for v, limit in faults]
)
def test_a_value_out_of_range_or_kind_is_named_with_its_limit(key, value, limit):
    said = refused({key: value})
    assert key in said
    assert limit in said
    if not isinstance(value, list):
        assert f"={value!r}" in said


@pytest.mark.parametrize("key", ["trainig", "training.round", "privacy.epsilom", "model.lora.rnak", "training.a\nb"])
def test_an_unknown_setting_is_named(key):
    assert f"unknown setting {key!r}" in refused({key: 1})


def test_a_missing_setting_is_named():
    with pytest.raises(ConfigError, match=r"^run.toml: model is missing; task is missing; training is missing\.$"):
        parse(RunConfig, {}, source="run.toml")


def test_several_mistakes_are_one_line():
    said = refused({"privacy.epsilon": -1, "seed": "x", "speed": 3})
    assert all(part in said for part in ("privacy.epsilon=-1", "seed='x'", "unknown setting 'speed'"))


def test_a_long_value_is_cut():
    assert len(refused({"seed": "x" * 100_000})) < 300


COMBINATIONS = {
    "batch and rate": ({"training.batch_size": 8}, ["training: batch_size=8 and sampling_rate=0.1", "exactly one"]),
    "neither": ({"training.sampling_rate": None}, ["batch_size=None and sampling_rate=None", "exactly one"]),
    "no rounds": ({"training.rounds": 0}, ["no phase has a round", "training.rounds"]),
    "a promise without clipping": (
        {"privacy.clipping": "none"},
        ["privacy.clipping='none'", "privacy.epsilon=8", "'flat'"],
    ),
    "a grid without clipping": (
        {"privacy.clipping": "none", "privacy.epsilon": math.inf, "privacy.noise": "discrete"},
        ["privacy.clipping='none'", "privacy.noise='discrete'"],
    ),
    "cohort below quorum": (
        {"federation.sites_per_round": 2, "federation.min_sites": 3},
        ["federation.sites_per_round=2 is below federation.min_sites=3"],
    ),
    "a method of the sites, asked of the server": (
        {"training.server_optimizer": "fedprox"},
        ["training: server_optimizer='fedprox'", "proximal=0.01"],
    ),
    "fedavg with momentum": (
        {"training.server_optimizer": "fedavg", "training.server_momentum": 0.9},
        ["server_optimizer='fedavg'", "server_momentum=0.9", "'fedavgm'"],
    ),
    "a pull on a single step": ({"training.proximal": 0.1}, ["training: proximal=0.1", "local_steps=1"]),
    "a pull beyond the start": (
        {"training.proximal": 4, "training.learning_rate": 0.5, "training.local_steps": 2},
        ["proximal=4 times learning_rate=0.5 must be below 1"],
    ),
    "a rule without its setting": (
        {"federation.aggregation": "multi-krum", "federation.min_sites": 9},
        ["federation.aggregation='multi-krum' needs federation.presumed_bad"],
    ),
    "a setting without its rule": (
        {"federation.norm_bound": 0.5},
        ["federation.norm_bound=0.5 is for federation.aggregation='norm-bound', which is 'mean'"],
    ),
    "too few sites for Krum": (
        {"federation.aggregation": "multi-krum", "federation.presumed_bad": 2, "federation.min_sites": 6},
        ["federation.min_sites=6 is below the 7 updates", "federation.presumed_bad=2", "raise it to 7"],
    ),
    "too few sites for a median": (
        {"federation.aggregation": "median", "federation.min_sites": 2},
        ["federation.min_sites=2 is below the 3 updates that federation.aggregation='median' needs"],
    ),
    "a median of weighted sites": (
        {"federation.aggregation": "median", "federation.min_sites": 3, "federation.weighting": "declared"},
        ["federation.weighting='declared'", "federation.aggregation='median'", "'uniform'"],
    ),
    "a median of what was not sent": (
        {"compression.update": "top-k", "federation.aggregation": "median", "federation.min_sites": 3},
        ["compression.update='top-k'", "federation.aggregation='median'", "'int8'"],
    ),
    "what is left of another's factors": (
        {
            "compression.update": "top-k",
            "model.lora.train_a": True,
            "training.server_optimizer": "sgd",
            "training.server_momentum": 0,
        },
        ["compression.update='top-k'", "model.lora.train_a=true", "'int8'"],
    ),
    "moments of factors": ({"model.lora.train_a": True}, ["training.server_optimizer='adam'", "'fedavg'"]),
    "an average of factors": (
        {"model.lora.train_a": True, "training.server_optimizer": "fedavg", "training.server_average": 0.5},
        ["training.server_average=0.5", "set it to 0"],
    ),
    "a rule that looks at factors apart": (
        {
            "model.lora.train_a": True,
            "training.server_optimizer": "fedavg",
            "federation.aggregation": "norm-bound",
            "federation.norm_bound": 1,
        },
        ["federation.aggregation='norm-bound'", "model.lora.train_a=true", "'mean'"],
    ),
}


@pytest.mark.parametrize(("changes", "said"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_an_impossible_combination_is_refused(changes, said):
    message = refused(changes)
    assert all(part in message for part in said)


def test_a_whole_number_is_a_float_and_infinity_may_be_text():
    assert read(**{"privacy.epsilon": 3}).privacy.epsilon == 3.0
    for text in (math.inf, "inf"):
        config = read(**{"privacy.epsilon": text})
        assert math.isinf(config.privacy.epsilon)
        assert not config.privacy.private
    assert read().privacy.private


@given(
    epsilon=st.floats(1e-3, 1e6) | st.just(math.inf),
    seed=st.integers(0, 2**31 - 1),
    rate=st.floats(1e-9, 1),
    layers=st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=4),
    labels=st.lists(st.text(min_size=1), min_size=2, max_size=4, unique=True),
)
def test_a_configuration_comes_back_from_json_with_the_same_digest(epsilon, seed, rate, layers, labels):
    changes = {"privacy.epsilon": epsilon, "seed": seed, "training.sampling_rate": rate}
    config = parse(RunConfig, merged({**changes, "model.lora.layers": layers, "task.labels": labels}), source="x")
    for again in (
        RunConfig.model_validate_json(config.as_json()),
        parse(RunConfig, json.loads(config.as_json()), source="x"),
        parse(RunConfig, config.as_dict(), source="x"),
    ):
        assert again == config
        assert again.digest == config.digest


def test_the_digest_is_of_what_is_set_and_not_of_how_it_is_written():
    turned = dict(reversed(merged({}).items()))
    defaults = merged({"privacy.delta": 1e-5, "privacy.epsilon": 8})
    assert {parse(RunConfig, v, source="x").digest for v in (merged({}), turned, defaults)} == {read().digest}
    changed = [read(**change).digest for change in ({"seed": 1}, {"privacy.epsilon": 8.1}, {"task.max_length": 95})]
    assert len({read().digest, *changed}) == 4


def test_the_digest_is_the_same_in_every_process():
    code = (
        "import json, sys; from shared.run_config import RunConfig; print(RunConfig(**json.loads(sys.argv[1])).digest)"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(LEAST)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == read().digest


def test_a_configuration_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        read().seed = 3


def test_rounds_belong_to_phases_in_order_and_outside_of_them_is_refused():
    phases = {"warm_start": {"rounds": 2, "batch_size": 8}, "refit": {"rounds": 1, "batch_size": 8, "local_steps": 3}}
    config = read(**phases)
    places = [(config.place(n)[0], config.place(n)[2]) for n in range(1, 8)]
    assert places == [("warm_start", 1), ("warm_start", 2), *(("training", n) for n in range(1, 5)), ("refit", 1)]
    assert config.rounds == 7
    assert config.place(7)[1].steps == 3
    with pytest.raises(ConfigError, match="round 8 is outside the run's 7 rounds"):
        config.place(8)


@given(every=st.integers(1, 12), rounds=st.integers(1, 30))
def test_the_last_round_is_always_evaluated_and_the_plan_counts_them(every, rounds):
    config = read(**{"evaluation.every": every, "training.rounds": rounds})
    evaluated = [n for n in range(1, rounds + 1) if config.evaluated(n)]
    assert evaluated == sorted({*range(every, rounds + 1, every), rounds})
    assert config.evaluations == len(evaluated)


@pytest.mark.parametrize(
    ("name", "optimizer", "rate", "momentum"),
    [
        ("fedavg", "sgd", 1.0, 0.0),
        ("fedavgm", "sgd", 1.0, 0.9),
        ("fedadam", "adam", 5e-3, 0.9),
        ("fedyogi", "yogi", 5e-3, 0.9),
        ("fedadagrad", "adagrad", 5e-3, 0.0),
    ],
)
def test_a_method_by_its_papers_name_is_the_same_run_as_spelt_out(name, optimizer, rate, momentum):
    named = read(**{"training.server_optimizer": name})
    phase = named.training
    assert (phase.server_optimizer, phase.server_learning_rate, phase.server_momentum) == (optimizer, rate, momentum)
    spelt = {"server_optimizer": optimizer, "server_learning_rate": rate, "server_momentum": momentum}
    assert named.digest == read(**{f"training.{key}": value for key, value in spelt.items()}).digest
    assert (
        read(**{"training.server_optimizer": name, "training.server_learning_rate": 0.3}).training.server_learning_rate
        == 0.3
    )


@given(share=st.integers(1, 49), updates=st.integers(3, 200))
def test_trimming_leaves_the_share_out_at_each_end_and_never_all(share, updates):
    settings = {"federation.aggregation": "trimmed-mean", "federation.trimmed_share": share / 100}
    trimmed = read(**settings, **{"federation.min_sites": 3}).federation.trimmed(updates)
    assert updates - 2 * trimmed >= 1
    assert trimmed == min(-(-share * updates // 100), (updates - 1) // 2)


def test_defaults_are_within_their_own_limits():
    assert Privacy().private
    assert Phase(rounds=0).steps == 0


def test_discrete_noise_refuses_a_way_that_has_no_gradients_of_single_records() -> None:
    base = {"model": {"name": "m"}, "task": {"labels": ["a", "b"]}, "training": {"rounds": 1, "batch_size": 2}}
    with pytest.raises(ValueError, match="ghost"):
        RunConfig.model_validate({**base, "privacy": {"noise": "discrete"}, "hardware": {"gradients": "ghost"}})
    RunConfig.model_validate({**base, "privacy": {"noise": "discrete"}})
    RunConfig.model_validate({**base, "hardware": {"gradients": "ghost"}})
