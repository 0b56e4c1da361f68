"""Scenario files and `--set`: what is read, and one line for what cannot be."""

import math
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError
from shared.run_config import RunConfig
from simulations import scenario

BUILT_IN = sorted(item.name.removesuffix(".toml") for item in (files("simulations") / "scenarios").iterdir())


def complaint(call, *arguments):
    """Give the text of the ConfigError, empty where there is none."""
    try:
        call(*arguments)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_scenario_is_valid_private_and_named_as_its_file(name):
    read = scenario.load(name, {} if name.startswith("vader") else {"data.folder": "records"})
    assert read.privacy.private
    assert name.startswith(read.name) or read.name.startswith(name)
    assert isinstance(read.run_config(), RunConfig)


def test_what_travels_is_the_run_without_its_sites_and_data():
    read = scenario.load("vader", {"seed": 3})
    config = read.run_config()
    assert type(config) is RunConfig
    assert config.seed == 3
    assert set(config.as_dict()) == set(RunConfig.model_fields)
    assert not {"sites", "data", "policy"} & set(config.as_dict())


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("training.rounds=3", "training.rounds", 3),
        ("training.learning_rate=1e-3", "training.learning_rate", 1e-3),
        ("privacy.epsilon=inf", "privacy.epsilon", math.inf),
        ("model.lora.targets=['a', 'b']", "model.lora.targets", ["a", "b"]),
        ("name=plain-text", "name", "plain-text"),
        ("name='quoted'", "name", "quoted"),
        ("training.rounds='3'", "training.rounds", "3"),
        ("a.b=true", "a.b", True),
        ("a=x=y", "a", "x=y"),
        (" a = 1", "a", 1),
        ("a=", "a", ""),
        ("a=1\nb=2", "a", "1\nb=2"),
        ("lora.rank=4", "model.lora.rank", 4),
        ("epsilon=3", "privacy.epsilon", 3),
    ],
)
def test_a_setting_is_toml_or_else_text(text, key, value):
    assert scenario.override(text) == (key, value)


@pytest.mark.parametrize("text", ["", "=", "=3", "training.rounds", "  =1"])
def test_a_setting_without_a_key_or_a_value_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"is not KEY=VALUE, as in --set training.learning_rate=1e-3"):
        scenario.override(text)


@given(text=st.text(max_size=30))
def test_any_text_is_a_setting_or_one_clear_line(text):
    said = complaint(scenario.override, text)
    assert said.isprintable()
    assert said or scenario.override(text)[0].strip()


@given(key=st.text(alphabet="abcdeprivacytn._0", min_size=1, max_size=12), value=st.integers() | st.text(max_size=5))
def test_whatever_is_set_gives_a_scenario_or_one_clear_line(key, value):
    assert complaint(scenario.load, "vader", {key: value}).isprintable()


def test_settings_lie_on_top_of_the_file_and_leave_the_rest():
    before, after = scenario.load("vader", {}), scenario.load("vader", {"training.rounds": 2, "privacy.epsilon": 3})
    assert (after.training.rounds, after.privacy.epsilon) == (2, 3.0)
    assert after.training.sampling_rate == before.training.sampling_rate
    assert after.warm_start == before.warm_start


def test_a_folder_is_beside_the_file(tiny_scenario, monkeypatch):
    monkeypatch.chdir(Path("/"))
    assert scenario.load(str(tiny_scenario), {}).data.folder == tiny_scenario.parent


def test_sites_that_share_a_name_or_are_too_few_are_refused():
    site = {"name": "tweets", "records": 100}
    with pytest.raises(ConfigError, match="names a site twice"):
        scenario.load("vader", {"sites": [site, site]})
    with pytest.raises(ConfigError, match=r"federation.min_sites=4 is above the 1 sites"):
        scenario.load("vader", {"sites": [site]})
    with pytest.raises(ConfigError, match=r"sites.0.name='Not A Name' must match"):
        scenario.load("vader", {"sites": [{"name": "Not A Name", "records": 100}]})
    with pytest.raises(ConfigError, match=r"data.folder is needed with source='folder', and only then"):
        scenario.load("vader", {"data.source": "folder"})


@pytest.mark.parametrize("name", ["", "nothing", "vader.tml", "../scenarios/nothing"])
def test_an_unknown_name_is_answered_with_those_that_are_built_in(name):
    with pytest.raises(ConfigError) as error:
        scenario.load(name, {})
    assert "vader" in str(error.value)
    assert str(error.value).isprintable()


def test_a_setting_without_a_value_is_taken_out_so_that_another_can_stand_in_its_place():
    phase = scenario.load("vader", {"training.sampling_rate": "", "training.batch_size": 200}).training
    assert (phase.sampling_rate, phase.batch_size) == (None, 200)


def test_a_folder_is_relative_to_the_file_that_names_it_or_to_where_the_command_is_given(tmp_path, monkeypatch):
    text = (files("simulations") / "scenarios" / "text-classification.toml").read_text(encoding="utf-8")
    (tmp_path / "own.toml").write_text(text.replace('source = "folder"', 'source = "folder"\nfolder = "records"'))
    assert scenario.load(str(tmp_path / "own.toml"), {}).data.folder == tmp_path / "records"
    monkeypatch.chdir(tmp_path)
    assert scenario.load("text-classification", {"data.folder": "mine"}).data.folder.absolute() == tmp_path / "mine"


def test_a_built_in_scenario_without_data_says_how_to_give_them():
    with pytest.raises(ConfigError, match=r"--set data\.folder=DIR"):
        scenario.load("causal-lm", {})


def test_the_end_of_several_settings_names_none_of_them():
    assert complaint(scenario.override, "sampling_rate=0.1") == (
        "sampling_rate may be refit.sampling_rate or training.sampling_rate or warm_start.sampling_rate; name it in full."
    )
