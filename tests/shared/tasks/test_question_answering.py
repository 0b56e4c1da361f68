"""Spans of contexts: chunks that count as one record, answers as SQuAD's evaluation compares them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_networks
import torch
from transformers import AutoTokenizer

from client import evaluation, training
from client.evaluation import STEPS
from client.privacy import probe
from client.privacy.engine import Gradients, train_only
from shared import models, scoring, squad, tasks
from shared.errors import ConfigError, DataError, EngineError, SensitivityError
from shared.examples import Examples, batches, collate
from shared.models import LoadedModel
from shared.records import read
from shared.run_config import RunConfig
from shared.tasks.base import Measured
from shared.tasks.question_answering import MOST, QuestionAnswering

CPU = torch.device("cpu")
WORDS = [
    "the",
    "a",
    "film",
    "book",
    "song",
    "was",
    "is",
    "really",
    "so",
    "we",
    "found",
    "it",
    "and",
    "very",
    "good",
    "great",
    "fine",
    "bad",
    "awful",
    "poor",
]


def config_of(model: str = "any", trainable: str = "full", **task: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {
                "name": model,
                "trainable": trainable,
                "lora": {"rank": 2, "alpha": 2, "targets": ["all-linear"]},
            },
            "task": {"name": "question-answering", "max_length": 32, **task},
            "training": {"rounds": 1, "sampling_rate": 0.5},
            "hardware": {"precision": "float32"},
        }
    )


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def bert(tmp_path: Path, tokenizer: Any) -> LoadedModel:
    return models.load(config_of(tiny_networks.write(tmp_path, tokenizer, "bert")))


def record(words: int, answer: int | None, length: int = 1, seed: int = 0) -> dict[str, Any]:
    """A question, and a context of so many words with the answer at one of them."""
    draw = random.Random(seed)  # noqa: S311 - a test
    held = [draw.choice(WORDS) for _ in range(words)]
    context = " ".join(held)
    if answer is None:
        return {"question": "was it good", "context": context, "answers": {"text": (), "answer_start": ()}}
    start, text = len(" ".join([*held[:answer], ""])), " ".join(held[answer : answer + length])
    return {"question": "was it good", "context": context, "answers": {"text": (text,), "answer_start": (start,)}}


def test_each_chunk_has_the_question_and_points_at_the_answer_or_at_none(bert: LoadedModel) -> None:
    task, values = bert.task, record(60, 40, 2)
    chunks = task.encode(values, bert.processor)
    assert isinstance(chunks, list)
    assert len(chunks) == 3  # 32 places, 6 of which are not the context's and 8 shared: 26, 18 and 16 words
    assert [int(chunk["begins"]) for chunk in chunks] == [1, 0, 0]
    pointed = [bool(chunk["first"] > 0) for chunk in chunks]
    assert sum(pointed) in (1, 2)
    for chunk, points in zip(chunks, pointed, strict=True):
        assert len(chunk["input_ids"]) <= 32
        assert bert.processor.decode(chunk["input_ids"][:4]).startswith("[CLS] was it good")
        begin, behind = chunk["offsets"][int(chunk["first"])][0], chunk["offsets"][int(chunk["last"])][1]
        assert (values["context"][begin:behind] == values["answers"]["text"][0]) == points
    seen = {tuple(offset) for chunk in chunks for offset in chunk["offsets"].tolist() if offset[0] >= 0}
    assert len(seen) == 60


def test_a_long_question_is_cut_and_a_very_long_context_has_a_bounded_number_of_chunks(bert: LoadedModel) -> None:
    values = record(900, 800)
    chunks = bert.task.encode(values | {"question": " ".join(WORDS * 5)}, bert.processor)
    assert len(chunks) == MOST
    assert all(len(chunk["input_ids"]) <= 32 for chunk in chunks)
    assert not any(chunk["first"] for chunk in chunks)  # the answer is behind the last


@pytest.mark.parametrize("kind", list(tiny_networks.CONFIGS))
@torch.no_grad()
def test_a_record_has_the_same_loss_and_answer_alone_and_padded_beside_others(
    tmp_path: Path, tokenizer: Any, kind: str
) -> None:
    model = models.load(config_of(tiny_networks.write(tmp_path, tokenizer, kind)))
    encoded = [model.task.encode(record(words, words // 2, seed=words), model.processor) for words in (4, 12, 20)]
    examples = Examples.single(model.task, model.processor, encoded)
    batch = collate(examples, [(0,), (1,), (2,)], CPU, (48,))
    outputs = model.outputs(batch)
    losses, answers = model.task.losses(outputs, batch), model.task.measure(outputs, batch).amounts
    for number in range(3):
        alone = collate(examples, [(number,)], CPU, (len(examples.row(number)["input_ids"]),))
        found = model.outputs(alone)
        torch.testing.assert_close(losses[number : number + 1], model.task.losses(found, alone), rtol=1e-4, atol=1e-5)
        assert answers[number].tolist() == pytest.approx(model.task.measure(found, alone).amounts[0].tolist())


@torch.no_grad()
def test_a_records_loss_is_the_mean_of_its_chunks_and_it_counts_once(bert: LoadedModel) -> None:
    records = [record(60, 40, 2), record(5, 3), record(30, None)]
    examples = Examples.single(
        bert.task, bert.processor, [bert.task.encode(values, bert.processor) for values in records]
    )
    assert examples.rows > len(examples) == 3
    hardware = config_of().hardware
    found = {
        int(number): (float(loss), amounts)
        for numbers, measured, losses in scoring.outcomes(bert, examples, hardware)
        for number, loss, amounts in zip(numbers, losses, measured.amounts, strict=True)
    }
    for number in range(3):
        each = []
        for row in examples.of_record(number):
            batch = collate(examples, [(row,)], CPU)
            each.append(float(bert.task.losses(bert.outputs(batch), batch)))
        loss, amounts = found[number]
        assert loss == pytest.approx(np.mean(each), rel=1e-4)
        assert amounts[2] == pytest.approx(1 / np.sqrt(3))
    counts, mean = scoring.exact(bert, examples, hardware)
    assert counts[2] * np.sqrt(3) == pytest.approx(3)
    assert mean == pytest.approx(np.mean([loss for loss, _ in found.values()]))
    total = np.zeros(3, dtype=np.int64)
    for numbers, measured, _ in scoring.outcomes(bert, examples, hardware):
        evaluation._add(total, measured, evaluation._shares(examples)[numbers], bert.task)
    assert total[2] == 3 * int(STEPS / np.sqrt(3))


@torch.no_grad()
def test_the_best_span_of_all_chunks_is_the_answer(bert: LoadedModel) -> None:
    """Scores are set by hand: the third chunk is the surest, and then every chunk's first token is surer still."""
    task, values = bert.task, record(60, 50)
    chunks = task.encode(values, bert.processor)
    batch = collate(Examples.single(task, bert.processor, [chunks]), [range(len(chunks))], CPU)
    batch = {name: value.flatten(0, 1) for name, value in batch.items()}
    starts, ends = torch.zeros(len(chunks), 32), torch.zeros(len(chunks), 32)
    starts[0, 10], ends[0, 9] = 9.0, 9.0  # ends before it starts
    starts[1, 2], ends[1, 2] = 9.0, 9.0  # in the question
    starts[2, 8], ends[2, 9] = 6.0, 5.0
    wanted = values["context"][slice(int(chunks[2]["offsets"][8][0]), int(chunks[2]["offsets"][9][1]))]
    batch["answers"][0] = -1
    letters = torch.tensor([ord(letter) for letter in wanted])
    batch["answers"] = torch.cat([letters.expand(len(chunks), -1), batch["answers"]], dim=1)
    outputs = SimpleNamespace(start_logits=starts, end_logits=ends)
    assert task.measure(outputs, batch).amounts[0].tolist() == pytest.approx([0.5774] * 3, abs=1e-4)
    starts[:, 0] = 20.0  # none, says each chunk
    assert task.measure(outputs, batch).amounts[0].tolist() == pytest.approx([0, 0, 0.5774], abs=1e-4)


def test_a_task_that_measures_chunks_as_records_is_stopped(bert: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = Examples.single(bert.task, bert.processor, [bert.task.encode(record(60, 40), bert.processor)])

    def each(_: object, __: object, batch: dict[str, torch.Tensor]) -> Measured:
        rows = len(batch["begins"])
        return Measured(np.zeros((rows, 1), dtype=np.int64), np.ones((rows, 1)))

    monkeypatch.setattr(QuestionAnswering, "measure", each)
    with pytest.raises(EngineError, match="1 records as 3"):
        list(scoring.outcomes(bert, examples, config_of().hardware))
    monkeypatch.setattr(QuestionAnswering, "chunks", False)
    with pytest.raises(EngineError, match="its `chunks` is false"):
        Examples.single(bert.task, bert.processor, [bert.task.encode(record(60, 40), bert.processor)])


def probed(model: LoadedModel, config: RunConfig) -> str:
    parameters = train_only(model.module, [n for n, _ in model.module.named_parameters() if n in model.trainable])
    objective = training.EncoderPass(model, Examples.single(model.task, model.processor, []), config)
    with Gradients(objective.module, parameters, config.hardware.gradients) as gradients:
        probe.check(objective.module, gradients, *objective.made_up())
        return gradients.method


@pytest.mark.parametrize("trainable", ["full", "lora", "head"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_probe_finds_records_of_several_chunks_right(
    tmp_path: Path, tokenizer: Any, kind: str, trainable: str
) -> None:
    config = config_of(tiny_networks.write(tmp_path, tokenizer, kind), trainable)
    assert probed(models.load(config), config) == "one-pass"


def test_the_probe_catches_chunks_that_are_clipped_as_records_of_their_own(
    bert: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: a batch of units with several rows is flattened, each row a unit."""
    config = config_of(bert.module.encoder.name_or_path)
    real = training.EncoderPass._objective

    def flat(self: training.EncoderPass, examples: Examples, units: Any, *rest: Any) -> Any:
        if len(units) > 1:
            units = [(row,) for unit in units for row in unit]
        return real(self, examples, units, *rest)

    assert probed(bert, config) == "one-pass"
    monkeypatch.setattr(training.EncoderPass, "_objective", flat)
    with pytest.raises(SensitivityError):
        probed(bert, config)


def test_batches_hold_records_of_as_many_chunks_each(bert: LoadedModel) -> None:
    records = [record(words, 1, seed=words) for words in (5, 60, 6, 61, 30)]
    examples = Examples.single(
        bert.task, bert.processor, [bert.task.encode(values, bert.processor) for values in records]
    )
    groups = batches(examples, [examples.rows_of(unit) for unit in range(5)], 64)
    assert sorted(sorted(group) for group in groups) == [[0, 2], [1, 3], [4]]


@pytest.mark.parametrize(
    ("given", "answers", "match", "overlap"),
    [
        ("The Film.", ("film",), 1.0, 1.0),
        ("a good film", ("film", "book"), 0.0, 2 / 3),
        ("song song", ("song",), 0.0, 2 / 3),
        ("", ("film",), 0.0, 0.0),
        ("", (), 1.0, 1.0),
        ("film", (), 0.0, 0.0),
        ("the", ("a",), 1.0, 1.0),
    ],
)
def test_answers_are_compared_as_squad_does(given: str, answers: tuple[str, ...], match: float, overlap: float) -> None:
    """The values are those of SQuAD's evaluate-v2.0.py, by its rules: lower case, no punctuation, no articles."""
    assert (squad.exact_match(given, answers), squad.f1(given, answers)) == (match, pytest.approx(overlap))


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"text": ["film"], "answer_start": [3]}, "row 1: answer 1 does not stand in the context at its answer_start"),
        ({"text": ["film"], "answer_start": [400]}, "row 1: answer 1 does not stand"),
    ],
)
def test_an_answer_that_is_not_where_it_is_said_to_be_is_an_error(tmp_path: Path, answers: Any, said: str) -> None:
    row = {"id": 1, "question": "which", "context": "the film", "answers": answers}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=said):
        read(tmp_path / "rows.jsonl", tasks.of(config_of()))


def test_a_length_without_room_for_question_and_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 32"):
        tasks.of(config_of(max_length=31))


@pytest.mark.parametrize("phases", [{"warm_start": {"rounds": 1, "sampling_rate": 0.5}}, {}])
def test_a_private_run_with_long_contexts_finishes_and_scores_records(
    tmp_path: Path, tiny_model: Path, moonflower_home: Path, phases: dict[str, Any]
) -> None:
    def rows(count: int, seed: int) -> list[dict[str, Any]]:
        draw: Callable[[int], int] = random.Random(seed).randrange  # noqa: S311 - a test
        return [record(words, draw(words), seed=seed + n) for n in range(count) for words in [4 + draw(40)]]

    settings = {
        "name": "answers",
        "model": {"name": str(tiny_model), "lora": {"rank": 2, "alpha": 2}},
        "task": {"name": "question-answering", "max_length": 32},
        "training": {"rounds": 2, "sampling_rate": 0.3, "clipping_norm": 1.0},
        **phases,
    }
    before, after, pooled = tiny_networks.run(
        tmp_path, settings, {"one": rows(60, 0), "two": rows(60, 1000)}, rows(30, 5)
    )
    assert after["records"] == before["records"] == 30
    assert after["loss"] != before["loss"]
    assert {"exact_match", "f1"} <= pooled.keys()
