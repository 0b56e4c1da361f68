"""Made-up records of the task's shape, for the probe: what it finds says nothing of the site's own records.

They are drawn anew each time from the operating system's entropy, so that a coordinator cannot choose arrays
under which just these records look harmless.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from client.privacy.randomness import Keystream
from shared.models import LoadedModel
from shared.tasks.text_classification import Examples, collate

LENGTHS = (3, 2, 3, 7, 12, 9)  # tokens
# Records and width of each batch: as wide as it is long, where a batch can be mistaken for a sequence; padded past every
# length, with no number dividing the other; a batch of one.
TOGETHER: tuple[tuple[tuple[int, ...], int], ...] = (((0, 1, 2), 3), ((3, 4), 15), ((5,), 9))


@torch.no_grad()
def examples(model: LoadedModel, lengths: Sequence[int] = LENGTHS) -> Examples:
    """Return a record of each length, its tokens drawn from the whole vocabulary.

    Its label is the one that the model holds for the least likely: a model that is sure of a label has no gradient
    there, and the probe would learn nothing.
    """
    texts = _texts(model, lengths)
    device = model.module.head.weight.device
    batches = (collate(texts, (number,), device, length) for number, length in enumerate(lengths))
    logits = torch.cat([model.module(batch.input_ids, batch.attention_mask) for batch in batches])
    return Examples(texts.tokens, tuple(logits.argmin(1).tolist()))


@torch.no_grad()
def features(model: LoadedModel, widest: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the encoder's features (N, hidden_size) of records side by side, and of each alone, unpadded.

    They are those of one short batch, drawn by lot; or of two records as long as `widest` allows.
    """
    if widest is None:
        batches = [batch for batch in TOGETHER if len(batch[0]) > 1]
        group, width = batches[int(Keystream.from_system().uniform(1)[0] * len(batches))]
        lengths = [LENGTHS[number] for number in group]
    else:
        lengths, width = [widest, widest - 5], widest
    texts, device = _texts(model, lengths), model.module.head.weight.device

    def of(numbers: Sequence[int], width: int) -> Tensor:
        batch = collate(texts, numbers, device, width)
        return model.module.features(batch.input_ids, batch.attention_mask).float()

    alone = [of((number,), length) for number, length in enumerate(lengths)]
    return of(range(len(lengths)), width), torch.cat(alone)


def _texts(model: LoadedModel, lengths: Sequence[int]) -> Examples:
    randomness = Keystream.from_system()
    drawn = (randomness.uniform(length) * len(model.tokenizer) for length in lengths)
    return Examples(tuple(tuple(int(token) for token in tokens) for tokens in drawn), (0,) * len(lengths))
