"""Features of many records under the encoder as it stands, computed once for as long as it stands so.

While only the head is trained, each record's feature never changes: one pass over the data serves
every later step and evaluation.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shared.examples import Examples, batches, collate
from shared.models import LoadedModel, autocast
from shared.run_config import Hardware


@torch.no_grad()
def features(model: LoadedModel, examples: Examples, hardware: Hardware) -> Tensor:
    """Return (rows, hidden_size), float32, in the order of the rows of `examples`."""
    module = model.module
    device = module.device
    found = torch.empty((examples.rows, module.head.in_features), device=device)
    rows = [(row,) for row in range(examples.rows)]
    for group in batches(examples, rows, hardware.micro_batch):
        batch = collate(examples, [rows[place] for place in group], device)
        with autocast(device, hardware.precision):
            found[group] = module.features(**model.inputs(batch)).float()
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
