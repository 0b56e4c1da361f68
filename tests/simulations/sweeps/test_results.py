"""What a sweep came to, against numbers worked out by other means, and how it is shown."""

import csv
import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError
from simulations.sweeps import results

T = {2: 12.7062047364, 3: 4.30265272991, 5: 2.7764451052}  # 97.5 % points of n - 1 degrees of freedom, from a table
SCORES = {(1, 0): 0.60, (1, 1): 0.62, (1, 2): 0.70, (2, 0): 0.80, (2, 1): 0.85, (2, 2): 0.81}


def expected(values):
    mean, half = statistics.fmean(values), T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


@pytest.fixture
def two_cells(studied):
    """Make a sweep of two cells, three seeds each, all of it done."""
    made = studied("privacy.epsilon=1,8")
    for (cell, seed), score in SCORES.items():
        made.run(cell, seed, [0.5, score], epsilon=(1.0, 8.0)[cell - 1] - 0.01 * seed, loss=1 - score, records=40)
    return made


def read(made, asked=None, failed=None):
    return results.read(made.history, made.id, made.plan, asked, failed or {})


@pytest.mark.parametrize("count", T)
@given(st.data())
def test_the_interval_is_students(count, data):
    values = data.draw(st.lists(st.floats(-10, 10), min_size=count, max_size=count))
    assert results.interval(values) == pytest.approx(expected(values)[1:], rel=1e-9, abs=1e-9)


def test_an_interval_of_one_score_or_none_is_not_made_up():
    assert results.interval([0.5]) is None
    assert results.interval([]) is None


def test_a_cells_score_is_the_mean_of_its_seeds_last_rounds(two_cells):
    rows = read(two_cells).rows
    for row in rows:
        of_cell = [score for (cell, _), score in SCORES.items() if cell == row.cell.number]
        mean, *ends = expected(of_cell)
        assert row.mean == pytest.approx(mean)
        assert row.interval == pytest.approx(tuple(ends))
        assert (row.rounds, row.seconds, row.completed) == (2, 3.0, 3)
    assert [row.epsilon for row in rows] == [1.0, 8.0]  # the largest of a cell's runs
    assert rows[0].trials[2].course == {1: 0.5, 2: 0.70}


def test_the_best_cell_has_the_best_mean_and_names_its_best_run(two_cells):
    found = read(two_cells)
    row, trial = found.best
    assert (row.cell.number, trial.run, trial.value) == (2, "tiny-2-1", 0.85)


def test_of_a_loss_the_lowest_is_the_best(two_cells):
    row, trial = read(two_cells, "loss").best
    assert (row.cell.number, trial.run) == (2, "tiny-2-1")
    assert read(two_cells, "loss").score.title == "loss"


def test_cells_whose_intervals_overlap_are_rivals(studied):
    made = studied("privacy.epsilon=1,3,8", seeds="2")
    for cell, scores in {1: (0.2, 0.21), 2: (0.6, 0.7), 3: (0.7, 0.72)}.items():
        for seed, score in enumerate(scores):
            made.run(cell, seed, [score])
    found = read(made)
    assert found.best[0].cell.number == 3
    assert [rival.cell.number for rival in found.rivals] == [2]


def test_a_run_that_is_not_done_or_failed_has_no_score_and_the_others_stand(studied):
    made = studied("privacy.epsilon=1,8")
    made.run(1, 0, [0.9, 0.6])
    made.run(1, 1, [0.9], end="failed")
    made.run(1, 2, [0.9], end="stopped")
    made.run(2, 0, [0.8])
    found = read(made, failed={(2, 1): "noise above the most", (2, 2): "noise above the most"})
    first, second = found.rows
    assert (first.mean, first.interval, first.completed) == (0.6, None, 1)
    assert first.faults == [("the disk is full", [1])]
    assert [trial.status for trial in first.trials] == ["completed", "failed", "stopped"]
    assert second.faults == [("noise above the most", [1, 2])]
    assert [trial.run for trial in second.trials] == ["tiny-2-0", None, None]
    assert found.completed == 2


def test_a_score_that_is_not_finite_is_never_the_best(studied):
    made = studied("privacy.epsilon=1,8", seeds="1")
    made.run(1, 0, [0.9], loss=math.nan)
    made.run(2, 0, [0.1], loss=0.3)
    assert read(made, "loss").best[1].run == "tiny-2-0"
    assert math.isnan(read(made, "loss").rows[0].mean)


def test_without_asking_the_most_telling_score_counts_and_of_the_test_set_where_there_is_one(studied):
    made = studied(seeds="2")
    made.run(1, 0, [0.4], scope="validation")
    assert (read(made).score.scope, read(made).score.title) == ("validation", "validation accuracy")
    made.run(1, 1, [0.9], f1=0.8)
    assert (read(made).score.scope, read(made).score.name) == ("test", "accuracy")
    assert read(made, "validation/accuracy").rows[0].values == [0.4]  # of all sites, not of one


def test_a_score_that_no_run_has_is_answered_with_those_that_there_are(two_cells):
    with pytest.raises(ConfigError, match="--metric f1: the runs have no such score; they have accuracy, loss"):
        read(two_cells, "f1")


def test_the_command_prints_the_table_of_a_sweep_that_is_done_and_runs_nothing(two_cells, moonflower, tmp_path):
    code, out, err = moonflower("sweep", "--resume", two_cells.id, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "6 done already; nothing is left to run" in out
    (line,) = [line.split() for line in out.splitlines() if line.startswith("   2 ")]
    mean, low, high = expected([0.80, 0.85, 0.81])
    assert line == ["2", "8", f"{mean:.4f}", f"{low:.3f}", "to", f"{high:.3f}", "8.00", "2", "3.0", "3"]
    command = f"moonflower simulate {two_cells.plan.scenario} --set privacy.epsilon=8 --seed 1"
    assert command in [line.strip() for line in out.splitlines()]
    assert "A study: scores of a public test set cost no privacy; the 6 runs were charged in full" in out
    for name in ("scores.png", "rounds.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "out" / "sweep.csv").open(newline="") as stream:
        first, second = csv.DictReader(stream)
    assert (first["privacy.epsilon"], second["cell"]) == ("1", "2")
    assert [float(second[name]) for name in ("mean", "low", "high")] == pytest.approx([mean, low, high])
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["best"]["run"] == "tiny-2-1"


def test_a_cell_that_fails_is_said_with_its_reason_and_tried_again_with_the_same_words(studied, moonflower):
    made = studied("privacy.epsilon=8,0.01", seeds="1", settings=["privacy.max_noise_multiplier=5"])
    made.run(1, 0, [0.8])
    code, out, err = moonflower("sweep", "--resume", made.id)
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith("Error: 1 of 2 runs failed, as said above; ")
    assert line.endswith(f"try them again with: moonflower sweep --resume {made.id}")
    reason = next(
        line for line in out.splitlines() if line.startswith("cell 2 (privacy.epsilon=0.01), seed 0 failed: ")
    )
    assert "above privacy.max_noise_multiplier=5" in reason
    assert "Best accuracy: cell 1 (privacy.epsilon=8), 0.8000 over 1 seed." in out
    assert [run.id for run in made.history.runs()] == ["tiny-1-0"]


def test_json_is_strict_and_on_standard_output_alone_and_quiet_is_the_id(studied, moonflower):
    made = studied("privacy.epsilon=inf", seeds="1")
    made.run(1, 0, [0.9], epsilon=math.inf, loss=math.nan)
    code, out, err = moonflower("sweep", "--resume", "last", "--format", "json", "--metric", "loss")
    assert code == 0, err
    said = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (cell,) = said["cells"]
    assert (cell["settings"], cell["epsilon"], cell["mean"]) == ({"privacy.epsilon": "inf"}, "inf", "nan")
    assert (said["sweep"], said["best"], said["metric"]) == (made.id, None, {"scope": "test", "name": "loss"})
    assert moonflower("sweep", "--resume", "last", "--quiet") == (0, f"{made.id}\n", "")


def test_what_is_chosen_by_validation_scores_is_said_to_be_charged(studied, moonflower):
    made = studied(seeds="1")
    made.run(1, 0, [0.4], scope="validation")
    _, out, _ = moonflower("sweep", "--resume", made.id)
    assert "scores of validation records are noised, and were charged; the 1 run" in out


@pytest.mark.parametrize(
    "grid",
    [
        ["privacy.epsilon=1,8,inf", "lora.rank=2,4"],
        ["model.trainable=lora,head"],
        ["training.rounds=1,2", "model.trainable=lora,head,bias"],
        [],
    ],
    ids=["numbers and no privacy", "words", "one number", "one cell"],
)
def test_plots_are_drawn_of_every_kind_of_grid(studied, moonflower, tmp_path, grid):
    made = studied(*grid, seeds="2")
    for cell, seed in made.plan.places[1:]:  # one is missing
        made.run(cell, seed, [0.3 + 0.05 * cell, 0.4 + 0.03 * seed + 0.05 * cell])
    made.run(*made.plan.places[0], [0.5, 0.6])
    code, _, err = moonflower("sweep", "--resume", "last", "--quiet", "--out", tmp_path)
    assert code == 0, err
    assert {file.name for file in tmp_path.glob("*.png")} == {"scores.png", "rounds.png"}
