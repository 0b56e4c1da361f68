"""What tasks have in common whose records carry one of the declared labels, or any number of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from shared import metrics
from shared.metrics import Counts, Score
from shared.run_config import Loss, RunConfig
from shared.tasks.base import Batch, Encoded, Measured, Task

SMALLEST = 1e-9  # of a probability


class Classification(Task):
    """One label a record, or any number: the losses and scores that texts, images and sounds have in common."""

    features = True
    weighable = True
    label: ClassVar[str] = "label"

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.numbers = {label: number for number, label in enumerate(self.settings.labels)}

    @property
    def labels(self) -> int:
        """How many there are."""
        return len(self.settings.labels)

    def target(self, values: Mapping[str, Any]) -> Encoded:
        """Return {"labels"}: the label's number, or under `task.multi_label` 0 or 1 for each label."""
        given = values[self.label]
        if self.settings.multi_label:
            held = np.zeros(self.labels, dtype=np.float32)
            held[[self.numbers[label] for label in given]] = 1
            return {"labels": held}
        return {"labels": np.asarray(self.numbers[given])}

    def targets(self, records: Sequence[Encoded]) -> Batch:
        """Return {"labels"}: (B,), or (B, labels) of 0 and 1."""
        return {"labels": torch.from_numpy(np.stack([record["labels"] for record in records]))}

    def targets_of(self, fields: Mapping[str, Any], device: torch.device) -> Tensor:
        """All rows' labels, (rows,) or (rows, labels)."""
        found = super().targets_of(fields, device)
        return found.reshape(-1, self.labels) if self.settings.multi_label else found

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy; under `task.multi_label` the mean over labels of each one's own."""
        labels = batch["labels"]
        if self.settings.multi_label:
            each = nn.functional.binary_cross_entropy_with_logits(outputs.double(), labels.double(), reduction="none")
            return each.mean(1)
        return nn.functional.cross_entropy(outputs.double(), labels, reduction="none")

    def objective(self, outputs: Tensor, batch: Batch, loss: Loss, weights: Tensor | None) -> Tensor:
        """Cross-entropy or the focal loss, times the weights (labels,) of `loss` or those of a request."""
        labels, outputs = batch["labels"], outputs.double()
        if loss.class_weights == "given":
            weights = outputs.new_tensor(loss.weights)
        if self.settings.multi_label:
            each = nn.functional.binary_cross_entropy_with_logits(outputs, labels.double(), reduction="none")
            factors = None if weights is None else torch.where(labels > 0, weights.double(), 1.0)
        else:
            each = nn.functional.cross_entropy(outputs, labels, reduction="none")
            factors = None if weights is None else weights.double()[labels]
        if loss.kind == "focal":  # of 1 - p, p = exp(-each); not of zero, where a small power has no gradient
            each = each * (-torch.expm1(-each)).clamp_min(SMALLEST) ** loss.gamma
        if factors is not None:
            each = each * factors
        return each.mean(1) if self.settings.multi_label else each

    @property
    def cells(self) -> tuple[int, ...]:
        """(labels, labels, bins): true, predicted, confidence; or (labels, 2, bins): label, whether true, score."""
        return (self.labels, 2 if self.settings.multi_label else self.labels, self.bins)

    @property
    def sensitivity(self) -> float:
        """A record adds 1 to one cell, or to one of each label."""
        return math.sqrt(self.labels) if self.settings.multi_label else 1.0

    def measure(self, outputs: Tensor, batch: Batch) -> Measured:
        """Place each record by its label, the prediction and its probability."""
        labels = batch["labels"].cpu().numpy()
        if self.settings.multi_label:
            found = metrics.label_cells(outputs.double().sigmoid().cpu().numpy(), labels.astype(int), self.cells)
        else:
            found = metrics.cells(outputs.double().softmax(1).cpu().numpy(), labels, self.cells)[:, None]
        return Measured(found, np.ones(found.shape))

    def scores(self, counts: Counts, noise: float) -> list[Score]:
        """Scores of a classifier."""
        return (metrics.label_scores if self.settings.multi_label else metrics.scores)(counts, noise)

    def unlikely(self, outputs: Tensor, batch: Batch) -> dict[str, npt.NDArray[Any]]:  # noqa: ARG002 - as the base's
        """The label of the lowest score; of many labels, those of low scores."""
        if self.settings.multi_label:
            return {"labels": (outputs < 0).float().cpu().numpy()}
        return {"labels": outputs.argmin(1).cpu().numpy()}

    def no_target(self) -> Encoded:
        """A made-up record's labels, before `unlikely` gives others."""
        return {"labels": np.zeros(self.labels, dtype=np.float32) if self.settings.multi_label else np.asarray(0)}
