"""An export as ONNX, and in eight bits: onnxruntime gives the run's predictions, for any number of records of any length."""

import json
import sys

import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from plain_process import run_cards

from server.export.cli import export as command
from server.export.folder import ExportError
from server.export.use.cli import predict
from shared.errors import ModelError

from .test_tasks import CASES, make, reference

GRAPHS = [name for name in CASES if name not in ("causal-lm", "seq2seq", "speech-to-text")]


@pytest.mark.parametrize("case", GRAPHS)
def test_onnxruntime_gives_the_runs_predictions(case, tmp_path):
    run, _ = make(case, "merged", tmp_path)
    out = run.export(tmp_path / "out", format="onnx")
    assert {file.suffix for file in out.iterdir()} <= {".onnx", ".json", ".md", ".html", ".txt", ".jinja"}
    batches, expected = reference(run)
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]

    def ask(batch):
        return dict(zip(names, session.run(None, {name: value.numpy() for name, value in batch.items()}), strict=True))

    for batch, wanted in zip(batches, expected, strict=True):
        together = {name: torch.cat([value, value, value]) for name, value in batch.items()}
        for name, value in wanted.items():
            torch.testing.assert_close(torch.tensor(ask(batch)[name]), value, atol=1e-4, rtol=0)
            torch.testing.assert_close(torch.tensor(ask(together)[name])[2:], value, atol=1e-4, rtol=0)
    if "input_ids" in batches[0]:
        short = {name: value[:, :5] for name, value in batches[0].items()}  # another length than any bucket
        assert all(len(value) == 1 for value in ask(short).values())
    run_cards({"it": (out, None, batches[:1], [])}, tmp_path)  # the card's code runs as it stands
    shown = CliRunner().invoke(predict, [str(out), str(run.folder / "test.jsonl"), "--format", "json"])
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert len(json.loads(shown.stdout)) == 6
    run.history.close()


def test_int8_is_small_and_its_size_and_scores_are_told(tmp_path):
    run, _ = make("native", "full", tmp_path)
    words = [run.id, "--run-folder", str(run.folder), "--database", run.database, "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(command, [*words, "--format", "int8"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "(int8): run case, round 3." in done.output
    assert "int8: " in done.output
    assert "accuracy on the public test set: " in done.output
    run.export(tmp_path / "whole", format="onnx")
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("out", "whole")]
    assert sizes[0] < 0.8 * sizes[1]
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "In int8 the weights take" in text
    assert "| | float32 | int8 |" in text
    assert "quantized" not in text  # its base has no name on the Hub
    run.history.close()


@pytest.mark.parametrize("case", ["causal-lm"])
def test_what_writes_token_by_token_is_no_single_pass(case, tmp_path):
    run, _ = make(case, "full", tmp_path)
    with pytest.raises(ExportError, match="holds one pass of a network, and causal-lm takes many"):
        run.export(tmp_path / "out", format="onnx")
    with pytest.raises(ExportError, match="--format int8 holds a whole model, and --form adapter a part of one"):
        run.export(tmp_path / "out", "adapter", format="int8")
    assert not (tmp_path / "out").exists()
    run.history.close()


def test_a_missing_package_is_named_before_any_work(tmp_path, monkeypatch):
    run, _ = make("native", "full", tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModelError, match=r"ONNX needs the package onnxscript; pip install 'moonflower\[onnx\]'"):
        run.export(tmp_path / "out", format="onnx")
    run.history.close()
