"""Texts, pairs and several labels, with our head and with transformers' own, of each kind of network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

from shared import models, tasks
from shared.errors import ModelError
from shared.examples import Examples, collate
from shared.records import read
from shared.run_config import RunConfig

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CONFIGS: dict[str, Callable[[int], Any]] = {
    "bert": lambda words: BertConfig(vocab_size=words, max_position_embeddings=64, **SHAPE),
    "roberta": lambda words: RobertaConfig(
        vocab_size=words, max_position_embeddings=66, pad_token_id=1, type_vocab_size=1, **SHAPE
    ),
    "distilbert": lambda words: DistilBertConfig(
        vocab_size=words, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64
    ),
    "gpt2": lambda words: GPT2Config(
        vocab_size=words, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=2, bos_token_id=2
    ),
    "llama": lambda words: LlamaConfig(vocab_size=words, num_key_value_heads=2, pad_token_id=None, **SHAPE),
}


def write_model(folder: Path, tokenizer: Any, kind: str, labels: int | None) -> str:
    """Write random weights: a bare network, or one with a head for so many labels."""
    settings = CONFIGS[kind](len(tokenizer))
    settings.initializer_range = 0.2  # so that outputs differ
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if labels is None:
            network = AutoModel.from_config(settings)
        else:
            settings.num_labels = labels
            network = AutoModelForSequenceClassification.from_config(settings)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def config_of(model: str, head: str = "native", **task: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": model, "head": head, "trainable": "full"},
            "task": {"labels": ["bad", "good", "neither"], "max_length": 32, **task},
            "training": {"rounds": 1, "sampling_rate": 0.5},
        }
    )


TEXTS = ("good film", "the book was really so very bad and we found it dull and the song was awful and poor", "fine")


@pytest.mark.parametrize("head", ["native", "pooled"])
@pytest.mark.parametrize("kind", list(CONFIGS))
@torch.no_grad()
def test_a_text_gets_the_same_output_alone_and_padded_beside_others(
    tmp_path: Path, tokenizer: Any, kind: str, head: str
) -> None:
    model = models.load(config_of(write_model(tmp_path, tokenizer, kind, None), head))
    encoded = [model.task.encode({"text": text, "label": "good"}, model.processor) for text in TEXTS]
    examples = Examples.single(model.task, model.processor, encoded)
    units = [(number,) for number in range(len(TEXTS))]
    together = model.outputs(collate(examples, units, torch.device("cpu"), (48,)))
    for number, unit in enumerate(units):
        width = (len(encoded[number]["input_ids"]),)  # not padded at all
        alone = model.outputs(collate(examples, [unit], torch.device("cpu"), width))
        torch.testing.assert_close(together[number : number + 1], alone, rtol=1e-4, atol=1e-5)
    assert together.shape == (3, 3)
    assert float((together[0] - together[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_a_decoders_logits_are_transformers_own_without_padding(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    folder = write_model(tmp_path, tokenizer, kind, 3)
    model, own = models.load(config_of(folder)), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    encoded = model.task.encode({"text": TEXTS[1], "label": "good"}, model.processor)
    examples = Examples.single(model.task, model.processor, [encoded])
    padded = model.outputs(collate(examples, [(0,)], torch.device("cpu"), (48,)))
    expected = own(input_ids=torch.from_numpy(encoded["input_ids"]).long()[None]).logits
    torch.testing.assert_close(padded, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_model_keeps_its_head_where_it_has_as_many_labels_and_gets_a_new_one_else(
    tmp_path: Path, tokenizer: Any, kind: str
) -> None:
    for labels, kept in ((3, True), (2, False), (None, False)):
        folder = write_model(tmp_path / str(labels), tokenizer, kind, labels)
        held = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels or 3)
        weights = [part.weight for part in held.modules() if isinstance(part, torch.nn.Linear)][-1]
        head = models.load(config_of(folder)).module.head.weight
        assert head.shape == (3, 32)
        assert (head.shape == weights.shape and torch.equal(head, weights)) == kept


def test_an_encoder_and_decoder_is_refused_for_its_head_couples_records(tmp_path: Path, tokenizer: Any) -> None:
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    shape |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64}
    network = AutoModel.from_config(BartConfig(vocab_size=len(tokenizer), **shape))
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is not for bart, an encoder and decoder"):
        models.load(config_of(str(tmp_path)))


@pytest.mark.parametrize("head", ["native", "pooled"])
@torch.no_grad()
def test_tokens_of_a_pair_say_which_text_they_are_of(tmp_path: Path, tokenizer: Any, head: str) -> None:
    model = models.load(config_of(write_model(tmp_path, tokenizer, "bert", None), head, pairs=True))
    values = {"text": "good film", "pair": "the book was bad", "label": "good"}
    encoded = model.task.encode(values, model.processor)
    assert encoded["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    examples = Examples.single(model.task, model.processor, [encoded])
    batch = collate(examples, [(0,)], torch.device("cpu"))
    expected = model.processor(
        "good film", "the book was bad", padding="max_length", max_length=16, return_tensors="pt"
    )
    assert {name: value.tolist() for name, value in model.inputs(batch).items()} == {
        name: value.tolist() for name, value in expected.items()
    }
    plain = model.module(**{name: value for name, value in model.inputs(batch).items() if name != "token_type_ids"})
    assert float((model.outputs(batch) - plain).abs().max()) > 1e-3
    made = model.task.made_up(7, np.random.default_rng(0).random, model.processor)
    assert made["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "gpt2"])
def test_a_network_that_knows_no_token_types_gets_none(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    model = models.load(config_of(write_model(tmp_path, tokenizer, kind, None), pairs=True))
    encoded = model.task.encode({"text": "good film", "pair": "bad", "label": "good"}, model.processor)
    assert sorted(encoded) == ["input_ids", "labels"]


@pytest.mark.parametrize(
    ("pairs", "row", "said"),
    [
        (True, '{"id": 1, "text": "a", "label": "good"}', "row 1: there is no column 'pair', and task.pairs=true"),
        (
            False,
            '{"id": 1, "text": "a", "pair": "b", "label": "good"}',
            "row 1: there is a column 'pair', and task.pair",
        ),
        (True, '{"id": 1, "text": "a", "pair": "", "label": "good"}', "'pair' is empty"),
    ],
)
def test_a_record_has_a_pair_where_the_run_has_and_only_there(tmp_path: Path, pairs: bool, row: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    with pytest.raises(Exception, match=said):
        list(read(tmp_path / "rows.jsonl", tasks.of(config_of("any", pairs=pairs))))


@torch.no_grad()
def test_a_record_of_several_labels_adds_one_to_each_labels_histogram(tmp_path: Path, tokenizer: Any) -> None:
    model = models.load(config_of(write_model(tmp_path, tokenizer, "bert", None), multi_label=True))
    encoded = [
        model.task.encode({"text": text, "label": held}, model.processor)
        for text, held in zip(TEXTS, [("bad", "good"), (), ("neither",)], strict=True)
    ]
    batch = collate(
        Examples.single(model.task, model.processor, encoded), [(0,), (1,), (2,)], torch.device("cpu"), (32,)
    )
    outputs = model.outputs(batch)
    measured = model.task.measure(outputs, batch)
    assert np.linalg.norm(measured.amounts, axis=1) == pytest.approx([model.task.sensitivity] * 3)
    counts = np.zeros(int(np.prod(model.task.cells)))
    np.add.at(counts, measured.cells, measured.amounts)
    by_label = counts.reshape(model.task.cells).sum(-1)
    assert by_label.tolist() == [[2, 1], [2, 1], [2, 1]]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(outputs, batch["labels"], reduction="none").mean(1)
    torch.testing.assert_close(model.task.losses(outputs, batch).float(), expected)
