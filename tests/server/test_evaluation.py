"""Scores of the public test set: exact, on the whole set or its first part, and bad rows named."""

import json

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from server import evaluation
from shared import models, records
from shared.errors import DataError
from shared.examples import Examples, collate
from simulations import scenario


@pytest.fixture(scope="module")
def config(tiny_scenario):
    return scenario.load(
        str(tiny_scenario), {"evaluation.quick_records": 11, "hardware.precision": "float32"}
    ).run_config()


@pytest.fixture(scope="module")
def model(config):
    return models.load(config)


def expected(model, config, test):
    """Score one text at a time, without buckets, caches or histograms."""
    logits, labels = [], [config.task.labels.index(record.values["label"]) for record in test]
    for text in (record.values["text"] for record in test):
        encoded = model.task.encode({"text": text, "label": config.task.labels[0]}, model.processor)
        examples = Examples.single(model.task, model.processor, [encoded])
        with torch.no_grad():
            logits.append(model.outputs(collate(examples, [(0,)], torch.device("cpu")))[0])
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
    test = records.read(file, model.task, identified=False)
    assert len(test) == 40
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
            for name, value in expected(model, config, test[:held]).items():
                assert found[name] == pytest.approx(value, abs=0.05 if name == "auc" else 1e-5), name


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "row 2: not a JSON object"),
        ("[1]", "row 2: not a JSON object"),
        ('{"text": "x"}', "row 2: column 'label' is missing"),
        ('{"text": 3, "label": "positive"}', "row 2: 'text' holds a whole number, and no text"),
        ('{"text": "x", "label": "neutral"}', "row 2: .*'neutral', which is not one of the declared"),
    ],
)
def test_a_row_that_is_no_test_record_is_named(tmp_path, config, model, row, said):
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"text": "x", "label": "positive"}) + "\n" + row + "\n")
    with pytest.raises(DataError, match=said) as error:
        evaluation.TestSet(file, config, model)
    assert "\n" not in str(error.value)


def test_a_missing_an_empty_and_a_binary_file_are_named(tmp_path, config, model):
    with pytest.raises(DataError, match="cannot be read"):
        evaluation.TestSet(tmp_path / "none.jsonl", config, model)
    (tmp_path / "file.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="holds no records"):
        evaluation.TestSet(tmp_path / "file.jsonl", config, model)
    (tmp_path / "file.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="row 1: not UTF-8"):
        evaluation.TestSet(tmp_path / "file.jsonl", config, model)
