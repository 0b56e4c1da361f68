"""Every task's model, exported: loaded by its card's code where Moonflower is not, it predicts what the run's model does."""

import json
from typing import Any

import pytest
import small_models
import torch
from huggingface_hub import ModelCard
from plain_process import run_cards

from server import checkpoints, job
from shared import arrays, models, records
from shared.examples import Examples, collate

from .conftest import Trained, commit

LABELS = ["low", "high"]
SOME = ["so", "we", "found", "a", "good", "film", "and", "the", "song", "was", "really", "dull"]
CASES: dict[str, tuple[str, dict[str, Any], str]] = {  # model, task, Hub's name of the task
    "pooled": ("bert", {"name": "text-classification", "labels": LABELS}, "text-classification"),
    "native": ("bert", {"name": "text-classification", "labels": LABELS}, "text-classification"),
    "image-classification": ("vit", {"labels": LABELS}, "image-classification"),
    "audio-classification": ("wav2vec2", {"labels": LABELS, "max_seconds": 1}, "audio-classification"),
    "causal-lm": ("llama", {}, "text-generation"),
    "seq2seq": ("t5", {}, "text2text-generation"),
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
    read = records.read(run.folder / "test.jsonl", model.task, identified=False)
    examples = Examples.single(
        model.task, model.processor, [model.task.encode(r.values, model.processor) for r in read]
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("part", TRAINABLE)
def test_an_export_predicts_what_its_run_does_where_moonflower_is_not(case, part, tmp_path):
    run, form = make(case, part, tmp_path)
    out = run.export(tmp_path / "out", form)
    batches, expected = reference(run)
    texts = [json.loads(line).get("text") for line in (run.folder / "test.jsonl").read_text().splitlines()]
    texts = texts if case in ("pooled", "native") else []
    given = [] if case == "pooled" else batches
    base = tmp_path / "base" if form == "adapter" else None
    found = run_cards({"it": (out, base, given, texts)}, tmp_path)["it"]
    for got, wanted in zip(found["batches"], expected if given else [], strict=True):
        for name, value in wanted.items():
            torch.testing.assert_close(torch.tensor(got[name]), value, atol=1e-5, rtol=0)
    if texts:
        wanted_logits = torch.cat([each["logits"] for each in expected])
        for name in found.keys() - {"batches"}:
            torch.testing.assert_close(torch.tensor(found[name]), wanted_logits, atol=1e-5, rtol=0)
    assert float(torch.cat([each.flatten() for row in expected for each in row.values()]).std()) > 1e-3
    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == CASES[case][2]
    assert "Not the last round" not in card.text
    for file in out.rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes(), file
    run.history.close()
