"""A LoRA run's model as a PEFT adapter: what the base lacks, and nothing of the base."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from server.export import weights
from shared.errors import ModelError
from shared.models import LoadedModel


@torch.no_grad()
def write_adapter(folder: Path, model: LoadedModel, located: str, hub: str | None) -> None:
    """Write the adapters as PEFT does, for `PeftModel.from_pretrained` over transformers' own class.

    A layer that is not as the base has it (the head, a pooler that was drawn at random) is saved whole, its adapter
    added in. The adapted layers are named one by one: a pattern could match a layer that was not adapted, such as a
    pooler that the run leaves out. `hub` is the base model's name on the Hub, where it has one.

    Raises
    ------
    ModelError
        Where a parameter that differs is of no layer that PEFT could save.
    """
    settings = weights.base(located, model.task).config
    settings.save_pretrained(folder)
    made, _ = weights.under(located, weights.auto(model.task), settings)  # as a reader loads it, who knows no more
    held, merged = weights.plain(model), weights.values(model)
    different = [name for name, parameter in made.named_parameters() if _differs(parameter, held.get(name))]
    whole = sorted({name.rpartition(".")[0] for name in different})
    if "" in whole:
        raise ModelError(f"{different[0]!r} was trained and is of no layer, which no adapter holds; export it merged.")
    adapters = [name for name, _ in weights.adapted(model.module.encoder) if name not in whole]
    made_with: dict[str, LoraConfig] = model.module.encoder.peft_config  # type: ignore[assignment]
    config = replace(
        made_with["default"],
        target_modules=adapters,
        layers_to_transform=None,
        modules_to_save=whole or None,
        task_type="FEATURE_EXTRACTION" if model.task.model == "pooled" else None,
        inference_mode=True,
    )
    adapter = get_peft_model(made, config)
    inner = {name.removeprefix("base_model.model."): parameter for name, parameter in adapter.named_parameters()}
    own = {name: parameter for name, parameter in model.module.encoder.named_parameters() if ".lora_" in name}
    for name, parameter in inner.items():
        saved = name.replace(".modules_to_save.default.", ".")
        if name in own:
            parameter.copy_(own[name])
        elif saved != name:
            parameter.copy_(merged[saved])
    tensors = get_peft_model_state_dict(adapter, save_embedding_layers=False)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    config.target_modules = adapters  # in order, where PEFT makes a set of them
    config.save_pretrained(str(folder))
    _name_base(folder / "adapter_config.json", hub)


def _differs(parameter: torch.Tensor, held: torch.Tensor | None) -> bool:
    return held is not None and held.is_floating_point() and not torch.equal(parameter, held)


def _name_base(file: Path, hub: str | None) -> None:
    """Name the base as others call it: PEFT writes where it lies on this machine."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = hub
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
