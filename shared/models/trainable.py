"""Which part of a model is trained: all, low-rank adapters, biases, its last layers, or the head alone."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shared.errors import ModelError
from shared.models import places
from shared.models.networks import Network
from shared.models.quantised import apart_from_peft
from shared.run_config import Model

GROUPS = {
    "all-linear": places.linear,
    "attention": places.attention,
}  # what one word of `model.lora.targets` stands for


def adapt(module: Network, model: Model, head: str | None) -> None:
    """Put the adapters of a LoRA run in; a head whose names begin with `head` gets none, because all of it is trained.

    Raises
    ------
    ModelError
        Where they match no layer, or have no singular vectors of their rank.
    """
    if model.trainable != "lora":
        return
    with apart_from_peft():
        from peft import LoraConfig, inject_adapter_in_model

    lora = model.lora
    encoder: nn.Module = module.encoder
    layers = None if lora.layers is None else list(lora.layers)
    targets = list(lora.targets)
    if len(targets) == 1 and targets[0] in GROUPS:
        own = None if head is None else head.removeprefix("encoder.")
        targets = GROUPS[targets[0]](encoder, but=own)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        target_modules=targets,
        layers_to_transform=layers,
        lora_dropout=0.0,
        bias="none",
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # it is mended there
            with apart_from_peft():  # it looks again as it puts the first adapter in
                inject_adapter_in_model(settings, encoder)
    except ValueError:
        linear = sorted({name.rpartition(".")[2] for name in places.linear(encoder)})
        raise ModelError(
            f"model.lora.targets={list(lora.targets)} (model.lora.layers={layers}) match no layer of {model.name}; its linear "
            f"layers are {linear}, and 'attention' or 'all-linear' stand for many."
        ) from None
    if lora.init == "svd" or lora.train_a:
        _fit(module, model)


@torch.no_grad()
def _fit(module: Network, model: Model) -> None:
    """Refuse a rank that a frozen weight has not; where `model.lora.init` says so, give A its leading right singular vectors."""
    lora, instead = model.lora, "set model.lora.init='random'"
    if lora.train_a:  # a product of a higher rank has no such factors
        instead = "set model.lora.train_a=false and model.lora.init='random'"
    for name, part in module.named_modules():
        if not (name.endswith(".lora_A.default") and isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d)):
            continue
        base = module.get_submodule(name.partition(".lora_A.")[0] + ".base_layer")
        weight: Tensor = base.weight.t() if isinstance(base, Conv1D) else base.weight.flatten(1)  # type: ignore[operator]
        if lora.rank > (most := min(weight.shape)):
            raise ModelError(
                f"model.lora.rank={lora.rank} is above {most}, the smaller side of {name.partition('.lora_A.')[0]!r} in "
                f"{model.name}, which has no more singular vectors; lower it, or {instead}."
            )
        if lora.init == "svd":
            vectors = torch.linalg.svd(weight, full_matrices=False).Vh[: lora.rank]
            part.weight.copy_(vectors.reshape(part.weight.shape))


def choose(module: Network, model: Model, head: str | None, run: places.Run) -> tuple[str, ...]:
    """Let gradients reach what is trained, and return its names; those that begin with `head` always are.

    `run` runs the network on one small record.

    Raises
    ------
    ModelError
        Where there is nothing to train, or the model has fewer layers.
    """
    last = _last(module, model, run) if model.trainable == "last" else set()
    choices: dict[str, Callable[[str, nn.Parameter], bool]] = {
        "lora": lambda name, _: ".lora_B." in name or (model.lora.train_a and ".lora_A." in name),
        "full": lambda *_: True,
        "head": lambda *_: False,
        "bias": lambda name, _: name.endswith(".bias"),
        "last": lambda _, parameter: parameter in last,
    }

    def of_head(name: str) -> bool:
        return head is not None and name.startswith(head)

    wanted = choices[model.trainable]
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(of_head(name) or wanted(name, parameter))
    names = tuple(name for name, parameter in module.named_parameters() if parameter.requires_grad)
    if not names:
        raise ModelError(f"model.trainable={model.trainable!r} leaves nothing to train in {model.name}; use 'lora'.")
    if model.trainable != "head" and all(of_head(name) for name in names):
        raise ModelError(
            f"model.trainable={model.trainable!r} leaves nothing to train in {model.name} but the head; use 'head' or 'lora'."
        )
    return names


def _last(module: Network, model: Model, run: places.Run) -> set[nn.Parameter]:
    """Parameters of the last layers, and of what comes after them."""
    encoder: nn.Module = module.encoder
    found = [layer for _, layer in places.layers(encoder)]
    if model.last_layers > len(found):
        raise ModelError(
            f"model.last_layers={model.last_layers} is above the {len(found)} layers of {model.name}'s last stack; lower it, or "
            "set model.trainable='full'."
        )
    own = {parameter for layer in found[-model.last_layers :] for parameter in layer.parameters()}
    return own | set(places.after(encoder, found, run))
