"""Tiny networks for images and sounds with random weights, and whether the engine is right on one."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForAudioClassification, AutoModelForImageClassification

from client.privacy import probe
from client.privacy.engine import Gradients, train_only
from client.training import EncoderPass
from shared import models
from shared.examples import Examples
from shared.run_config import RunConfig

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
EYES: dict[str, Any] = {
    "vit": transformers.ViTConfig(image_size=16, patch_size=8, **SHAPE),
    "deit": transformers.DeiTConfig(image_size=16, patch_size=8, architectures=["DeiTForImageClassification"], **SHAPE),
    "dinov2": transformers.Dinov2Config(image_size=28, patch_size=8, mlp_ratio=2, **SHAPE),  # positions interpolated
    "swin": transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2, mlp_ratio=2
    ),
    "convnext": transformers.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, patch_size=4),
    "resnet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"),
}
EARS: dict[str, Any] = {
    "whisper": transformers.WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1, num_mel_bins=8,
        decoder_attention_heads=2, decoder_ffn_dim=32, max_source_positions=100, vocab_size=20, classifier_proj_size=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    ),
    "wav2vec2": transformers.Wav2Vec2Config(
        conv_dim=(8, 8), conv_kernel=(10, 8), conv_stride=(40, 20), num_feat_extract_layers=2, classifier_proj_size=8,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=20, layerdrop=0.5, **SHAPE,
    ),
    "ast": transformers.ASTConfig(max_length=64, num_mel_bins=32, **SHAPE),
}  # fmt: skip
HEARING: dict[str, Any] = {
    "whisper": transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=2),
    "wav2vec2": transformers.Wav2Vec2FeatureExtractor(do_normalize=True),
    "ast": transformers.ASTFeatureExtractor(max_length=64, num_mel_bins=32),
}


def write_eye(folder: Path, kind: str, processor: Any = None) -> str:
    """Write a reader of images of 16 x 16, whose outputs differ; give the folder's name."""
    processor = processor or transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    return _write(folder, EYES[kind], AutoModelForImageClassification)


def write_ear(folder: Path, kind: str) -> str:
    """Write a listener; give the folder's name."""
    HEARING[kind].save_pretrained(folder)
    return _write(folder, EARS[kind], AutoModelForAudioClassification)


def _write(folder: Path, settings: Any, auto: Any) -> str:
    settings = type(settings).from_dict(settings.to_dict() | {"initializer_range": 0.2})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        auto.from_config(settings).save_pretrained(folder)
    return str(folder)


def config(task: str, name: str, trainable: str, **sections: Any) -> RunConfig:
    """Give a run of three labels; `sections` are merged in."""
    model = {"name": name, "trainable": trainable, "lora": {"rank": 2, "alpha": 2, "targets": ["all-linear"]}}
    base = {
        "model": model,
        "task": {"name": task, "labels": ["a", "b", "c"], "max_seconds": 1},
        "training": {"rounds": 1, "sampling_rate": 0.5},
        "hardware": {"gradients": "one-pass"},
    }
    return RunConfig.model_validate({key: value | sections.pop(key, {}) for key, value in base.items()} | sections)


def probed(run: RunConfig) -> str:
    """Run the probe in full, and once more as before a later release; give the method that it settles on."""
    model = models.load(run)
    parameters = train_only(model.module, model.trainable)
    objective = EncoderPass(model, Examples.single(model.task, model.processor, []), run)
    with Gradients(objective.module, parameters, run.hardware.gradients) as gradients:
        probe.check(objective.module, gradients, *objective.made_up())
        probe.agrees(gradients, *objective.made_up(only_one_batch=True))
        return gradients.method
