"""Token classification: a tag a word."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer


def load(folder: str, model: Any) -> Callable[[list[list[str]]], list[torch.Tensor]]:
    """Give the function from texts' words to each text's logits (words, labels); NaN of words past the cut."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def logits(texts: list[list[str]]) -> list[torch.Tensor]:
        batch = tokenizer(texts, is_split_into_words=True, padding=True, truncation=True, return_tensors="pt")
        every = model(**batch).logits
        found = []
        for row, words in enumerate(texts):
            of_words = torch.full((len(words), every.shape[-1]), torch.nan)
            for place, word in reversed(list(enumerate(batch.word_ids(row)))):  # a word's first token tells its tag
                if word is not None:
                    of_words[word] = every[row, place]
            found.append(of_words)
        return found

    return logits
