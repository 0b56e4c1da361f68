"""Audio classification: every clip is cut, or filled up with silence, to the extractor's window."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor


def load(folder: str, model: Any) -> Callable[[list[Any]], torch.Tensor]:
    """Give the function from clips, mono at the extractor's rate, to logits (N, labels)."""
    extractor = AutoFeatureExtractor.from_pretrained(folder)

    @torch.no_grad()
    def logits(clips: list[Any]) -> torch.Tensor:
        batch = []
        for clip in clips:
            window = np.zeros(extractor.n_samples, dtype=np.float32)
            heard = np.asarray(clip[: extractor.n_samples], dtype=np.float32)
            window[: len(heard)] = np.clip(np.rint(heard * 2**15), -(2**15), 2**15 - 1) / 2**15  # 16 bits
            batch.append(extractor(window, sampling_rate=extractor.sampling_rate, return_tensors="pt"))
        name = next(iter(batch[0]))
        found: torch.Tensor = model(**{name: torch.cat([each[name] for each in batch])}).logits
        return found

    return logits
