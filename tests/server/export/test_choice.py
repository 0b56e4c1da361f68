"""Which round is exported."""

import json
import math

import pytest
import small_models
from click.testing import CliRunner
from huggingface_hub import ModelCard

from server import checkpoints
from server.export.cli import export as command
from server.export.use.cli import predict
from server.history.records import Metric
from shared.errors import NotFoundError
from shared.score_names import THRESHOLD

from .conftest import commit

ROWS = [{"text": "a good film", "label": "low"}, {"text": "so dull", "label": "high"}]
VALUES = {"name": "chosen", "task": {"labels": ["low", "high"], "max_length": 16}}


def released(name: str, *values: float) -> list[list[Metric]]:
    """Give a validation score of each round over all sites, and a better one of a single site, which does not count."""
    return [
        [Metric("validation", "north", name, 9.0), Metric("validation", None, name, value, value - 0.1, value + 0.1)]
        for value in values
    ]


@pytest.fixture
def played(tmp_path):
    made = []

    def make(scores=None, test=None):
        base = small_models.bert(tmp_path / "base")
        values = {**VALUES, "model": {"name": str(base), "trainable": "head"}}
        made.append(commit(tmp_path, values, test, released=scores))
        return made[0]

    yield make
    for run in made:
        run.history.close()


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("accuracy", (0.7, 0.9, 0.8), 2),
        ("accuracy", (0.9, 0.7, 0.9), 3),
        ("accuracy", (0.7, math.nan, 0.6), 1),
        ("loss", (0.9, 0.3, 0.5), 2),
        ("perplexity", (9.0, 3.0, 2.0), 3),
        ("wer", (0.1, 0.2, 0.3), 1),
    ],
)
def test_the_best_round_is_that_of_the_best_released_score_of_all_sites(name, values, best, played, tmp_path):
    run = played(released(name, *values), ROWS)
    card = ModelCard.load(run.export(tmp_path / "out", chosen="best") / "README.md")
    assert f"round {best} of 3 (training 3)" in card.text
    assert "**The best of 3 rounds** by its" in card.text
    assert "on the sites' validation records, as released" in card.text


def test_without_released_scores_the_public_test_set_decides_and_the_card_says_so(played, tmp_path):
    run = played(None, ROWS)
    card = ModelCard.load(run.export(tmp_path / "out", chosen="best") / "README.md")
    assert "**The best of 3 rounds** by its accuracy on the public test set" in card.text


def test_a_run_without_scores_has_no_best_round(played, tmp_path):
    run = played()
    with pytest.raises(NotFoundError, match="no score by which a round could be the best; export the last"):
        run.export(tmp_path / "out", chosen="best")
    assert "None was recorded after round 3." in (run.export(tmp_path / "out") / "README.md").read_text()


def test_a_best_round_that_is_no_longer_kept_is_named_with_those_that_are(played, tmp_path):
    run = played(released("accuracy", 0.9, 0.7, 0.8))
    first = run.history.rounds(run.id)[0]
    checkpoints.path(run.folder / "checkpoints", first.checkpoint.digest).unlink()
    with pytest.raises(NotFoundError, match=r"of best round 1|of the best round 1") as caught:
        run.export(tmp_path / "out", chosen="best")
    assert "which keeps those of rounds 2-3 (federation.keep_checkpoints)" in str(caught.value).replace("–", "-")
    assert "; export the best of them, --round 3 (accuracy 0.800), or restore it" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command_says_why_this_round_and_refuses_what_is_no_round(played, tmp_path):
    run = played(released("accuracy", 0.7, 0.9, 0.8))
    words = [run.id, "--run-folder", str(run.folder), "--database", run.database, "--round"]
    done = CliRunner().invoke(command, [*words, "best", "--merged", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "run chosen, round 2." in done.output
    assert "Round 2 is the best by accuracy of the sites' released histograms: 0.900." in done.output
    for wrong in ("0", "first", "-1"):
        refused = CliRunner().invoke(command, [*words, wrong, "--out", str(tmp_path / "two")])
        assert refused.exit_code == 2
        assert "neither best nor last nor a round's number" in refused.output


@pytest.mark.parametrize(("value", "label"), [(0.0, "high"), (1.0, "low")])
def test_thresholds_that_were_chosen_on_released_scores_are_on_the_card_and_decide(value, label, played, tmp_path):
    run = played([[], [], [Metric("validation", None, f"{THRESHOLD}high", value)]], ROWS)
    text = (run.export(tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    assert f"| thresholds, chosen on released scores | {value} (of high) |" in text
    assert THRESHOLD not in text
    done = CliRunner().invoke(predict, [str(tmp_path / "out"), "-", "--thresholds", "--format", "json"], input="a film")
    assert [row["label"] for row in json.loads(done.stdout)] == [label]
