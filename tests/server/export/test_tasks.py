"""Every task's model, exported: loaded by its card's code where Moonflower is not, it predicts what the run's model does."""

import json
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from plain_process import run_cards

from server import checkpoints, job
from server.export.use.cli import predict
from shared import arrays, models, records, squad
from shared.examples import Examples, collate

from .conftest import Trained, commit

LABELS = ["low", "high"]
SOME = ["so", "we", "found", "a", "good", "film", "and", "the", "song", "was", "really", "dull"]
CASES: dict[str, tuple[str, dict[str, Any], str]] = {  # model, task, Hub's name of the task
    "pooled": ("bert", {"name": "text-classification", "labels": LABELS}, "text-classification"),
    "native": ("bert", {"name": "text-classification", "labels": LABELS}, "text-classification"),
    "image-classification": ("vit", {"labels": LABELS}, "image-classification"),
    "audio-classification": ("wav2vec2", {"labels": LABELS, "max_seconds": 1}, "audio-classification"),
    "token-classification": ("bert", {"labels": ["O", "B-THING", "I-THING"]}, "token-classification"),
    "question-answering": ("bert", {"max_length": 32}, "question-answering"),
    "causal-lm": ("llama", {}, "text-generation"),
    "seq2seq": ("t5", {}, "text2text-generation"),
    "speech-to-text": ("whisper", {"max_seconds": 2}, "automatic-speech-recognition"),
}
TRAINABLE = {  # part -> settings, form
    "full": ({"trainable": "full"}, "merged"),
    "merged": ({"trainable": "lora"}, "merged"),
    "adapter": ({"trainable": "lora"}, "adapter"),
}


def rows(task: str, home, labels) -> list[dict[str, Any]]:
    """Six public test records of a task."""
    files = home / "files"
    files.mkdir(parents=True)
    texts = [" ".join(SOME[: 3 + number]) for number in range(6)]
    label = [{"label": labels[number % 2]} if labels else {} for number in range(6)]
    match task:
        case "image-classification":
            for number in range(6):
                small_models.image(files / f"{number}.png", number)
            return [{"image": f"files/{number}.png", **label[number]} for number in range(6)]
        case "audio-classification":
            for number in range(6):
                small_models.clip(files / f"{number}.wav", number)
            return [{"audio": f"files/{number}.wav", **label[number]} for number in range(6)]
        case "speech-to-text":
            for number in range(6):
                small_models.clip(files / f"{number}.wav", number, rate=16000)
            return [{"audio": f"files/{number}.wav", "transcript": text} for number, text in enumerate(texts)]
        case "token-classification":
            return [
                {"words": text.split(), "tags": ["O", "B-THING"] + ["O"] * (len(text.split()) - 2)} for text in texts
            ]
        case "question-answering":
            answers = {"text": ["found"], "answer_start": [3]}
            return [
                {"question": "we found a film ?", "context": f"we found {text * number} .", "answers": answers}
                for number, text in enumerate(texts, 1)
            ]
        case "causal-lm":
            return [{"text": text} for text in texts]
        case "seq2seq":
            return [{"source": text, "target": " ".join(reversed(text.split()))} for text in texts]
    return [{"text": text, **label[number]} for number, text in enumerate(texts)]


def make(case: str, part: str, home) -> tuple[Trained, str]:
    """Commit a run of a case."""
    kind, task, _ = CASES[case]
    task = {"name": case, "max_length": 16, "max_target_length": 16, **task}
    base = small_models.MODELS[kind](home / "base")
    model = {"name": str(base), "feature_scale": 0.7, "lora": {"targets": ["all-linear"]}, **TRAINABLE[part][0]}
    if case in ("pooled", "native"):
        model["head"] = case
    test = rows(task["name"], home, task.get("labels"))
    return commit(home, {"name": "case", "model": model, "task": task}, test), TRAINABLE[part][1]


def reference(run: Trained) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Give the run's own batches of its test set, and what its model makes of them."""
    config = job.load(run.folder).config
    model = models.load(config)
    last = run.history.rounds(run.id)[-1]
    arrays.write(model.module, checkpoints.read(run.folder / "checkpoints", last.checkpoint.digest).published)
    model.module.eval()
    held = records.read(run.folder / "test.jsonl", model.task, identified=False)
    examples = Examples.single(
        model.task, model.processor, [model.task.encode(r.values, model.processor) for r in held]
    )
    batches = [collate(examples, [(row,)], torch.device("cpu")) for row in range(examples.rows)]
    with torch.no_grad():
        outputs = [model.outputs(batch) for batch in batches]
    names = ("logits", "start_logits", "end_logits")
    found = [
        {"logits": each} if isinstance(each, torch.Tensor) else {n: each[n] for n in names if n in each}
        for each in outputs
    ]
    return [model.inputs(batch) for batch in batches], found


def read(run: Trained) -> list[dict[str, Any]]:
    """Give the records of a run's test set as they stand there."""
    return [json.loads(line) for line in (run.folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export every case in every form, and run all cards in one process."""
    made: dict[str, tuple[Trained, Path, list[Any], list[Any]]] = {}
    asked = {}
    for case in CASES:
        for part in TRAINABLE:
            home = tmp_path_factory.mktemp("home")
            run, form = make(case, part, home)
            out = run.export(home / "out", form)
            batches, expected = reference(run)
            texts = [values["text"] for values in read(run)] if case in ("pooled", "native") else []
            base = home / "base" if form == "adapter" else None
            made[f"{case}, {part}"] = (run, out, [] if case == "pooled" else batches, expected)
            asked[f"{case}, {part}"] = (out, base, [] if case == "pooled" else batches, texts)
    found = run_cards(asked, tmp_path_factory.mktemp("batches"))
    yield {name: (*each, found[name]) for name, each in made.items()}
    for run, *_ in made.values():
        run.history.close()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("part", TRAINABLE)
def test_an_export_predicts_what_its_run_does_where_moonflower_is_not(case, part, exported):
    run, out, batches, expected, found = exported[f"{case}, {part}"]
    for got, wanted in zip(found["batches"], expected if batches else [], strict=True):
        assert wanted
        for name, value in wanted.items():
            torch.testing.assert_close(torch.tensor(got[name]), value, atol=1e-5, rtol=0)
    if case in ("pooled", "native"):
        wanted_logits = torch.cat([each["logits"] for each in expected])
        for name in found.keys() - {"batches"}:
            torch.testing.assert_close(torch.tensor(found[name]), wanted_logits, atol=1e-5, rtol=0)
    assert float(torch.cat([each.flatten() for row in expected for each in row.values()]).std()) > 1e-3
    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == CASES[case][2]
    assert "Not the last round" not in card.text
    for file in out.rglob("*"):
        if file.is_file():
            assert str(run.home).encode() not in file.read_bytes(), file


@pytest.mark.parametrize("case", CASES)
def test_predict_reads_the_runs_own_records_and_agrees_with_it(case, exported, tmp_path):
    run, out, _, expected, _ = exported[f"{case}, merged"]
    done = CliRunner().invoke(
        predict, [str(out), str(run.folder / "test.jsonl"), "--format", "json", "--scores", "--tokens", "4"]
    )
    assert done.exit_code == 0, (done.output, done.exception)
    rows = json.loads(done.stdout)
    assert len(rows) == 6
    if "label" in rows[0]:
        probabilities = torch.cat([each["logits"] for each in expected]).softmax(1)
        assert [[row[label] for label in LABELS] for row in rows] == [
            pytest.approx(each, abs=1e-5) for each in probabilities.tolist()
        ]
    if case == "question-answering":
        config = job.load(run.folder).config
        told = {
            metric.name: metric.value for metric in run.history.last_round(run.id).metrics if metric.scope == "test"
        }
        values = read(run)
        right = [squad.f1(row["answer"], each["answers"]["text"]) for row, each in zip(rows, values, strict=True)]
        assert sum(right) / 6 == pytest.approx(told["f1"], abs=1e-6), config.task.name
