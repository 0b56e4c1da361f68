"""Speech to text."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoProcessor


def load(folder: str, model: Any) -> Callable[..., list[str]]:
    """Give the function from clips, mono at the extractor's rate, to what is said in them."""
    processor = AutoProcessor.from_pretrained(folder)
    rate = processor.feature_extractor.sampling_rate

    @torch.no_grad()
    def write(clips: list[Any], most_tokens: int = 64) -> list[str]:
        batch = processor.feature_extractor(list(clips), sampling_rate=rate, return_tensors="pt")
        most = min(most_tokens, model.config.max_target_positions - 4)  # a transcript begins with up to 4 marks
        written = model.generate(batch["input_features"], max_new_tokens=most, do_sample=False, num_beams=1)
        found: list[str] = processor.batch_decode(written, skip_special_tokens=True)
        return [text.strip() for text in found]

    return write
