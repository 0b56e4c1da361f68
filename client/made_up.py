"""Made-up records of the task's shape, for the probe: what it finds says nothing of the site's own records.

They are drawn anew each time from the request's own randomness, so that a coordinator cannot choose arrays
under which just these records look harmless.
"""

import torch
from torch import Tensor

from client.privacy.randomness import Keystream
from shared.models import LoadedModel
from shared.run_config import RunConfig
from shared.tasks.text_classification import Examples, collate

LENGTHS = (4, 7, 3, 12)  # tokens; one is the number of records, where a batch is mistaken for a sequence
TOGETHER = (((0, 2), 4), ((1, 3), 16))  # records and width: as wide as it is long, then padded past every length


def examples(model: LoadedModel, config: RunConfig, randomness: Keystream) -> Examples:
    """Return a record of each of `LENGTHS`, its tokens drawn from the whole vocabulary."""
    vocabulary, labels = len(model.tokenizer), len(config.task.labels)
    drawn = (randomness.uniform(length) * vocabulary for length in LENGTHS)
    return Examples(
        tuple(tuple(int(token) for token in tokens) for tokens in drawn),
        tuple(number % labels for number in range(len(LENGTHS))),
    )


@torch.no_grad()
def features(model: LoadedModel, made_up: Examples) -> tuple[Tensor, Tensor]:
    """Return the encoder's features (4, hidden_size) of records side by side, and of each alone, unpadded."""
    device = model.module.head.weight.device

    def of(group: tuple[int, ...], width: int) -> Tensor:
        batch = collate(made_up, group, device, width)
        return model.module.features(batch.input_ids, batch.attention_mask).float()

    order = [number for group, _ in TOGETHER for number in group]
    together = torch.cat([of(group, width) for group, width in TOGETHER])
    return together, torch.cat([of((number,), LENGTHS[number]) for number in order])
