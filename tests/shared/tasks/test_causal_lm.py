"""Language modelling: what counts of a record, its loss by hand, its scores, and what the probe says of each kind of network."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from writers import END, LANGUAGE, config_of, language_model, probed

from client.evaluation import _add
from shared import models, tasks
from shared.errors import DataError, ModelError
from shared.examples import Examples, batches, collate
from shared.models import LoadedModel
from shared.records import read
from shared.scoring import exact
from shared.tasks.causal_lm import MOST_CHUNKS
from shared.tasks.tokens import IGNORED


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: language_model(tmp_path_factory.mktemp(kind), kind) for kind in LANGUAGE}


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> LoadedModel:
    return models.load(config_of(folders["llama"], "causal-lm"))


def kept(model: LoadedModel, **values: Any) -> list[dict[str, Any]]:
    return model.task.encode(values, model.processor)  # type: ignore[return-value]


# -- what counts ---------------------------------------------------------------------------------------------------


def test_every_token_of_a_text_and_its_end_are_foretold_from_what_comes_before(model: LoadedModel) -> None:
    (row,) = kept(model, text="so it was")
    ids = [*model.processor("so it was")["input_ids"], END]
    assert row["input_ids"].tolist() == ids[:-1]
    assert row["labels"].tolist() == ids[1:]


def test_of_a_prompt_and_its_completion_the_completion_alone_counts(model: LoadedModel) -> None:
    (row,) = kept(model, prompt="2+2=", completion="4")
    four = model.processor("4")["input_ids"]
    assert [label for label in row["labels"].tolist() if label != IGNORED] == [*four, END]
    assert row["labels"].tolist() == [IGNORED, IGNORED, IGNORED, *four, END]


def test_a_prompt_that_is_too_long_loses_its_beginning_and_a_completion_its_end(model: LoadedModel) -> None:
    (row,) = kept(model, prompt="a" * 30 + "b" * 20, completion="c" * 20)
    assert len(row["input_ids"]) == 32
    assert model.processor.decode(row["input_ids"]) == "b" * 12 + "c" * 20
    (row,) = kept(model, prompt="a" * 50, completion="c" * 50)
    assert model.processor.decode(row["input_ids"]) == "a" + "c" * 31
    assert (row["labels"] != IGNORED).all()


def test_of_a_conversation_the_assistants_turns_count_where_the_template_marks_them(model: LoadedModel) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (row,) = kept(model, messages=talk)
    assert model.processor.decode(row["labels"][row["labels"] != IGNORED]) == "yo</s>"
    marked = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    model.processor.chat_template = marked
    try:
        (row,) = kept(model, messages=talk)
    finally:
        model.processor.chat_template = None
    assert model.processor.decode(row["input_ids"]) == "[hi][yo"
    assert (row["labels"] != IGNORED).all()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a", "prompt": "b", "completion": "c"}, "this one holds completion, prompt, text"),
        ({"prompt": "b"}, "this one holds prompt"),
        ({"id": "1"}, "this one holds none of them"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "none of the role 'assistant'"),
        ({"text": " "}, "'text' is empty"),
    ],
)
def test_a_record_of_no_one_form_is_an_error_with_its_row(
    model: LoadedModel, tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="row 2") as fault:
        list(read(file, model.task, identified=False))
    assert said in str(fault.value)


# -- chunks --------------------------------------------------------------------------------------------------------


def test_a_long_text_is_chunks_that_lose_no_token_and_are_one_record(model: LoadedModel) -> None:
    text = "abcdefghij" * 9
    rows = kept(model, text=text)
    assert [len(row["input_ids"]) for row in rows] == [32, 32, 26]
    assert model.processor.decode(np.concatenate([row["input_ids"] for row in rows])) == text
    assert [int(row["begins"]) for row in rows] == [1, 0, 0]
    examples = Examples.single(model.task, model.processor, [rows, kept(model, text="short")])
    assert len(examples) == 2
    counts, loss = exact(model, examples, config_of(Path("any"), "causal-lm").hardware)
    assert counts[2] * math.sqrt(3) == pytest.approx(2)
    means = [np.mean([one(model, row) for row in each]) for each in (rows, kept(model, text="short"))]
    assert loss == pytest.approx(float(np.mean(means)), rel=1e-5)


def test_a_record_has_at_most_so_many_chunks(model: LoadedModel) -> None:
    assert len(kept(model, text="word " * 1000)) == MOST_CHUNKS


# -- loss ----------------------------------------------------------------------------------------------------------


def one(model: LoadedModel, row: dict[str, Any]) -> float:
    """Loss of one row, by a loop over its places."""
    ids = torch.from_numpy(row["input_ids"]).long().unsqueeze(0)
    with torch.no_grad():
        logits = model.module.encoder(input_ids=ids).logits[0].double()
    each = [
        float(logits[place].logsumexp(0) - logits[place, label])
        for place, label in enumerate(row["labels"].tolist())
        if label != IGNORED
    ]
    return sum(each) / len(each)


TEXTS = ("the film was good", "so", "and the book was really very bad")


@pytest.mark.parametrize("kind", list(LANGUAGE))
@torch.no_grad()
def test_a_records_loss_is_its_own_whatever_it_is_padded_to(folders: dict[str, Path], kind: str) -> None:
    model = models.load(config_of(folders[kind], "causal-lm"))
    rows = [*(kept(model, text=text)[0] for text in TEXTS), kept(model, prompt="is it ", completion="fine")[0]]
    examples = Examples.single(model.task, model.processor, rows)
    expected = [one(model, row) for row in rows]
    for width in (None, (48,)):
        batch = collate(examples, [(0,), (1,), (2,), (3,)], torch.device("cpu"), width)
        found = model.task.losses(model.outputs(batch), batch)
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_lengths_are_grouped_by_their_own_bucket(model: LoadedModel) -> None:
    rows = [kept(model, text="a" * length)[0] for length in (3, 20, 5, 16)]
    examples = Examples.single(model.task, model.processor, rows)
    assert list(batches(examples, [(n,) for n in range(4)], 8)) == [[0, 2, 3], [1]]


# -- scores --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_scores_are_means_over_records_and_perplexity_is_exp_of_the_mean_loss(model: LoadedModel) -> None:
    rows = [kept(model, text=text)[0] for text in TEXTS]
    examples = Examples.single(model.task, model.processor, rows)
    counts, _ = exact(model, examples, config_of(Path("any"), "causal-lm").hardware)
    found = {score.name: score.value for score in model.task.scores(counts, 0.0)}
    most = math.log(model.task.vocabulary)  # type: ignore[attr-defined]
    assert found["loss"] == pytest.approx(float(np.mean([min(one(model, row), most) for row in rows])), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    guessed = []
    for row in rows:
        logits = model.module.encoder(input_ids=torch.from_numpy(row["input_ids"]).long().unsqueeze(0)).logits[0]
        guessed.append(float((logits.argmax(-1).numpy() == row["labels"]).mean()))
    assert found["token_accuracy"] == pytest.approx(float(np.mean(guessed)))


@torch.no_grad()
def test_what_a_record_adds_has_a_norm_of_at_most_one_however_wrong_the_model_is(model: LoadedModel) -> None:
    rows = [kept(model, text=text)[0] for text in TEXTS]
    batch = collate(Examples.single(model.task, model.processor, rows), [(0,), (1,), (2,)], torch.device("cpu"))
    outputs = model.outputs(batch)
    for factor in (0.0, 1.0, 1e6, math.nan):
        outputs.logits = outputs.logits * factor
        measured = model.task.measure(outputs, batch)
        assert (np.linalg.norm(measured.amounts, axis=1) <= model.task.sensitivity + 1e-12).all()
        total = np.zeros(3, dtype=np.int64)
        _add(total, measured, np.full(3, 1024), model.task)
        assert total[2] == 3 * int(1024 / math.sqrt(3))
    assert measured.amounts[:, 0] == pytest.approx(1 / math.sqrt(3))  # what is no number counts as knowing nothing


def test_noise_leaves_intervals_around_loss_and_perplexity(model: LoadedModel) -> None:
    counts = np.array([30.0, 40.0, 100.0])
    loss, perplexity, guessed = model.task.scores(counts, 2.0)
    assert loss.low is not None
    assert loss.high is not None
    assert loss.low < loss.value < loss.high
    assert (perplexity.low, perplexity.high) == (math.exp(loss.low), math.exp(loss.high))
    assert (loss.name, perplexity.name, guessed.name) == ("loss", "perplexity", "token_accuracy")


# -- the probe -----------------------------------------------------------------------------------------------------

TARGETS = {"gpt2": ["c_attn"], "gpt-neox": ["query_key_value"], "opt": ["q_proj", "fc1"]}


@pytest.mark.parametrize("trainable", ["full", "lora"])
@pytest.mark.parametrize("kind", list(LANGUAGE))
def test_one_pass_gives_each_records_own_gradient(folders: dict[str, Path], kind: str, trainable: str) -> None:
    lora = {"rank": 2, "targets": TARGETS.get(kind, ["q_proj", "v_proj"])}
    config = config_of(
        folders[kind], "causal-lm", model={"trainable": trainable, "lora": lora}, hardware={"gradients": "one-pass"}
    )
    assert probed(config) == "one-pass"


def test_the_probe_refuses_a_loss_that_is_the_batchs_mean_over_tokens(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers' own `.loss` is: a record's share of it depends on how long the others are."""
    from shared.errors import SensitivityError
    from shared.tasks.tokens import Writing

    right = Writing.losses

    def coupled(self: Writing, outputs: Any, batch: Any) -> torch.Tensor:
        counted = (batch["labels"] != IGNORED).sum(1).double()
        return right(self, outputs, batch) * counted / counted.sum() * len(counted)

    monkeypatch.setattr(Writing, "losses", coupled)
    with pytest.raises(SensitivityError):
        probed(config_of(folders["llama"], "causal-lm"))


def test_a_tokenizer_of_another_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(folders["llama"]).save_pretrained(tmp_path)
    small = LlamaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    LlamaForCausalLM(small).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="100 embeddings"):
        models.load(config_of(tmp_path, "causal-lm"))


def test_the_task_has_no_labels_and_no_head(folders: dict[str, Path]) -> None:
    from shared.errors import ConfigError

    with pytest.raises(ConfigError, match="causal-lm has no labels"):
        tasks.of(config_of(Path("any"), "causal-lm", task={"labels": ["a", "b"]}))
    with pytest.raises(ConfigError, match="train the head alone, and causal-lm has none"):
        models.load(config_of(folders["llama"], "causal-lm", warm_start={"rounds": 1, "sampling_rate": 0.5}))
