"""Text classification: a text or a pair of texts a record, and one of the declared labels, or any number of them."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from shared.errors import ModelError
from shared.run_config import RunConfig
from shared.tasks import register
from shared.tasks.base import Batch, Column, Encoded, Uniform, Width, bucket, mask, pad
from shared.tasks.classification import Classification

NO_TOKENS = np.zeros(1, dtype=np.int32)  # a text that gives no token still is one record, of one token


@register
class TextClassification(Classification):
    """Texts, or under `task.pairs` pairs of them.

    With `model.head = "native"` a model that comes with a head for as many labels keeps it, row by row: declare the labels
    in its order. A head for another number is drawn anew.
    """

    name = "text-classification"
    columns: ClassVar = {"text": Column("text"), "pair": Column("text", needed=False), "label": Column("label")}
    auto = "AutoModelForSequenceClassification"
    inputs = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.model: Literal["pooled", "native"] = config.model.head
        self._typed, self._filler = False, 0  # whether tokens say which text they are of; what a row is filled up with

    def adjust(self, settings: Any) -> None:
        """Name a padding token where there is none: GPT-2 and its like find a text's last token by it.

        Raises
        ------
        ModelError
            Of an encoder and decoder: transformers' head for these looks for end tokens, and fails on a batch whose texts have
            different numbers of them, so that a record decides what becomes of others.
        """
        if self.model == "pooled":
            return
        if settings.is_encoder_decoder:
            raise ModelError(
                f"model.head='native' is not for {settings.model_type}, an encoder and decoder; use an encoder or a decoder."
            )
        given = getattr(settings, "pad_token_id", None)
        if given is None or not 0 <= given < settings.vocab_size:
            ends = getattr(settings, "eos_token_id", None)
            ends = ends[0] if isinstance(ends, list) and ends else ends
            settings.pad_token_id = ends if isinstance(ends, int) and 0 <= ends < settings.vocab_size else 0

    def fit(self, encoder: Any, processor: Any) -> None:
        """Take the padding token, and whether tokens can say which text they are of."""
        self._filler = getattr(encoder.config, "pad_token_id", None) or 0
        known = "token_type_ids" in processor.model_input_names and getattr(encoder.config, "type_vocab_size", 0) > 1
        self._typed = self.settings.pairs and known

    def fault(self, values: Mapping[str, Any]) -> str | None:
        """A record has a pair where the run has pairs, and only there."""
        if self.settings.pairs == ("pair" in values):
            return None
        if self.settings.pairs:
            return "there is no column 'pair', and task.pairs=true reads two texts a record"
        return "there is a column 'pair', and task.pairs=false reads one text a record; set it to true, or rename the column"

    def encode(self, values: Mapping[str, Any], processor: Any) -> Encoded:
        """Token ids, cut at `task.max_length` (of a pair, the longer text first), and which text each is of."""
        made = processor(values["text"], values.get("pair"), truncation=True, max_length=self.settings.max_length)
        ids = np.asarray(made["input_ids"], dtype=np.int32)
        if not len(ids):
            return self.stand_in(values)
        return self._encoded(ids, np.asarray(made["token_type_ids"]) if self._typed else None, self.target(values))

    def stand_in(self, values: Mapping[str, Any]) -> Encoded:
        """One token."""
        return self._encoded(NO_TOKENS, NO_TOKENS, self.target(values))

    def _encoded(self, ids: Any, types: Any, target: Encoded) -> Encoded:
        typed = {"token_type_ids": types.astype(np.int8)} if self._typed else {}
        return {"input_ids": ids, **typed, **target}

    def width(self, encoded: Encoded) -> Width:
        """Next multiple of 16 tokens."""
        return (bucket(len(encoded["input_ids"])),)

    def collate(self, records: Sequence[Encoded], width: Width, processor: Any) -> Batch:  # noqa: ARG002 - as the base's
        """Pad ids (B, T) on the right, with a mask."""
        ids = [record["input_ids"] for record in records]
        batch = {"input_ids": pad(ids, width[0], self._filler).long(), "attention_mask": mask(ids, width[0])}
        if self._typed:
            batch["token_type_ids"] = pad([record["token_type_ids"] for record in records], width[0]).long()
        return batch | self.targets(records)

    def made_up(self, length: int, uniform: Uniform, processor: Any) -> Encoded:
        """Tokens from the whole vocabulary, of a pair as many of the one text as of the other."""
        ids = (uniform(length) * len(processor)).astype(np.int32)
        return self._encoded(ids, np.arange(length) * 2 // length, self.no_target())

    def widest(self, processor: Any) -> Encoded:
        """A text as long as can be, of the highest token."""
        highest = max(processor.get_vocab().values(), default=0)
        ids = np.full(bucket(self.settings.max_length), highest, dtype=np.int32)
        return self._encoded(ids, np.ones_like(ids), self.no_target())
