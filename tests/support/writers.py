"""Tiny models that write, of random weights, in folders: language models, models of two parts, and one that hears."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from client.privacy import probe
from client.privacy.engine import Gradients, train_only
from client.training import EncoderPass
from shared import models
from shared.examples import Examples
from shared.models import LoadedModel
from shared.run_config import RunConfig

PAD, END, START = 0, 1, 2
SPECIAL = ["<pad>", "</s>", "<start>"]
VOCABULARY = 272  # bytes, special tokens, and some that no text gives
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PARTS = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
TOKENS = {"pad_token_id": PAD, "bos_token_id": END, "eos_token_id": END}

LANGUAGE: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=64, num_key_value_heads=1, **SIZES, **TOKENS
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, **TOKENS
    ),
    "qwen2": lambda: transformers.Qwen2Config(
        vocab_size=VOCABULARY, max_position_embeddings=64, num_key_value_heads=1, tie_word_embeddings=True, **SIZES, **TOKENS
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY, max_position_embeddings=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=64, word_embed_proj_dim=32, **TOKENS,
    ),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **SIZES, **TOKENS),
}  # fmt: skip
TWO_PARTS: dict[str, Callable[[], Any]] = {
    "t5": lambda: transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=PAD,
        **TOKENS,
    ),
    "bart": lambda: transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=32, max_position_embeddings=64, decoder_start_token_id=END, **PARTS, **TOKENS
    ),
    "marian": lambda: transformers.MarianConfig(
        vocab_size=VOCABULARY, decoder_vocab_size=VOCABULARY, d_model=32, max_position_embeddings=64,
        decoder_start_token_id=PAD, **PARTS, **TOKENS,
    ),
}  # fmt: skip


def tokenizer(template: str | None = None, **special: str) -> Any:
    """Return a tokenizer whose tokens are bytes."""
    alphabet = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    if template is not None:
        made.post_processor = processors.TemplateProcessing(
            single=template,
            special_tokens=[(token, SPECIAL.index(token)) for token in template.split() if token in SPECIAL],
        )
    given = {"pad_token": "<pad>", "eos_token": "</s>"} | special
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **given)


def language_model(folder: Path, kind: str) -> Path:
    """Write a model that goes on with a text."""
    tokenizer().save_pretrained(folder)
    return _save(folder, transformers.AutoModelForCausalLM, LANGUAGE[kind]())


def two_parts(folder: Path, kind: str) -> Path:
    """Write a model of an encoder and a decoder."""
    tokenizer("$A </s>").save_pretrained(folder)
    return _save(folder, transformers.AutoModelForSeq2SeqLM, TWO_PARTS[kind]())


def whisper(folder: Path, seconds: int = 2) -> Path:
    """Write a model that hears so many seconds."""
    hearing = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=seconds)
    transformers.WhisperProcessor(hearing, tokenizer("<start> $A </s>")).save_pretrained(folder)
    settings = transformers.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=32, max_source_positions=50 * seconds, max_target_positions=64,
        decoder_start_token_id=START, suppress_tokens=None, begin_suppress_tokens=None, **PARTS, **TOKENS,
    )  # fmt: skip
    return _save(folder, transformers.WhisperForConditionalGeneration, settings)


def _save(folder: Path, kind: Any, settings: Any) -> Path:
    settings.initializer_range = settings.init_std = settings.initializer_factor = 0.5  # so that outputs differ
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = kind.from_config(settings) if hasattr(kind, "from_config") else kind(settings)
    network.save_pretrained(folder)
    return folder


def config_of(folder: Path, name: str, **changes: Any) -> RunConfig:
    """Return a run on a model; sections are merged in."""
    base: dict[str, Any] = {
        "model": {"name": str(folder), "trainable": "full"},
        "task": {"name": name, "max_length": 32, "max_target_length": 32},
        "training": {"rounds": 1, "sampling_rate": 0.5},
        "hardware": {"precision": "float32"},
    }
    for section, values in changes.items():
        base[section] = base.get(section, {}) | values
    return RunConfig.model_validate(base)


def probed(config: RunConfig) -> str:
    """Probe the engine in full on a run's model, and return the method that it settles on."""
    model: LoadedModel = models.load(config)
    parameters = train_only(model.module, model.trainable)
    objective = EncoderPass(model, Examples.single(model.task, model.processor, []), config)
    with Gradients(objective.module, parameters, config.hardware.gradients) as gradients:
        probe.check(objective.module, gradients, *objective.made_up())
        return gradients.method
