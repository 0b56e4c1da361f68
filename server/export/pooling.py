"""Our head as sentence-transformers lays it out.

No class of transformers has mean pooling, a layer norm and a linear layer on top of any encoder. The modules of
sentence-transformers have exactly that: Pooling, LayerNorm, Dense. So the head lies in their folders, whose files plain
code reads as well (`server.export.plain.pooled`).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.models import Network

POOLING, NORM, HEAD = "1_Pooling", "2_LayerNorm", "3_Dense"
MODULES = (("", "Transformer"), (POOLING, "Pooling"), (NORM, "LayerNorm"), (HEAD, "Dense"))


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
