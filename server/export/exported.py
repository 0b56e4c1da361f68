"""An exported folder, loaded again by transformers, PEFT or onnxruntime."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from server.export import graph, weights
from server.export.manifest import Manifest
from shared.errors import ModelError
from shared.models.sources import first_line

OPTIONS = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}


def network(folder: Path, manifest: Manifest, base: str | None = None) -> Any:
    """Load what takes a batch and gives logits; of an adapter over `base`, a folder or a name on the Hub.

    Raises
    ------
    ModelError
        Where it, or its base, cannot be loaded.
    """
    if manifest.format != "hf":
        return graph.session(folder / graph.FILE)
    kind = getattr(transformers, manifest.auto)
    located = base or manifest.base
    if manifest.form == "adapter" and located is None:
        raise ModelError(
            f"{folder} holds an adapter, whose base has no name on the Hub; name the base's folder with --base."
        )
    try:
        if manifest.form == "merged":
            return kind.from_pretrained(str(folder), **OPTIONS).eval()
        settings = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        under, _ = weights.under(str(located), manifest.auto, settings)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
            return PeftModel.from_pretrained(under, str(folder)).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder} cannot be loaded: {first_line(error)}") from None
