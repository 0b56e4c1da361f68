"""A language model: the likeliest way on from a text, or from a conversation, by the tokenizer's template."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer


def load(folder: str, model: Any) -> Callable[..., list[str]]:
    """Give the function from texts, or lists of messages, to what the model writes behind them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def write(texts: list[Any], most_tokens: int = 64) -> list[str]:
        template: Any = {"tokenize": False, "add_generation_prompt": True}
        begun = [text if isinstance(text, str) else tokenizer.apply_chat_template(text, **template) for text in texts]
        batch = tokenizer(begun, padding=True, return_tensors="pt")
        written = model.generate(**batch, max_new_tokens=most_tokens, do_sample=False)
        found: list[str] = tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return found

    return write
