"""Which part of a model is trained: all, low-rank adapters, biases, or the head alone."""

import warnings
from collections.abc import Callable

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from shared.errors import ModelError
from shared.models.networks import Network
from shared.run_config import Model


def adapt(module: Network, model: Model) -> None:
    """Put the adapters of a LoRA run in.

    Raises
    ------
    ModelError
        Where they match no layer.
    """
    if model.trainable != "lora":
        return
    lora = model.lora
    layers = None if lora.layers is None else list(lora.layers)
    targets = "all-linear" if lora.targets == ("all-linear",) else list(lora.targets)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        layers_to_transform=layers,
        lora_dropout=0.0,
        bias="none",
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # it is mended there
            inject_adapter_in_model(settings, module.encoder)
    except ValueError:
        linear = sorted(
            {name.rpartition(".")[2] for name, part in module.encoder.named_modules() if isinstance(part, nn.Linear)}
        )
        raise ModelError(
            f"model.lora.targets={list(lora.targets)} (model.lora.layers={layers}) match no layer of {model.name}; its linear layers are {linear}."
        ) from None
    if lora.init == "svd":
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                if ".lora_A." in name:
                    base = parameters[name.partition(".lora_A.")[0] + ".base_layer.weight"]
                    parameter.copy_(torch.linalg.svd(base, full_matrices=False).Vh[: lora.rank])


def choose(module: Network, model: Model, head: str | None) -> tuple[str, ...]:
    """Let gradients reach what is trained, and return its names; those that begin with `head` always are.

    Raises
    ------
    ModelError
        Where there is nothing to train.
    """
    choices: dict[str, Callable[[str], bool]] = {
        "lora": lambda name: ".lora_B." in name,
        "full": lambda _: True,
        "head": lambda _: False,
        "bias": lambda name: name.endswith(".bias"),
    }

    def of_head(name: str) -> bool:
        return head is not None and name.startswith(head)

    wanted = choices[model.trainable]
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(of_head(name) or wanted(name))
    names = tuple(name for name, parameter in module.named_parameters() if parameter.requires_grad)
    if not names:
        raise ModelError(f"model.trainable={model.trainable!r} leaves nothing to train in {model.name}; use 'lora'.")
    if model.trainable != "head" and all(of_head(name) for name in names):
        raise ModelError(
            f"model.trainable={model.trainable!r} leaves nothing to train in {model.name} but the head; use 'head' or 'lora'."
        )
    return names
