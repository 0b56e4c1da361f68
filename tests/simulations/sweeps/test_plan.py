"""What a sweep's command comes to: cells, seeds, and one line for every mistake before anything runs."""

import json
import math
import os
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError
from simulations import scenario
from simulations.sweeps.plan import Plan, read_axis, read_seeds


@pytest.fixture
def plan(tiny_scenario):
    def make(*grid, seeds=None, settings=(), device=None, file=tiny_scenario):
        return Plan.make(str(file), settings, grid, seeds, device)

    return make


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("privacy.epsilon=1,3,8", "privacy.epsilon", ("1", "3", "8")),
        ("privacy.epsilon=8, inf", "privacy.epsilon", ("8", "inf")),
        ("lora.rank=4", "model.lora.rank", ("4",)),
        ("model.trainable=lora,head", "model.trainable", ("lora", "head")),
        ("model.lora.targets=['query'],['query', 'value']", "model.lora.targets", ("['query']", "['query', 'value']")),
        ("""name="a,b",'c,d'""", "name", ('"a,b"', "'c,d'")),
        ("data.columns={text = 'a', label = 'b'},{}", "data.columns", ("{text = 'a', label = 'b'}", "{}")),
    ],
)
def test_an_axis_is_read_as_texts_that_set_takes(text, key, values):
    assert read_axis(text) == (key, values)


@given(st.lists(st.one_of(st.integers(), st.lists(st.integers(), max_size=3)), min_size=1, max_size=5, unique_by=str))
def test_every_value_of_an_axis_is_read_back(values):
    key, texts = read_axis(f"seeds-of={','.join(map(json.dumps, values))}")
    assert [scenario.override(f"{key}={text}")[1] for text in texts] == values


@pytest.mark.parametrize(
    ("text", "seeds"), [(None, (7,)), ("3", (7, 8, 9)), ("1,5,9", (1, 5, 9)), ("4,", (4,)), (" 2 , 0 ", (2, 0))]
)
def test_seeds_are_counted_from_the_scenarios_own_or_named(text, seeds):
    assert read_seeds(text, 7) == seeds


MISTAKES = {
    "no value": (["privacy.epsilon"], None, "--grid 'privacy.epsilon' is not KEY=VALUE,VALUE"),
    "no key": (["=1,2"], None, "is not KEY=VALUE,VALUE"),
    "an empty value": (["privacy.epsilon=1,,8"], None, "is not KEY=VALUE,VALUE"),
    "a comma at the end": (["privacy.epsilon=1,"], None, "is not KEY=VALUE,VALUE"),
    "a value twice": (["privacy.epsilon=1,3,1"], None, "has the value 1 twice"),
    "a value twice, written otherwise": (["privacy.epsilon=8,8.0"], None, "is the same as cell 1 (privacy.epsilon=8)"),
    "a key twice": (["privacy.epsilon=1", "epsilon=3"], None, "--grid names privacy.epsilon twice"),
    "a key that is set": (["refit.rounds=1,2"], None, "refit.rounds is given by --set and by --grid"),
    "seeds as an axis": (["seed=1,2"], None, "seeds are given by --seeds"),
    "a key of several sections": (["sampling_rate=0.1"], None, "sampling_rate may be refit.sampling_rate or "),
    "an unknown key": (["privacy.epsilom=1"], None, "cell 1 (privacy.epsilom=1), seed 0: tiny.toml: unknown setting"),
    "one bad value": (
        ["privacy.epsilon=1,3,-8", "lora.rank=2,4"],
        None,
        "cell 5 (privacy.epsilon=-8, model.lora.rank=2), seed 0: tiny.toml: privacy.epsilon=-8 must be above 0",
    ),
    "values at odds": (
        ["federation.min_sites=2,4"],
        None,
        "cell 2 (federation.min_sites=4), seed 0: tiny.toml: federation.min_sites=4 is above the 3 sites",
    ),
    "no seeds": ([], "0", "--seeds 0 must be 1 to 1000"),
    "seeds in words": ([], "three", "--seeds 'three' is neither a number of seeds nor a list"),
    "a negative seed": ([], "1,-5", "is neither a number of seeds nor a list"),
    "a seed twice": ([], "1,1", "--seeds 1,1 names a seed twice"),
    "a seed too large": ([], f"{2**31},", f"seed {2**31}: tiny.toml: seed={2**31} must be below"),
}


@pytest.mark.parametrize(("grid", "seeds", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_names_the_option_or_the_cell(plan, grid, seeds, said):
    with pytest.raises(ConfigError) as caught:
        plan(*grid, seeds=seeds, settings=["refit.rounds=0"])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_cells_are_every_combination_and_each_runs_once_before_any_runs_twice(plan):
    made = plan("privacy.epsilon=1,8", "lora.rank=2,4", seeds="2")
    assert [cell.values for cell in made.cells] == [
        {"privacy.epsilon": epsilon, "model.lora.rank": rank} for epsilon in (1, 8) for rank in (2, 4)
    ]
    assert made.places == [(cell, seed) for seed in (0, 1) for cell in (1, 2, 3, 4)]
    read = made.of(made.cells[2], 1)
    assert (read.privacy.epsilon, read.model.lora.rank, read.seed) == (8, 2, 1)


def test_without_a_grid_there_is_one_cell(plan):
    made = plan(seeds="2")
    assert [cell.settings for cell in made.cells] == [{}]
    assert made.places == [(1, 0), (1, 1)]


def test_the_same_command_is_the_same_sweep_from_anywhere_and_another_is_not(
    plan, tiny_scenario, tmp_path, monkeypatch
):
    first = plan("privacy.epsilon=1,8", seeds="2")
    monkeypatch.chdir(tiny_scenario.parent)
    assert plan("epsilon=1,8", seeds="0,1", file="tiny.toml") == first
    assert plan("epsilon=1,8", seeds="0,1", file="tiny.toml").digest == first.digest
    assert plan("epsilon=1,8", seeds="2", settings=["privacy.noise=gaussian"]).digest == first.digest  # the default
    others = [
        plan("privacy.epsilon=1,3", seeds="2"),
        plan("privacy.epsilon=1,8", seeds="3"),
        plan("privacy.epsilon=1,8", seeds="2", settings=["training.rounds=1"]),
        plan("privacy.epsilon=1,8", seeds="2", device="cpu"),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 5


def test_a_plan_is_kept_as_json_and_read_back(plan):
    made = plan("privacy.epsilon=8,inf", seeds="2", settings=["training.rounds=2"], device="cpu")
    again = Plan.from_dict(json.loads(json.dumps(made.as_dict())))
    assert (again, again.digest) == (made, made.digest)
    assert again.of(again.cells[1], 1).privacy.epsilon == math.inf
    again.check_unchanged()


def test_a_scenario_that_has_changed_is_not_gone_on_with(plan, tiny_scenario, tmp_path):
    file = tmp_path / "mine.toml"
    text = tiny_scenario.read_text(encoding="utf-8").replace('folder = "."', f'folder = "{tiny_scenario.parent}"')
    file.write_text(text, encoding="utf-8")
    made = plan("privacy.epsilon=1,8", file=file)
    file.write_text(text.replace("local_steps = 2", "local_steps = 3"), encoding="utf-8")
    with pytest.raises(ConfigError, match="is not what it was when the sweep was made"):
        made.check_unchanged()
    file.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        made.check_unchanged()


def test_the_command_of_a_run_gives_its_configuration_again_from_anywhere(plan, tiny_scenario, tmp_path, monkeypatch):
    """Read as `moonflower simulate` reads it, in another folder."""
    monkeypatch.chdir(tiny_scenario.parent)
    grid = ["privacy.epsilon=3,inf", "model.lora.targets=['query'],['query', 'value']", "model.trainable=lora,head"]
    made = plan(*grid, seeds="2", settings=["data.folder=.", "name=another"], file="tiny.toml", device="cpu")
    (tmp_path / "elsewhere").mkdir()
    for cell, seed in made.places:
        monkeypatch.chdir(tiny_scenario.parent)
        expected = made.of(made.cells[cell - 1], seed)
        monkeypatch.chdir(tmp_path / "elsewhere")
        words = shlex.split(shlex.join(made.command(made.cells[cell - 1], seed)))
        assert words[:2] == ["moonflower", "simulate"]
        settings = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
        assert words[words.index("--device") + 1] == "cpu"
        overrides = dict(scenario.override(text) for text in settings) | {"seed": int(words[words.index("--seed") + 1])}
        read = scenario.load(words[2], overrides)
        assert read.run_config().digest == expected.run_config().digest
        assert read.data.folder is not None
        assert expected.data.folder is not None
        assert Path(os.path.normpath(read.data.folder)) == Path(os.path.normpath(expected.data.folder.absolute()))
