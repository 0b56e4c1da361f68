"""Tags of words: which token carries one, what is cut, and entities as seqeval counts them."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_networks
import torch
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2
from transformers import AutoTokenizer

from shared import models, tasks
from shared.errors import ConfigError, DataError
from shared.examples import Examples, collate
from shared.records import read
from shared.run_config import RunConfig
from shared.tasks.base import Measured
from shared.tasks.token_classification import TokenClassification

LABELS = ["O", "B-thing", "I-thing", "B-mood", "I-mood"]
CPU = torch.device("cpu")


def config_of(model: str = "any", **task: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": model, "trainable": "full"},
            "task": {"name": "token-classification", "labels": LABELS, "max_length": 16, **task},
            "training": {"rounds": 1, "sampling_rate": 0.5},
        }
    )


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


RECORDS = (
    {"words": ("film", "was", "good"), "tags": ("B-thing", "O", "B-mood")},
    {
        "words": ("the", "book", "really", "bad", "and", "it"),
        "tags": ("O", "B-thing", "I-thing", "B-mood", "I-mood", "O"),
    },
)


@pytest.mark.parametrize("kind", list(tiny_networks.CONFIGS))
@torch.no_grad()
def test_a_record_gets_the_same_scores_and_loss_alone_and_padded_beside_others(
    tmp_path: Path, tokenizer: Any, kind: str
) -> None:
    model = models.load(config_of(tiny_networks.write(tmp_path, tokenizer, kind)))
    examples = Examples.single(
        model.task, model.processor, [model.task.encode(values, model.processor) for values in RECORDS]
    )
    batch = collate(examples, [(0,), (1,)], CPU, (48, 48))
    together = model.task.losses(model.outputs(batch), batch)
    for number in range(2):
        row = examples.row(number)
        alone = collate(examples, [(number,)], CPU, (len(row["input_ids"]), len(row["places"])))
        torch.testing.assert_close(
            together[number : number + 1], model.task.losses(model.outputs(alone), alone), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            model.outputs(batch)[number, : len(row["input_ids"])], model.outputs(alone)[0], rtol=1e-4, atol=1e-4
        )
    logits = model.outputs(batch)[0, torch.from_numpy(examples.row(0)["places"]).long()]
    tags = torch.from_numpy(examples.row(0)["labels"]).long()
    torch.testing.assert_close(together[0].float(), torch.nn.functional.cross_entropy(logits, tags))


class Pieces:
    """Three tokens a word of six letters, two around all."""

    def __call__(self, words: list[str], *, max_length: int = 99, **_: Any) -> Any:
        places = [None, *(number for number, word in enumerate(words) for _ in range(len(word) // 2)), None]
        self.held = [*places[: max_length - 1], None] if len(places) > max_length else places
        return self

    def __getitem__(self, name: str) -> list[int]:
        return [7] * len(self.held)

    def word_ids(self) -> list[int | None]:
        return self.held


def test_a_words_tag_is_on_its_first_token_and_words_beyond_the_end_are_cut() -> None:
    task = tasks.of(config_of(max_length=9))
    values = {"words": ("abcdef", "x", "abcdef", "ab", "abcd"), "tags": ("B-mood", "O", "I-mood", "O", "B-thing")}
    encoded = task.encode(values, Pieces())
    assert encoded["places"].tolist() == [1, -1, 4, 7, -1]  # a word without tokens, and one that is cut
    assert encoded["labels"].tolist() == [3, 0, 4, 0, 1]
    assert len(encoded["input_ids"]) == 9


def outputs_for(tags: list[list[int]], width: int) -> torch.Tensor:
    scores = torch.zeros(len(tags), width, len(LABELS))
    for row, each in enumerate(tags):
        for place, tag in enumerate(each):
            scores[row, place, tag] = 5
    return scores


def measured(true: list[list[int]], predicted: list[list[int]], cut: int = 99) -> tuple[TokenClassification, Measured]:
    task = tasks.of(config_of())
    assert isinstance(task, TokenClassification)
    encoded = []
    for tags in true:
        places = np.arange(len(tags), dtype=np.int32)
        places[cut:] = -1
        encoded.append(
            {"input_ids": np.ones(len(tags), np.int32), "places": places, "labels": np.array(tags, np.int32)}
        )
    batch = collate(Examples.single(task, None, encoded), [(n,) for n in range(len(true))], CPU, (16, 16))
    return task, task.measure(outputs_for(predicted, 16), batch)


def test_entities_are_seqevals_strict_ones() -> None:
    """Random tags, of which most that go on have nothing to go on with."""
    draw = random.Random(3)  # noqa: S311 - a test
    lengths = [draw.randrange(1, 14) for _ in range(300)]
    true = [[draw.randrange(5) for _ in range(length)] for length in lengths]
    predicted = [[tag if draw.random() < 0.7 else draw.randrange(5) for tag in tags] for tags in true]
    task, found = measured(true, predicted)
    counts = np.zeros(task.cells)
    np.add.at(counts, found.cells, found.amounts)
    scores = {score.name: score.value for score in task.scores(counts, 0.0)}

    def names(rows: list[list[int]]) -> list[list[str]]:
        return [[LABELS[tag] for tag in row] for row in rows]

    report = classification_report(names(true), names(predicted), mode="strict", scheme=IOB2, output_dict=True)
    assert scores["entity_f1"] == pytest.approx(report["micro avg"]["f1-score"])
    assert scores["entity_precision"] == pytest.approx(report["micro avg"]["precision"])
    assert scores["entity_recall"] == pytest.approx(report["micro avg"]["recall"])
    for kind in ("thing", "mood"):
        assert scores[f"entity_f1_{kind}"] == pytest.approx(report[kind]["f1-score"])
    right = [np.mean(np.equal(given, tags)) for given, tags in zip(predicted, true, strict=True)]
    assert scores["tag_accuracy"] == pytest.approx(np.mean(right))


def test_an_entity_among_cut_words_is_missed_and_one_across_the_cut_is_another() -> None:
    _, found = measured([[1, 2, 0, 3]], [[1, 2, 0, 3]], cut=1)
    thing, mood = found.amounts[0][:3].tolist(), found.amounts[0][3:6].tolist()
    assert thing == [0, 1, 1]  # one predicted, shorter than the true one
    assert mood == [0, 0, 1]


def test_six_entities_of_different_types_count_whole_and_a_site_clips_what_is_more() -> None:
    labels = ["O", *(f"{kind}-{number}" for number in range(6) for kind in "BI")]
    task = tasks.of(config_of(labels=labels))
    assert isinstance(task, TokenClassification)
    for entities, whole in ((6, True), (7, False)):
        tags = np.array([1, 3, 5, 7, 9, 11, 1][:entities])
        norm = np.linalg.norm(task._counted(tags, tags))
        assert (norm <= task.sensitivity + 1e-9) == whole


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["B-x", "I-x"], "'O'"),
        (["O", "B-x", "I-y"], "'I-y'"),
        (["O", "other"], "'other'"),
    ],
)
def test_labels_that_are_not_iob2_are_refused(labels: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tasks.of(config_of(labels=labels))


def test_a_word_without_a_tag_is_an_error_that_names_the_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "words": ["a", "b"], "tags": ["O"]}\n')
    with pytest.raises(DataError, match="row 1: there are 2 words and 1 tags"):
        read(tmp_path / "rows.jsonl", tasks.of(config_of()))


def test_under_privacy_a_tiny_network_learns_to_tag(tmp_path: Path, tiny_model: Path, moonflower_home: Path) -> None:
    draw = random.Random(0)  # noqa: S311 - a test
    tag_of = {
        "good": "B-mood",
        "bad": "B-mood",
        "film": "B-thing",
        "book": "B-thing",
        "the": "O",
        "was": "O",
        "so": "O",
    }

    def row() -> dict[str, Any]:
        words = [draw.choice(list(tag_of)) for _ in range(draw.randrange(2, 9))]
        return {"words": words, "tags": [tag_of[word] for word in words]}

    settings = {
        "name": "tags",
        "model": {"name": str(tiny_model), "trainable": "full"},
        "task": {"name": "token-classification", "labels": LABELS, "max_length": 16},
        "warm_start": {"rounds": 2, "sampling_rate": 0.5, "clipping_norm": 1.0},
        "training": {"rounds": 12, "sampling_rate": 0.5, "clipping_norm": 1.0, "server_learning_rate": 0.02},
        "evaluation": {"every": 7},
    }
    before, after, pooled = tiny_networks.run(
        tmp_path,
        settings,
        {"one": [row() for _ in range(400)], "two": [row() for _ in range(400)]},
        [row() for _ in range(100)],
    )
    assert after["tag_accuracy"] > before["tag_accuracy"] + 0.15, (before, after)
    assert pooled.keys() == after.keys() - {"loss", "records"}
