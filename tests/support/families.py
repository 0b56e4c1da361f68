"""One tiny network of each family of architectures, with random weights, and a batch that it takes."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from shared.models import Whole

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
WORDS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STACKS = {
    **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 1},
    **{"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> transformers' class, settings
    "bert": ("BertForTokenClassification", SMALL | WORDS | QUIET),
    "roberta": ("RobertaForTokenClassification", SMALL | WORDS | QUIET | {"max_position_embeddings": 40}),
    "gpt2": (
        "GPT2LMHeadModel",
        WORDS | {"n_embd": 16, "n_layer": 3, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "llama": ("LlamaForCausalLM", SMALL | WORDS),
    "t5": (
        "T5ForConditionalGeneration",
        WORDS
        | {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
        | {"dropout_rate": 0.0, "decoder_start_token_id": 0},
    ),
    "bart": ("BartForConditionalGeneration", STACKS | WORDS | {"forced_eos_token_id": None}),
    "whisper": (
        "WhisperForConditionalGeneration",
        STACKS | WORDS | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20},
    ),
    "vit": ("ViTForImageClassification", SMALL | QUIET | {"image_size": 8, "patch_size": 4}),
    "dinov2": (
        "Dinov2ForImageClassification",
        {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2}
        | {"image_size": 8, "patch_size": 4}
        | QUIET,
    ),
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification",
        SMALL
        | {"conv_dim": (8, 8), "conv_kernel": (8, 4), "conv_stride": (4, 2), "num_feat_extract_layers": 2}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
        | {"hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "activation_dropout": 0.0}
        | {"layerdrop": 0.0, "final_dropout": 0.0, "apply_spec_augment": False},
    ),
}
SEQ2SEQ, IMAGES = ("t5", "bart", "whisper"), ("vit", "dinov2")


def network(family: str) -> Whole:
    """Return the network of a family, the same each time."""
    name, settings = FAMILIES[family]
    kind = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = kind.config_class(**settings)
        made._attn_implementation = "eager"
        return Whole(kind(made))


def batch(family: str, records: int = 2) -> dict[str, Tensor]:
    """Return inputs of so many records."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (records, 6), generator=draw)
    if family == "whisper":
        return {"input_features": torch.randn((records, 8, 20), generator=draw), "decoder_input_ids": ids}
    if family == "wav2vec2":
        return {"input_values": torch.randn((records, 120), generator=draw)}
    if family in IMAGES:
        return {"pixel_values": torch.randn((records, 3, 8, 8), generator=draw)}
    mask = torch.ones_like(ids)
    both = {"input_ids": ids, "attention_mask": mask}
    return {**both, "decoder_input_ids": ids.flip(1)} if family in SEQ2SEQ else both


def loss(family: str, module: nn.Module) -> Callable[..., Tensor]:
    """Return a function of the batch's values that gives a loss a record."""
    names = list(batch(family))

    def of(*values: Tensor) -> Tensor:
        logits: Tensor = module(**dict(zip(names, values, strict=True))).logits
        return logits.double().flatten(1).square().mean(1)

    return of
