"""Tiny networks of several kinds with random weights, and a whole private run on one."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, BertConfig, DistilBertConfig, GPT2Config, LlamaConfig, RobertaConfig

from server import job
from server.evaluation import TestSet
from server.history.store import History
from shared import models
from simulations import engine, prepare, scenario

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


def write(folder: Path, tokenizer: Any, kind: str, auto: Any = AutoModel, **changes: Any) -> str:
    """Write a network of a kind and its tokenizer; give the folder's name."""
    settings = CONFIGS[kind](len(tokenizer))
    settings.initializer_range = 0.2  # so that outputs differ
    for name, value in changes.items():
        setattr(settings, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = auto.from_config(settings)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


Row = Mapping[str, Any]


def run(
    folder: Path, settings: Mapping[str, Any], sites: Mapping[str, Sequence[Row]], test: Sequence[Row]
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Play a whole run, by default under epsilon 8; give its test scores before and after, and the validation scores.

    `settings` are a scenario's, but for data and sites; MOONFLOWER_HOME is set by the caller.
    """
    for name, rows in {**sites, "test": test}.items():
        text = "".join(json.dumps(dict(row) | {"id": f"{name}/{n}"}) + "\n" for n, row in enumerate(rows))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    told = {
        "data": {"source": "folder", "folder": str(folder), "validation": 0.2},
        "sites": [{"name": name, "records": len(rows)} for name, rows in sites.items()],
    }
    made = scenario.Scenario.model_validate(told | dict(settings))
    database = f"sqlite:///{folder / 'history.db'}"
    with History.open(database) as history:
        run = prepare.prepare(made, history)
        engine.play(run, database, None)
        metrics = [metric for _, metric in history.metrics(run, round_number=made.run_config().rounds)]
    held = job.load(prepare.run_folder(run))
    model = models.load(held.config)
    before = TestSet(held.test_set, held.config, model).score(model.arrays(), whole=True)
    after = [metric for metric in metrics if metric.scope == "test"]
    pooled = [metric for metric in metrics if metric.scope == "validation" and metric.site is None]
    return tuple({metric.name: metric.value for metric in each} for each in (before, after, pooled))  # type: ignore[return-value]
