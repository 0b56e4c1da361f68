"""Made-up records of the task's shape, for the probe: what it finds says nothing of the site's own records.

They are drawn anew each time from the operating system's entropy, so that a coordinator cannot choose arrays
under which just these records look harmless.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from client.privacy.randomness import Keystream
from shared.examples import Examples, collate
from shared.models import LoadedModel
from shared.tasks.base import Encoded

LENGTHS = (3, 2, 3, 7, 12, 9)  # of the padded axes: tokens
# Records and width of each batch: as wide as it is long, where a batch can be mistaken for a sequence; padded past every
# length, with no number dividing the other; a batch of one.
TOGETHER: tuple[tuple[tuple[int, ...], int], ...] = (((0, 1, 2), 3), ((3, 4), 15), ((5,), 9))
# Units of several rows, a person's records or a record's chunks: rows of a unit, all rows' lengths, and their width; as many
# rows in all as they are wide, once, where rows can be mistaken for a sequence.
SEVERAL: tuple[tuple[int, tuple[int, ...], int], ...] = ((2, (5, 4, 6, 3), 7), (3, (2, 3, 2, 4, 2, 6), 6))


@torch.no_grad()
def examples(model: LoadedModel, lengths: Sequence[int] = LENGTHS) -> Examples:
    """Return a record of each length.

    Its target is one that the model holds for unlikely: a model that is sure of a label has no gradient
    there, and the probe would learn nothing.
    """
    made = _inputs(model, lengths)
    device, task = model.module.device, model.task
    records: list[Encoded] = []
    for number, length in enumerate(lengths):
        batch = collate(made, [(number,)], device, task.padded(length))
        unlikely = task.unlikely(model.outputs(batch), batch)
        records.append({**made.row(number), **{name: np.asarray(value[0]) for name, value in unlikely.items()}})
    return Examples.single(task, model.processor, records)


@torch.no_grad()
def features(model: LoadedModel, widest: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the network's features (N, hidden_size) of records side by side, and of each alone, unpadded.

    They are those of one short batch, drawn by lot; or of two records as long as `widest` allows.
    """
    if widest is None:
        batches = [batch for batch in TOGETHER if len(batch[0]) > 1]
        group, width = batches[int(Keystream.from_system().uniform(1)[0] * len(batches))]
        lengths = [LENGTHS[number] for number in group]
    else:
        lengths, width = [widest, widest - 5], widest
    made, device = _inputs(model, lengths), model.module.device

    def of(numbers: Sequence[int], width: int) -> Tensor:
        batch = collate(made, [(number,) for number in numbers], device, model.task.padded(width))
        return model.module.features(**model.inputs(batch)).float()

    alone = [of((number,), length) for number, length in enumerate(lengths)]
    return of(range(len(lengths)), width), torch.cat(alone)


def longest(model: LoadedModel) -> int:
    """What the widest record is padded to; 0 where records are all of one size."""
    return max(model.task.width(model.task.widest(model.processor)), default=0)


def _inputs(model: LoadedModel, lengths: Sequence[int]) -> Examples:
    randomness = Keystream.from_system()
    records = [model.task.made_up(length, randomness.uniform, model.processor) for length in lengths]
    return Examples.single(model.task, model.processor, records)
