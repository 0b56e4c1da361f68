"""A whole private simulation of each task that writes, on a tiny model of random weights."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from writers import language_model, two_parts, whisper

from server.history.records import Run
from server.history.store import History
from simulations import engine, prepare, scenario

WORDS = ("zero", "one", "two", "three")


def language(folder: Path, number: int) -> dict[str, Any]:
    return {"text": f"{WORDS[number % 4]} and {WORDS[number % 3]} " * (1 + number % 3)}


def pair(folder: Path, number: int) -> dict[str, Any]:
    return {"source": str(number % 4), "target": WORDS[number % 4]}


def spoken(folder: Path, number: int) -> dict[str, Any]:
    file = folder / f"{number % 4}.wav"
    soundfile.write(file, 0.5 * np.sin(np.arange(5000 + 1200 * (number % 4)) * (0.1 + 0.2 * (number % 4))), 16000)
    return {"audio": file.name, "transcript": WORDS[number % 4]}


CASES: dict[str, tuple[Callable[[Path], Path], Callable[[Path, int], dict[str, Any]], tuple[str, ...]]] = {
    "causal-lm": (lambda folder: language_model(folder, "llama"), language, ()),
    "seq2seq": (lambda folder: two_parts(folder, "t5"), pair, ("chrf", "rouge1", "rouge_l")),
    "speech-to-text": (lambda folder: whisper(folder, 1), spoken, ("wer",)),
}


def lay_out(name: str, folder: Path) -> dict[str, Any]:
    make, record, _ = CASES[name]
    for part, size in (("north", 40), ("south", 40), ("test", 12)):
        rows = [{"id": f"{part}/{number}"} | record(folder, number) for number in range(size)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "name": name,
        "model": {"name": str(make(folder / "model")), "trainable": "full"},
        "task": {"name": name, "max_length": 16, "max_target_length": 16},
        "training": {"rounds": 2, "sampling_rate": 0.5, "clipping_norm": 1.0},
        "evaluation": {"generated_records": 4},
        "data": {"source": "folder", "folder": str(folder)},
        "sites": [{"name": site, "records": 40} for site in ("north", "south")],
    }


@pytest.mark.usefixtures("moonflower_home")
@pytest.mark.parametrize("name", list(CASES))
def test_a_private_run_is_scored_by_its_own_words(name: str, tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'history.db'}"
    with History.open(database) as history:
        run = prepare.prepare(scenario.Scenario.model_validate(lay_out(name, tmp_path)), history)
    finished: Run = engine.play(run, database, None)
    assert finished.status == "completed"
    with History.open(database) as history:
        spends = [spend for _, spend in history.spends(run)]
        metrics = [[metric for _, metric in history.metrics(run, round_number=number)] for number in (1, 2)]
    assert {spend.gradients for spend in spends if spend.part == "train"} == {"one-pass"}
    assert all(0 < spend.epsilon <= 8 for spend in spends)
    first, last = metrics
    test = {metric.name: metric.value for metric in last if metric.scope == "test"}
    common = {"loss", "perplexity", "token_accuracy", "records"}
    assert test.keys() == common | set(CASES[name][2])
    assert test["perplexity"] == pytest.approx(math.exp(test["loss"]))
    assert {metric.name for metric in first if metric.scope == "test"} == common  # nothing is written yet
    released = [metric for metric in last if metric.scope == "validation"]
    assert {metric.name for metric in released} == {"loss", "perplexity", "token_accuracy"}
    assert all(metric.low is not None and metric.low <= metric.value <= (metric.high or 0) for metric in released)
