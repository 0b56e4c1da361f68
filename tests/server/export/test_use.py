"""`moonflower predict` and `moonflower explain`, as a person uses them."""

import csv
import io
import json

import pytest
from click.testing import CliRunner
from rich.console import Console

from server.export.use import explaining, heat
from server.export.use.cli import explain, predict
from shared.errors import ConfigError, DataError, ModelError

from .test_tasks import LABELS, make

TEXTS = ["so we found a good film", "the song was really dull", "a book"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Give an exported classifier with a head of its own, one with ours, and an adapter with its base."""
    found = {}
    for name, case, part in (
        ("native", "native", "full"),
        ("pooled", "pooled", "merged"),
        ("adapter", "native", "adapter"),
    ):
        home = tmp_path_factory.mktemp("home")
        run, form = make(case, part, home)
        found[name] = run.export(home / "out", form)
        run.history.close()
    return found


def ask(*words, stdin=None):
    return CliRunner().invoke(predict, [str(word) for word in words], input=stdin)


def refused(kind, *words, stdin=None) -> str:
    done = ask(*words, stdin=stdin)
    assert isinstance(done.exception, kind), (done.output, done.exception)
    assert "\n" not in str(done.exception)
    return str(done.exception)


def test_every_kind_of_file_and_batch_gives_the_same_predictions(models, tmp_path):
    rows = [{"id": f"r{number}", "review": text} for number, text in enumerate(TEXTS, 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "review"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "rows.txt").write_text("\n\n".join(TEXTS) + "\n")
    asked = ["--format", "json", "--scores"]
    column = ["--column", "text=review"]
    found = [
        ask(models["native"], tmp_path / "rows.jsonl", *column, *asked),
        ask(models["native"], tmp_path / "rows.csv", *column, "--batch", 1, *asked),
        ask(models["native"], tmp_path / "rows.txt", *asked),
        ask(models["native"], "-", *asked, stdin="\n".join(TEXTS)),
        ask(models["native"], "-", *column, *asked, stdin=(tmp_path / "rows.jsonl").read_text()),
    ]
    for done in found:
        assert done.exit_code == 0, (done.output, done.exception)
    read = [json.loads(done.stdout) for done in found]
    assert [row["record"] for row in read[0]] == ["r1", "r2", "r3"]
    for rows_found in read:
        for row, first in zip(rows_found, read[0], strict=True):
            assert row["label"] == first["label"] == max(LABELS, key=row.get)
            assert row["score"] == pytest.approx(first["score"], abs=1e-6)
            assert sum(row[label] for label in LABELS) == pytest.approx(1)


def test_a_table_and_csv_go_to_the_screen_or_to_a_new_file(models, tmp_path):
    table = ask(models["pooled"], "-", stdin=TEXTS[0])
    assert table.exit_code == 0, table.output
    assert "out: 1 record" in table.stdout
    assert "label" in table.stdout
    done = ask(models["pooled"], "-", "--format", "csv", "--out", tmp_path / "found.csv", stdin="\n".join(TEXTS))
    assert (done.exit_code, done.stdout) == (0, "")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "found.csv").read_text())))
    assert [row["record"] for row in rows] == ["1", "2", "3"]
    assert "nothing is replaced" in refused(
        ConfigError, models["pooled"], "-", "--out", tmp_path / "found.csv", stdin="x"
    )


def test_an_adapter_is_asked_over_its_base(models, tmp_path):
    said = refused(ModelError, models["adapter"], "-", stdin=TEXTS[0])
    assert said.endswith("name the base's folder with --base.")
    done = ask(models["adapter"], "-", "--base", models["adapter"].parent / "base", stdin=TEXTS[0])
    assert done.exit_code == 0, (done.output, done.exception)


def test_what_cannot_be_predicted_is_said_in_one_line(models, tmp_path):
    native = models["native"]
    (tmp_path / "rows.jsonl").write_text('{"text": "a film"}\n{"review": "a book"}\n')
    assert (
        "row 2: there is no column 'text', and its columns are 'review'; name it with --column text=NAME."
        in refused(DataError, native, tmp_path / "rows.jsonl")
    )
    (tmp_path / "broken.jsonl").write_text('{"text": "a film"}\n{"text": \n')
    assert "broken.jsonl, row 2" in refused(DataError, native, tmp_path / "broken.jsonl")
    (tmp_path / "number.jsonl").write_text('{"text": 7}\n')
    assert "row 1: column 'text' holds a whole number, and no text." in refused(
        DataError, native, tmp_path / "number.jsonl"
    )
    assert "standard input, row 2: not a JSON object" in refused(DataError, native, "-", stdin='a film\n{"text"\n')
    assert "standard input holds no records" in refused(DataError, native, "-", stdin="\n\n")
    assert "there is no such file or folder" in refused(DataError, native, tmp_path / "missing.csv")
    assert "this model reads text and pair" in refused(DataError, native, "-", "--column", "image=x", stdin="a")
    assert "is no exported model: it has no moonflower.json" in refused(ModelError, tmp_path, "-", stdin="a")
    assert "is no folder" in refused(ModelError, tmp_path / "nowhere", "-", stdin="a")
    assert "no thresholds that were chosen" in refused(ModelError, native, "-", "--thresholds", stdin="a")
    done = ask(native, "-", "--column", "text", stdin="a")
    assert done.exit_code == 2
    assert "must be ROLE=NAME" in done.output


@pytest.mark.parametrize("name", ["native", "pooled"])
def test_the_words_shares_add_up_to_the_logits_difference(name, models):
    text = "so we found a good film"
    found = explaining.explain(models[name], text, target=None, steps=200, base=None)
    assert "".join(piece.text for piece in found.pieces) == text
    assert len(found.pieces) == 6
    assert abs(found.logit - found.empty) > 1e-3
    assert abs(found.gap) < 0.02 * abs(found.logit - found.empty) + 1e-4
    assert sum(piece.share for piece in found.pieces) == pytest.approx(found.logit - found.empty + found.gap, abs=1e-5)
    coarse = explaining.explain(models[name], text, target=None, steps=2, base=None)
    assert abs(coarse.gap) >= abs(found.gap)
    done = ask(models[name], "-", "--format", "json", stdin=text)
    assert json.loads(done.stdout)[0]["label"] == found.target
    assert json.loads(done.stdout)[0]["score"] == pytest.approx(found.probability, abs=1e-5)


def test_an_explanation_is_for_the_label_that_is_asked_for(models, tmp_path):
    words = [str(models["native"]), "so <b>we</b> found a film"]
    shown = {}
    for label in LABELS:
        done = CliRunner().invoke(explain, [*words, "--target", label, "--steps", "8", "--format", "json"])
        assert done.exit_code == 0, (done.output, done.exception)
        shown[label] = json.loads(done.stdout)
    assert [shown[label]["target"] for label in LABELS] == LABELS
    assert shown["low"]["predicted"] == shown["high"]["predicted"]
    assert shown["low"]["probability"] + shown["high"]["probability"] == pytest.approx(1)
    done = CliRunner().invoke(explain, [*words, "--out", str(tmp_path / "why.html")])
    assert "completeness gap" in done.stdout
    page = (tmp_path / "why.html").read_text(encoding="utf-8")
    assert "<b>" not in page
    assert "&lt;" in page
    assert page.count("<span title=") >= 5


def test_a_terminal_shows_colours_and_a_file_each_words_share(models):
    found = explaining.explain(models["native"], "a film\x1b[2J found", target=None, steps=4, base=None)
    plain, coloured = (
        Console(file=io.StringIO(), color_system=system, force_terminal=system is not None)
        for system in (None, "truecolor")
    )
    heat.show(found, plain)
    heat.show(found, coloured)
    assert len(plain.file.getvalue().splitlines()) == len(found.pieces)
    assert "\x1b[" in coloured.file.getvalue()
    assert "\x1b[2J" not in coloured.file.getvalue()


def test_what_cannot_be_explained_is_said_in_one_line(models, tmp_path):
    for said, kind, words in (
        ("TEXT is empty", ConfigError, [str(models["native"]), " "]),
        (
            "--target='middle' is none of this model's labels: low, high.",
            ConfigError,
            [str(models["native"]), "a", "--target", "middle"],
        ),
        ("is no exported model", ModelError, [str(tmp_path), "a"]),
    ):
        done = CliRunner().invoke(explain, words)
        assert isinstance(done.exception, kind)
        assert said in str(done.exception)
