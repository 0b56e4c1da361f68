"""Text classification."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer


def load(folder: str, model: Any) -> Callable[..., torch.Tensor]:
    """Give the function from texts, and pairs to them, to logits (N, labels)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def logits(texts: list[str], pairs: list[str] | None = None) -> torch.Tensor:
        batch = tokenizer(texts, pairs, padding=True, truncation=True, return_tensors="pt")
        found: torch.Tensor = model(**batch).logits
        return found

    return logits
