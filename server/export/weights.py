"""The weights of an export: a PEFT adapter or a whole encoder, and the head as sentence-transformers lays it out.

No class of transformers has mean pooling, a layer norm and a linear layer on top of any encoder. The modules of
sentence-transformers have exactly that: Pooling, LayerNorm, Dense. So the head lies in their folders, whose files plain
code reads as well (`server.export.plain`). Everything is safetensors and JSON.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel

from shared.models import LoadedModel, Network

POOLING, NORM, HEAD = "1_Pooling", "2_LayerNorm", "3_Dense"
MODULES = (("", "Transformer"), (POOLING, "Pooling"), (NORM, "LayerNorm"), (HEAD, "Dense"))


def write_adapter(folder: Path, model: LoadedModel, base: str | None) -> None:
    """Write the adapters of a LoRA run as PEFT does, for `PeftModel.from_pretrained`.

    `base` is the base model's name on the Hub, where it has one. The adapted layers are named one by one: a pattern
    could match a layer that was not adapted, such as the pooler, which the run leaves out.
    """
    encoder = model.module.encoder
    adapted = [name for name, _ in _layers(encoder)]
    made: dict[str, LoraConfig] = encoder.peft_config  # type: ignore[assignment]
    settings = replace(
        made["default"],
        layers_to_transform=None,
        base_model_name_or_path=base,
        task_type="FEATURE_EXTRACTION",
        inference_mode=True,
    )
    tensors = {
        f"base_model.model.{name.replace('.default.', '.')}": parameter.detach().clone()
        for name, parameter in encoder.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    settings.target_modules = adapted  # in order, where PEFT makes a set of them
    settings.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def write_merged(folder: Path, model: LoadedModel, source: str, labels: tuple[str, ...]) -> None:
    """Write the whole encoder, adapters added into its weights, for `AutoModel.from_pretrained`.

    It is written into a fresh copy of the base from `source`, which keeps its own configuration (dropout) and its pooler,
    untrained.
    """
    trained = model.module.encoder
    for _, layer in _layers(trained):
        layer.merge()
    base, found = AutoModel.from_pretrained(
        source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if any("pooler" in key for key in found["missing_keys"]):
        base.pooler = None  # drawn at random a line ago
    parameters = dict(base.named_parameters())
    for name, parameter in trained.named_parameters():
        if ".lora_" not in name:
            parameters[name.replace(".base_layer.", ".")].copy_(parameter)
    base.config.id2label = dict(enumerate(labels))
    base.config.label2id = {label: number for number, label in enumerate(labels)}
    base.save_pretrained(folder)


def write_head(folder: Path, module: Network) -> None:
    """Write pooling, layer norm and head; the layer norm's weight is the run's feature scale."""
    width, labels = module.head.in_features, module.head.out_features
    scale = torch.full((width,), module.feature_scale)
    _module(folder / POOLING, {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True})
    _module(folder / NORM, {"dimension": width}, {"norm.weight": scale, "norm.bias": torch.zeros(width)})
    shape = {"in_features": width, "out_features": labels, "bias": True}
    linear = {f"linear.{name}": value.detach().clone() for name, value in module.head.named_parameters()}
    _module(folder / HEAD, {**shape, "activation_function": "torch.nn.modules.linear.Identity"}, linear)
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(MODULES)
    ]
    (folder / "modules.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


def _module(folder: Path, settings: dict[str, object], tensors: dict[str, Tensor] | None = None) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if tensors:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _layers(encoder: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, part) for name, part in encoder.named_modules() if isinstance(part, LoraLayer))
