"""Text classification with the head that no class of transformers has: mean pooling, layer norm, one linear layer."""

from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch.nn.functional import layer_norm, linear
from transformers import AutoTokenizer


def load(folder: str, encoder: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """Give the function from texts, and pairs to them, to logits (N, labels)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    norm, head = (load_file(f"{folder}/{part}/model.safetensors") for part in ("2_LayerNorm", "3_Dense"))

    @torch.no_grad()
    def logits(texts: list[str], pairs: list[str] | None = None) -> torch.Tensor:
        batch = tokenizer(texts, pairs, padding=True, truncation=True, return_tensors="pt")
        hidden, mask = encoder(**batch).last_hidden_state, batch["attention_mask"]
        mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        features = layer_norm(mean, mean.shape[-1:], norm["norm.weight"], norm["norm.bias"])
        return linear(features, head["linear.weight"], head["linear.bias"])

    return logits
