"""Scores of the public test set: exact, on the whole set or its first part, and bad rows named."""

import json

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from server import evaluation
from server.evaluation import read
from shared import models
from shared.errors import DataError
from shared.run_config import Task
from shared.tasks.text_classification import collate, tokenise
from simulations import scenario

TASK = Task(labels=("negative", "positive"))


@pytest.fixture(scope="module")
def config(tiny_scenario):
    return scenario.load(
        str(tiny_scenario), {"evaluation.quick_records": 11, "hardware.precision": "float32"}
    ).run_config()


@pytest.fixture(scope="module")
def model(config):
    return models.load(config)


def expected(model, config, texts, labels):
    """Score one text at a time, without buckets, caches or histograms."""
    logits = []
    for text in texts:
        examples = tokenise(model.tokenizer, [text], [0], config.task.max_length)
        batch = collate(examples, [0], torch.device("cpu"))
        with torch.no_grad():
            logits.append(model.module(batch.input_ids, batch.attention_mask)[0])
    stacked = torch.stack(logits)
    chances = stacked.softmax(1)[:, 1].numpy()
    return {
        "accuracy": sk.accuracy_score(labels, stacked.argmax(1)),
        "f1": sk.f1_score(labels, stacked.argmax(1), average="macro"),
        "auc": sk.roc_auc_score(labels, chances),
        "loss": float(torch.nn.functional.cross_entropy(stacked, torch.tensor(labels))),
        "records": len(labels),
    }


def test_scores_are_those_of_one_record_at_a_time_after_every_change_of_the_arrays(tiny_scenario, config, model):
    file = tiny_scenario.parent / "test.jsonl"
    texts, labels = read(file, config.task)
    assert len(texts) == 40
    test_set = evaluation.TestSet(file, config, model)
    random = np.random.default_rng(0)
    trained = model.arrays()
    changes = [name for name in trained if name.startswith("head.")], list(trained), []
    for names in changes:  # the head alone, then the encoder, then nothing
        trained = {
            name: array + random.normal(0, 0.5, array.shape).astype(np.float32) if name in names else array
            for name, array in trained.items()
        }
        for whole, held in ((False, 11), (True, 40)):
            scored = test_set.score(trained, whole=whole)
            assert {(m.scope, m.site, m.low, m.high) for m in scored} == {("test", None, None, None)}
            found = {m.name: m.value for m in scored}
            for name, value in expected(model, config, texts[:held], labels[:held]).items():
                assert found[name] == pytest.approx(value, abs=0.05 if name == "auc" else 1e-5), name


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "row 2: not a JSON object with a text and a label"),
        ("[1]", "row 2: not a JSON object with a text and a label"),
        ('{"text": "x"}', "row 2: not a JSON object with a text and a label"),
        ('{"text": 3, "label": "positive"}', "row 2: not a JSON object with a text and a label"),
        ('{"text": "x", "label": "neutral"}', "row 2: label 'neutral' is not one of the declared"),
    ],
)
def test_a_row_that_is_no_test_record_is_named(tmp_path, row, said):
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"text": "x", "label": "positive"}) + "\n" + row + "\n")
    with pytest.raises(DataError, match=said) as error:
        read(file, TASK)
    assert "\n" not in str(error.value)


def test_a_missing_an_empty_and_a_binary_file_are_named(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "none.jsonl", TASK)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="holds no records"):
        read(tmp_path / "file", TASK)
    (tmp_path / "file").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "file", TASK)
