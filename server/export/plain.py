"""The exported model in plain transformers and torch: this code stands in each model card, and checks each export."""

from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch.nn.functional import layer_norm, linear
from transformers import AutoTokenizer


def load(folder: str, encoder: torch.nn.Module) -> Callable[[list[str]], torch.Tensor]:
    """Give the function from texts to logits (N, labels): mean pooling, layer norm, one linear layer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    norm, head = (load_file(f"{folder}/{part}/model.safetensors") for part in ("2_LayerNorm", "3_Dense"))

    @torch.no_grad()
    def logits(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        features = layer_norm(mean, mean.shape[-1:], norm["norm.weight"], norm["norm.bias"])
        return linear(features, head["linear.weight"], head["linear.bias"])

    return logits
