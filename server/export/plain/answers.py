"""Question answering: the span of a context that answers a question, or none. A long context is read in chunks."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer

LONGEST = 30  # tokens of an answer


def load(folder: str, model: Any) -> Callable[..., list[tuple[str, float]]]:
    """Give the function from questions and contexts to answers, "" for none, each with its score over that of none."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = tokenizer.model_max_length

    @torch.no_grad()
    def answer(question: str, context: str) -> tuple[str, float]:
        asked = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        batch = tokenizer(
            question if len(asked) <= longest // 4 else question[: asked[longest // 4 - 1][1]],
            context,
            truncation="only_second",
            max_length=longest,
            stride=longest // 4,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=True,
            return_tensors="pt",
        )
        names = [name for name in tokenizer.model_input_names if name in batch]
        made = model(**{name: batch[name] for name in names})
        best, found, none = -torch.inf, "", torch.inf
        for row, (first, last) in enumerate(zip(made.start_logits.double(), made.end_logits.double(), strict=True)):
            none = min(none, float(first[0] + last[0]))
            own = torch.tensor([part == 1 for part in batch.sequence_ids(row)])
            places = torch.arange(len(first))
            apart = places - places[:, None]
            allowed = own[:, None] & own & (apart >= 0) & (apart < LONGEST)
            spans = (first[:, None] + last).masked_fill(~allowed, -torch.inf)
            begin, end = divmod(int(spans.argmax()), len(first))
            if float(spans[begin, end]) > best:
                best = float(spans[begin, end])
                offsets = batch["offset_mapping"][row]
                found = context[offsets[begin, 0] : offsets[end, 1]]
        return (found if best > none else "", best - none)

    return lambda questions, contexts: [answer(*pair) for pair in zip(questions, contexts, strict=True)]
