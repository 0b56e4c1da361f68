"""Sequence to sequence: a text for a text."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer


def load(folder: str, model: Any) -> Callable[..., list[str]]:
    """Give the function from texts to those that the model writes for them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def write(texts: list[str], most_tokens: int = 64) -> list[str]:
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        written = model.generate(**batch, max_new_tokens=most_tokens, do_sample=False, num_beams=1)
        found: list[str] = tokenizer.batch_decode(written, skip_special_tokens=True)
        return found

    return write
