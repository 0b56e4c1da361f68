"""Image classification."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoImageProcessor


def load(folder: str, model: Any) -> Callable[[list[Any]], torch.Tensor]:
    """Give the function from images of Pillow, in RGB, to logits (N, labels)."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    @torch.no_grad()
    def logits(images: list[Any]) -> torch.Tensor:
        found: torch.Tensor = model(**processor(images, return_tensors="pt")).logits
        return found

    return logits
