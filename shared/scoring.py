"""How a model does on records: what each of them adds to a task's counts."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.errors import EngineError
from shared.examples import Examples, batches, collate
from shared.models import LoadedModel, autocast
from shared.run_config import Hardware
from shared.tasks.base import Measured

TOGETHER = 4096  # rows of features that go through the head at once


@torch.no_grad()
def outcomes(
    model: LoadedModel, examples: Examples, hardware: Hardware, features: Tensor | None = None
) -> Iterator[tuple[npt.NDArray[np.int64], Measured, Tensor]]:
    """Yield records' numbers, what they add to the counts, and their losses (B,).

    `features` (rows, hidden_size) are the network's, where it has a head apart: they go through the head alone.

    Raises
    ------
    EngineError
        Where a task measures a chunk as if it were a record, which could then add more than its share.
    """
    task = examples.task
    if features is not None:
        targets = task.targets_of(examples.fields, features.device)[: examples.rows]
        for start in range(0, examples.rows, TOGETHER):
            outputs = model.module.head(features[start : start + TOGETHER])
            batch = {"labels": targets[start : start + TOGETHER]}
            yield start + np.arange(len(outputs)), task.measure(outputs, batch), task.losses(outputs, batch)
        return
    records = [examples.of_record(number) for number in range(len(examples.records) - 1)]
    for group in batches(examples, records, hardware.micro_batch):
        batch = collate(examples, [records[place] for place in group], model.module.device)
        if len(records[group[0]]) > 1:
            batch = {name: value.flatten(0, 1) for name, value in batch.items()}
        with autocast(model.module.device, hardware.precision):
            outputs = model.outputs(batch)
        measured, losses = task.measure(outputs, batch), task.losses(outputs, batch)
        if len(measured.cells) != len(group):
            raise EngineError(f"{task.name} measures {len(group)} records as {len(measured.cells)}.")
        yield np.asarray(group), measured, losses.reshape(len(group), -1).mean(1)


def exact(
    model: LoadedModel, examples: Examples, hardware: Hardware, features: Tensor | None = None
) -> tuple[npt.NDArray[np.float64], float]:
    """Sum all records' amounts into counts (task.cells), and give the mean loss: of public records, without noise."""
    total, loss = np.zeros(int(np.prod(examples.task.cells))), 0.0
    for _, measured, losses in outcomes(model, examples, hardware, features):
        np.add.at(total, measured.cells.ravel(), measured.amounts.ravel())
        loss += float(losses.sum())
    return total.reshape(examples.task.cells), loss / max(1, len(examples.records) - 1)
