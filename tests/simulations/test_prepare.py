"""The layout of a simulated federation: each site's own folder, and nothing at all after an error."""

import json
import shutil

import pytest

from client import data, site
from server.history.store import History
from server.job import load
from shared import records, tasks
from shared.errors import ConfigError
from shared.run_config import RunConfig
from simulations import prepare, scenario


@pytest.fixture
def history(moonflower_home):
    with History.open("sqlite://") as opened:
        yield opened


def test_a_run_is_laid_out_as_its_coordinator_and_its_sites_see_it(history, tiny_scenario, moonflower_home):
    read = scenario.load(str(tiny_scenario), {})
    run = prepare.prepare(read, history)
    folder = moonflower_home / "runs" / run
    assert prepare.run_folder(run) == folder
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    own = {
        f"sites/{name}/{file}"
        for name in ("north", "south", "west")
        for file in ("site.toml", "records.jsonl", "split.key")
    }
    assert own | {"run.json", "test.jsonl"} <= files
    job = load(folder)
    assert (job.run, job.config, job.config.digest) == (run, read.run_config(), history.run(run).config_digest)
    entered = history.run(run)
    assert (entered.status, entered.rounds_planned, entered.private, entered.name) == ("pending", 5, True, "tiny")
    assert RunConfig.model_validate(entered.config) == job.config


def test_each_site_has_its_own_data_policy_ledger_and_split(history, tiny_scenario):
    run = prepare.prepare(scenario.load(str(tiny_scenario), {}), history)
    nodes = prepare.nodes(run)
    assert list(nodes) == [1, 2, 3]
    sites = [site.load(prepare.Path(str(node["site"]))) for node in nodes.values()]
    assert [own.name for own in sites] == ["north", "south", "west"]
    assert len({own.ledger for own in sites}) == len({own.dataset.path for own in sites}) == 3
    assert len({site.split_key(own) for own in sites}) == 3
    for own in sites:
        assert own.dataset.id == f"tiny.{own.name}"
        assert own.ledger.parent == own.dataset.path.parent == prepare.run_folder(run) / "sites" / own.name
        assert own.dataset.path.read_text() == (tiny_scenario.parent / f"{own.name}.jsonl").read_text()
        assert not own.privacy.allow_non_private


def test_the_split_rests_on_its_own_seed_and_not_on_the_runs(history, tiny_scenario):
    def keys(**settings):
        run = prepare.prepare(scenario.load(str(tiny_scenario), settings), history)
        return [file.read_bytes() for file in sorted(prepare.run_folder(run).rglob("split.key"))]

    assert keys() == keys(seed=5) != keys(**{"data.split_seed": 5})


def test_sites_allow_no_privacy_only_where_the_scenario_asks_for_none(history, tiny_scenario):
    run = prepare.prepare(scenario.load(str(tiny_scenario), {"privacy.epsilon": float("inf")}), history)
    sites = [site.load(prepare.Path(str(node["site"]))) for node in prepare.nodes(run).values()]
    assert all(own.privacy.allow_non_private for own in sites)
    assert history.run(run).private is False


def test_sites_allow_the_runs_own_model_unless_the_scenario_names_others(history, tiny_scenario):
    read = scenario.load(str(tiny_scenario), {})
    run = prepare.prepare(read, history)
    sites = [site.load(prepare.Path(str(node["site"]))) for node in prepare.nodes(run).values()]
    assert {own.privacy.models for own in sites} == {(read.model.name,)}
    for models in ([], ["pypi:*"]):
        other = scenario.load(str(tiny_scenario), {"policy.max_epsilon": 20.0, "policy.models": models})
        with pytest.raises(ConfigError, match=r"is not among this site's models .* the scenario's \[policy\]"):
            prepare.prepare(other, history)


def test_a_run_of_more_releases_than_the_scenarios_sites_allow_is_refused_at_once(history, tiny_scenario):
    def prepared(limit):
        settings = {"policy.max_epsilon": 20.0, "policy.max_releases": limit}
        return prepare.prepare(scenario.load(str(tiny_scenario), settings), history)

    config = scenario.load(str(tiny_scenario), {}).run_config()
    with pytest.raises(ConfigError, match=r"\[privacy\] max_releases\)\. In a simulation the scenario's \[policy\]"):
        prepared(config.rounds + config.evaluations - 1)
    assert prepared(config.rounds + config.evaluations)


@pytest.mark.parametrize("held", ["\u2028", "\x85", "\x1d", "\u2029 and \x0b", "ü 😀"])
def test_a_text_with_any_character_is_one_record(history, tiny_scenario, tmp_path, held):
    folder = tmp_path / "data"
    shutil.copytree(tiny_scenario.parent, folder)
    for name in ("north", "test"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
        rows[3]["text"] = f"good{held}bad"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    read = scenario.load(str(folder / "tiny.toml"), {})
    run = prepare.prepare(read, history)
    north = site.load(prepare.Path(str(prepare.nodes(run)[1]["site"])))
    task = tasks.of(read)
    found = list(data.read(north.dataset, task))
    assert len(found) == 60
    assert found[3].values["text"] == f"good{held}bad"
    test = records.read(prepare.run_folder(run) / "test.jsonl", task, identified=False)
    assert test[3].values["text"] == f"good{held}bad"


def test_a_run_that_cannot_be_entered_leaves_no_folder(history, tiny_scenario, moonflower_home):
    history.close()
    with History.open("sqlite://") as broken:
        with broken._engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE runs")
        with pytest.raises(Exception, match="runs"):
            prepare.prepare(scenario.load(str(tiny_scenario), {}), broken)
    assert list((moonflower_home / "runs").iterdir()) == []


def test_a_site_that_is_no_domain_of_the_vader_data_is_named(history):
    sites = [{"name": "telegrams", "records": 100}]
    read = scenario.load("vader", {"sites": sites, "federation.min_sites": 1})
    with pytest.raises(ConfigError, match=r"'telegrams' is not a domain of the vader data \(tweets, film-reviews"):
        prepare.prepare(read, history)


@pytest.mark.parametrize(
    ("count", "rounded"), [(60, 60), (7, 7), (123, 120), (8072, 8100), (2753, 2800), (99_500, 100_000)]
)
def test_a_size_is_rounded_to_two_digits(count, rounded):
    assert abs(prepare._rounded(count) - rounded) <= 500 * (count > 90_000)
    assert abs(prepare._rounded(count) - count) <= prepare.ROUNDING * count
