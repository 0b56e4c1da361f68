"""Planning a run: its numbers are the sites' own, and a mistake is one line before any work."""

import json
import math
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from client.privacy.ledger import Ledger
from client.privacy.noise import Grid
from server.privacy import plan_request, planning
from server.privacy.plan_request import Options
from shared import accounting, plan
from shared.accounting import Release
from shared.errors import ConfigError, PolicyError
from simulations import scenario

MOONFLOWER = str(Path(sys.executable).parent / "moonflower")
VADER = Path(scenario.__file__).parent / "scenarios" / "vader.toml"
EPOCHS = Options(records=["2000"], rounds=50, local_steps=31, rate=64 / 2000, delta=1e-5)  # 31 steps: one local epoch


def make(options, path=None):
    return planning.make(plan_request.read(path, options))


def call(*arguments):
    return subprocess.run(
        [MOONFLOWER, "privacy", "plan", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_fifty_rounds_of_2000_records_at_noise_1_cost_8_4_so_8_4_needs_noise_1():
    rate, steps = 64 / 2000, 31
    assert accounting.epsilon([Release(rate, 1.0, steps)] * 50, 1e-5) == pytest.approx(8.4, abs=0.05)
    (row,) = make(Options(**{**vars(EPOCHS), "epsilon": 8.4})).sites
    assert (row.sampling_rate, row.steps) == (rate, 1550)
    assert row.noise == pytest.approx(1.0, abs=0.005)


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 8.4])
def test_the_planned_noise_composes_to_the_target_at_most_and_within_a_percent(epsilon):
    planned = make(Options(**{**vars(EPOCHS), "epsilon": epsilon}))
    (row,) = planned.sites
    spent = accounting.epsilon([Release(row.sampling_rate, row.noise, 31)] * 50, 1e-5)
    assert 0.99 * epsilon <= spent <= epsilon
    assert planned.reached[-1].round == 50
    assert planned.reached[-1].epsilon_train == pytest.approx(spent, rel=1e-9)
    assert 0.99 * epsilon <= planned.reached[-1].epsilon_validation <= epsilon


def test_epsilon_by_rounds_is_what_the_rounds_so_far_compose_to():
    planned = make(Options(**{**vars(EPOCHS), "epsilon": 8.0, "evaluate_every": 20}))
    noise = planned.sites[0].noise
    assert [point.round for point in planned.reached] == [1, 2, 5, 10, 20, 50]
    for point in planned.reached:
        expected = accounting.epsilon([Release(64 / 2000, noise, 31 * point.round)], 1e-5)
        assert point.epsilon_train == pytest.approx(expected, rel=1e-9)
    assert [point.epsilon_validation > 0 for point in planned.reached] == [False] * 4 + [True] * 2


def test_half_the_epsilon_takes_the_noise_that_a_plan_for_half_the_epsilon_names():
    whole, half = (make(Options(**{**vars(EPOCHS), "epsilon": epsilon})) for epsilon in (6.0, 3.0))
    less, same, more = whole.trades
    assert (less.epsilon, same.epsilon, more.epsilon) == (3.0, 6.0, 12.0)
    assert less.noise == half.sites[0].noise > same.noise == whole.sites[0].noise > more.noise
    assert less.times == pytest.approx(less.noise / same.noise)
    assert less.noise_per_coordinate == pytest.approx(less.noise / (64 * 0.9))  # the batch drawn from 1800 of 2000
    assert whole.sites[0].noise_per_coordinate == same.noise_per_coordinate


def test_a_scenario_is_planned_as_its_sites_will_plan_it():
    read = scenario.load(str(VADER), {})
    planned = make(Options(max_epsilon=20.0), VADER)
    rows = {(row.site, row.phase): row for row in planned.sites}
    assert len(rows) == 12
    for site in read.sites:
        card = plan.DatasetCard(site.name, site.records, read.data.validation)
        theirs = plan.make(read.run_config(), card)
        for name, phase in theirs.phases.items():
            row = rows[site.name, name]
            assert (row.noise, row.sampling_rate, row.batch) == (
                phase.noise_multiplier,
                phase.sampling_rate,
                phase.divisor,
            )
            assert row.steps == phase.rounds * phase.steps_per_round
    assert (planned.site, planned.phase) == ("editorials", "training")  # the smallest site's mean is the noisiest
    assert {10, 26, 36} <= {point.round for point in planned.reached}  # where its phases end


def test_discrete_noise_is_planned_with_the_rounding_that_it_covers(tmp_path):
    file = tmp_path / "discrete.toml"
    text = VADER.read_text().replace("delta = 1e-5", 'delta = 1e-5\nnoise = "discrete"\ngrid = 0.5')
    file.write_text(text)
    read = scenario.load(str(file), {})
    row = next(row for row in make(Options(records=["2300"]), file).sites if row.phase == "training")
    theirs = plan.make(read.run_config(), plan.DatasetCard("site-1", 2300, 0.1)).phases["training"]
    assert row.noise == theirs.noise_multiplier
    assert row.noise_per_coordinate == pytest.approx(1.25 * row.noise / row.batch)
    grid = Grid.of(1.5, 100_000, 0.5)  # what the site adds noise for, in steps of its grid
    assert grid.sensitivity * grid.step / 1.5 == pytest.approx(1.25)


def test_a_round_within_a_later_phase_counts_the_phases_before_it():
    request = plan_request.read(VADER, Options())
    card = request.cards[0]
    theirs = plan.make(request.config, card)
    steps = [release.steps for release in planning.releases(request.config, theirs, "train", 12)]
    assert steps == [30, 2]
    assert [r.steps for r in planning.releases(request.config, theirs, "train", 36)] == [30, 16, 30]
    assert [r.steps for r in planning.releases(request.config, theirs, "validation", 7)] == [7]


def test_the_share_of_a_lifetime_is_the_ledgers_own_filter(tmp_path):
    request = plan_request.read(None, Options(**{**vars(EPOCHS), "epsilon": 4.0, "max_epsilon": 20.0}))
    (life,) = planning.make(request).lifetime
    assert 0 < life.share < 1
    assert life.runs == math.floor(1 / life.share)
    planned = plan.make(request.config, request.cards[0])
    with Ledger.open(tmp_path / "ledger.db", dataset="notes", delta=1e-5, max_epsilon=20.0) as ledger:
        assert ledger.order == life.order
        refused = []
        for part in ("train", "validation"):
            ledger.check_plan(planned.releases(part) * life.runs, part)
            try:
                ledger.check_plan(planned.releases(part) * (life.runs + 1), part)
            except PolicyError:
                refused.append(part)
    assert refused  # one run more does not fit, in the part that costs most


@pytest.mark.parametrize(
    ("records", "delta"), [(10, 1e-5), (2000, 1e-5), (10_000, 1e-5), (10_001, 1e-6), (99_999, 1e-6), (3_000_000, 1e-8)]
)
def test_a_plan_without_delta_takes_a_power_of_ten_that_every_site_accepts(records, delta):
    assert plan_request.default_delta(records) == delta
    assert delta <= 1 / (10 * records)


def test_options_go_on_top_of_a_file_and_a_batch_replaces_a_rate():
    request = plan_request.read(VADER, Options(batch=100, epsilon=2.0, records=["north=5000", "6000"]))
    assert (request.config.training.batch_size, request.config.training.sampling_rate) == (100, None)
    assert request.config.warm_start.sampling_rate == 1.0
    assert (request.config.privacy.epsilon, request.config.privacy.delta) == (2.0, 1e-5)
    assert [(card.dataset, card.records) for card in request.cards] == [("north", 5000), ("site-2", 6000)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "a plan needs --records, --rounds and one of --batch and --rate"),
        ({"records": ["2000"], "rounds": 5}, "one of --batch and --rate"),
        ({"batch": 64, "rate": 0.1}, "a plan needs"),
        ({"records": ["many"], "rounds": 5, "batch": 64}, "--records 'many' is not N or NAME=N"),
        ({"records": ["9"], "rounds": 5, "batch": 64}, "--records '9' must be at least 10"),
        ({"records": ["a=50", "a=60"], "rounds": 5, "batch": 4}, "names a site twice"),
        ({"records": ["A B=50"], "rounds": 5, "batch": 4}, r"sites.0.name='A B' must match"),
        ({"records": ["2000"], "rounds": 5, "batch": 1801}, "training.batch_size=1801 is above the 1800 training"),
        ({"records": ["2000"], "rounds": 5, "rate": 1.5}, "training.sampling_rate=1.5 must be at most 1"),
        ({"records": ["2000"], "rounds": 5, "batch": 64, "epsilon": -1.0}, "privacy.epsilon=-1.0 must be above 0"),
        ({"records": ["2000"], "rounds": 5, "batch": 64, "epsilon": math.inf}, "epsilon=inf is no privacy"),
        ({"records": ["2000"], "rounds": 5, "batch": 64, "delta": 1e-4}, r"delta=0.0001 is above 1/\(10 x records\)"),
        ({"records": ["2000"], "rounds": 5, "batch": 64, "validation": 0.9}, "data.validation=0.9 must be at most"),
        ({"records": ["2000"], "rounds": 5, "batch": 64, "max_epsilon": 0.0}, "policy.max_epsilon=0.0 must be above 0"),
    ],
)
def test_what_cannot_be_planned_is_one_line(options, said):
    with pytest.raises(ConfigError, match=said) as refused:
        make(Options(**options))
    assert "\n" not in str(refused.value)


def test_a_file_at_fault_is_one_line(tmp_path):
    file = tmp_path / "run.toml"
    for text, said in (
        ("[training", "is not TOML"),
        ("[training]\nroundz = 5", "unknown setting 'training.roundz'"),
        ('model = {name = "m"}\ntask = {labels = ["a", "b"]}\ntraining = {rounds = 1, batch_size = 5}', "no .*sites"),
        ("training = 3", "must be a section"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said) as refused:
            make(Options(epsilon=3.0), file)
        assert "\n" not in str(refused.value)


def test_a_scenario_of_a_pool_is_planned_for_the_sizes_that_are_given(tmp_path):
    many = VADER.with_name("vader-many.toml")
    with pytest.raises(ConfigError, match=r"those of a \[partition\], with --records N"):
        make(Options(), many)
    planned = make(Options(records=["small=50", "large=500"]), many)
    config = scenario.load("vader-many", {}).run_config()
    for row, size in zip(planned.sites, (50, 500), strict=True):
        assert row.noise == plan.make(config, plan.DatasetCard(row.site, size, 0.1)).phases["training"].noise_multiplier


def test_noise_that_the_run_would_refuse_is_planned_and_said():
    planned = make(Options(records=["20000"], rounds=2000, rate=1.0, epsilon=1.0))
    assert planned.sites[0].noise > 20
    assert re.search(r"above privacy.max_noise_multiplier=20: raise that setting", planned.remarks[0])
    assert make(Options(records=["20000"], rounds=2, rate=1.0, epsilon=1.0)).remarks == []


def test_the_command_prints_tables_or_json_with_the_same_numbers():
    given = [
        "--records",
        "north=2000",
        "--records",
        "south=4000",
        "--rounds",
        "50",
        "--batch",
        "64",
        "--max-epsilon",
        "9",
    ]
    table, text = call(*given), call(*given, "--format", "json")
    assert (table.returncode, text.returncode, table.stderr, text.stderr) == (0, 0, "", "")
    read = json.loads(text.stdout)
    assert [row["site"] for row in read["sites"]] == ["north", "south"]
    for number in (read["sites"][1]["noise"], read["trades"][0]["noise"], read["lifetime"][0]["share"]):
        assert f"{number:.6g}" in table.stdout
    assert "Epsilon by rounds, at site north" in table.stdout


def test_the_whole_command_takes_under_three_seconds_of_one_processor():
    before = sum(_children())
    assert call("--records", "2000", "--rounds", "50", "--local-steps", "31", "--batch", "64").returncode == 0
    assert sum(_children()) - before < 3.0


def _children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime, used.ru_stime


def test_a_plan_imports_neither_torch_nor_the_database_nor_matplotlib():
    code = (
        "import sys; sys.argv = 'moonflower privacy plan --records 2000 --rounds 5 --batch 64'.split()\n"
        "from shared.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: code = done.code\n"
        "print(code, *sorted({'torch', 'flwr', 'sqlalchemy', 'matplotlib', 'opacus', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"


@pytest.mark.parametrize(("name", "start"), [("plan.svg", b"<?xml"), ("plan.png", b"\x89PNG")])
def test_the_picture_is_written(tmp_path, name, start):
    done = call("--records", "2000", "--rounds", "5", "--batch", "64", "--plot", str(tmp_path / name))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("name", "said"), [("plan.pdf", "must end in .svg or .png"), ("no/plan.svg", "its folder does not exist")]
)
def test_a_picture_that_cannot_be_written_is_refused_before_any_work(tmp_path, name, said):
    done = call("--records", "2000", "--rounds", "5", "--batch", "64", "--plot", str(tmp_path / name))
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
