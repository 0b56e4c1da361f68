"""Text classification: a text or a pair of texts a record, and one of the declared labels, or any number of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from shared import metrics
from shared.metrics import Counts, Score
from shared.run_config import RunConfig
from shared.tasks import register
from shared.tasks.base import Batch, Column, Encoded, Measured, Task, Uniform, Width, bucket, mask, pad

NO_TOKENS = np.zeros(1, dtype=np.int32)  # a text that gives no token still is one record, of one token


class Classification(Task):
    """One label a record, or any number: the losses and scores that texts, images and sounds have in common."""

    features = True
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

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy; under `task.multi_label` the mean over labels of each one's own."""
        labels = batch["labels"]
        if self.settings.multi_label:
            each = nn.functional.binary_cross_entropy_with_logits(outputs.double(), labels.double(), reduction="none")
            return each.mean(1)
        return nn.functional.cross_entropy(outputs.double(), labels, reduction="none")

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


@register
class TextClassification(Classification):
    """Texts, or pairs of them."""

    name = "text-classification"
    columns: ClassVar = {"text": Column("text"), "pair": Column("text", needed=False), "label": Column("label")}
    auto = "AutoModelForSequenceClassification"

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.model: Literal["pooled", "native"] = config.model.head

    def encode(self, values: Mapping[str, Any], processor: Any) -> Encoded:
        """Token ids, cut at `task.max_length`, and for pairs which of the two a token is of."""
        made = processor(values["text"], values.get("pair"), truncation=True, max_length=self.settings.max_length)
        ids = np.asarray(made["input_ids"], dtype=np.int32)
        return {"input_ids": ids if len(ids) else NO_TOKENS, **self.target(values)}

    def stand_in(self, values: Mapping[str, Any]) -> Encoded:
        """One token."""
        return {"input_ids": NO_TOKENS, **self.target(values)}

    def width(self, encoded: Encoded) -> Width:
        """Next multiple of 16 tokens."""
        return (bucket(len(encoded["input_ids"])),)

    def collate(self, records: Sequence[Encoded], width: Width, processor: Any) -> Batch:  # noqa: ARG002 - as the base's
        """Pad ids (B, T) on the right, with a mask."""
        ids = [record["input_ids"] for record in records]
        return {"input_ids": pad(ids, *width).long(), "attention_mask": mask(ids, *width), **self.targets(records)}

    def made_up(self, length: int, uniform: Uniform, processor: Any) -> Encoded:
        """Tokens from the whole vocabulary."""
        return {"input_ids": (uniform(length) * len(processor)).astype(np.int32), **self.no_target()}

    def widest(self, processor: Any) -> Encoded:
        """A text as long as can be, of the highest token."""
        highest = max(processor.get_vocab().values(), default=0)
        return {
            "input_ids": np.full(bucket(self.settings.max_length), highest, dtype=np.int32),
            **self.no_target(),
        }
