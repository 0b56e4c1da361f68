"""The weights of an export, under the names that transformers' own class has for them; safetensors and JSON alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from shared.models import LoadedModel, Native
from shared.tasks.base import Task


def auto(task: Task) -> str:
    """Name transformers' class for an export of this task."""
    return "AutoModel" if task.model == "pooled" else task.auto


@torch.no_grad()
def values(model: LoadedModel) -> dict[str, Tensor]:
    """Return every parameter by its name in transformers' class: adapters added in, the head in its place."""
    found = plain(model)
    for name, layer in adapted(model.module.encoder):
        found[f"{name}.weight"] = found[f"{name}.weight"] + layer.get_delta_weight("default")
    return found


@torch.no_grad()
def plain(model: LoadedModel) -> dict[str, Tensor]:
    """Return what `values` does, without the adapters.

    A `native` head's features are scaled by `feature_scale` in a run, and not in transformers' class: here the weight is.
    """
    module = model.module
    found = {
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in module.encoder.named_parameters()
        if ".lora_" not in name
    }
    if isinstance(module, Native):
        found[f"{module.place}.weight"] = module.head.weight.detach() * module.feature_scale
        if module.head.bias is not None:
            found[f"{module.place}.bias"] = module.head.bias.detach()
    return found


def adapted(encoder: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the adapted layers and their names."""
    return ((name, part) for name, part in encoder.named_modules() if isinstance(part, LoraLayer))


def base(located: str, task: Task) -> PreTrainedModel:
    """Load transformers' class with the base's weights, labels in its configuration, dropout as the base has it.

    What the base does not have is drawn at random: it is in the run's model.
    """
    settings = transformers.AutoConfig.from_pretrained(located, trust_remote_code=False)
    cache = getattr(settings, "use_cache", None)
    labels = task.settings.labels
    if labels:
        settings.id2label = dict(enumerate(labels))
        settings.label2id = {label: number for number, label in enumerate(labels)}
    if labels and task.model == "native":
        settings.problem_type = f"{'multi' if task.settings.multi_label else 'single'}_label_classification"
    task.adjust(settings)
    if cache is not None:
        settings.use_cache = cache  # training keeps nothing of a pass; writing is quick with it
    model, found = under(located, auto(task), settings)
    if task.model == "pooled" and any("pooler" in key for key in found["missing_keys"]):
        model.pooler = None  # type: ignore[assignment]  # drawn at random a line ago, and not in the run's model
    processor = getattr(transformers, task.processor).from_pretrained(
        located, trust_remote_code=False, **task.processor_options
    )
    task.fit(model, processor)
    return model


def under(located: str, auto: str, settings: PreTrainedConfig) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a class of transformers with a base's weights as far as they fit `settings`; and what was not there."""
    model, found = getattr(transformers, auto).from_pretrained(
        located,
        config=settings,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return model.eval(), found


@torch.no_grad()
def write_merged(folder: Path, model: LoadedModel, located: str) -> None:
    """Write the whole model for `from_pretrained`, adapters added into its weights."""
    made, trained = base(located, model.task), values(model)
    for name, parameter in made.named_parameters():
        if name in trained:  # all but a pooler that the run leaves out
            parameter.copy_(trained[name])
    made.save_pretrained(folder)
