"""Features of many records under the encoder as it stands, computed once for as long as it stands so.

While only the head is trained, each record's pooled feature never changes: one pass over the data serves
every later step and evaluation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shared.models import TextClassifier, autocast
from shared.run_config import Hardware
from shared.tasks.text_classification import Examples, batches, collate


@torch.no_grad()
def features(module: TextClassifier, examples: Examples, hardware: Hardware) -> Tensor:
    """Return (N, hidden_size), float32, in the order of `examples`."""
    device = module.head.weight.device
    found = torch.empty((len(examples), module.head.in_features), device=device)
    for group in batches(examples, range(len(examples)), hardware.micro_batch):
        batch = collate(examples, group, device)
        with autocast(device, hardware.precision):
            found[group] = module.features(batch.input_ids, batch.attention_mask).float()
    return found


class FeatureCache:
    """The latest features of each data set, kept until the encoder changes."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, Tensor]] = {}

    def get(self, name: str, encoder: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return the features of data set `name` under the encoder of digest `encoder`."""
        if name not in self._kept or self._kept[name][0] != encoder:
            self._kept[name] = (encoder, compute())
        return self._kept[name][1]
