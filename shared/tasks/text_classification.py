"""Text classification: a text or a pair of texts a record, and one of the declared labels, or any number of them."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from shared.run_config import RunConfig
from shared.tasks import register
from shared.tasks.base import Batch, Column, Encoded, Uniform, Width, bucket, mask, pad
from shared.tasks.classification import Classification

NO_TOKENS = np.zeros(1, dtype=np.int32)  # a text that gives no token still is one record, of one token


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
