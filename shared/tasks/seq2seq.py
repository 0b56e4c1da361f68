"""Sequence to sequence: a source that is read, and a target that is written (translation, summarisation, data to text).

Both are cut, at `task.max_length` and `task.max_target_length` tokens. A model that was trained with instructions in front
of its sources ("summarize: ") wants them in the file.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from shared import generation
from shared.errors import ModelError
from shared.metrics import Score
from shared.tasks import register
from shared.tasks.base import Batch, Column, Encoded, Uniform, Width, bucket, mask, pad
from shared.tasks.tokens import Answering, end_of, highest_of, padding_of

if TYPE_CHECKING:
    from shared.examples import Examples
    from shared.models import LoadedModel
    from shared.run_config import Hardware


@register
class Seq2Seq(Answering):
    """Targets of sources."""

    name = "seq2seq"
    columns: ClassVar = {"source": Column("text"), "target": Column("text")}
    auto = "AutoModelForSeq2SeqLM"
    inputs = ("input_ids", "attention_mask", "decoder_input_ids")
    axes = 2

    def fit(self, encoder: Any, processor: Any) -> None:
        """Take from the model what it begins and ends an answer with."""
        super().fit(encoder, processor)
        self.end = end_of(processor, encoder)
        start = getattr(encoder.generation_config, "decoder_start_token_id", None)
        if start is None:
            start = getattr(encoder.config, "decoder_start_token_id", None)
        if start is None:
            raise ModelError(
                f"{type(encoder).__name__} says no decoder_start_token_id in generation_config.json or config.json; add it."
            )
        self.prefix = (int(start),)

    def encode(self, values: Mapping[str, Any], processor: Any) -> Encoded:
        """Token ids of both; the target with its end."""
        source = processor(values["source"], truncation=True, max_length=self.settings.max_length)["input_ids"]
        target = list(processor(text_target=values["target"])["input_ids"])
        if target and target[-1] == self.end:
            target.pop()
        return {"input_ids": np.asarray(source or [self.end], dtype=np.int32), **self.answer(target)}

    def stand_in(self, values: Mapping[str, Any]) -> Encoded:  # noqa: ARG002 - as the base's
        """One token, and nothing to learn."""
        return {"input_ids": np.full(1, self.end, dtype=np.int32), **self.no_answer()}

    def width(self, encoded: Encoded) -> Width:
        """Next multiples of 16 tokens, of source and target."""
        return bucket(len(encoded["input_ids"])), bucket(len(encoded["labels"]))

    def collate(self, records: Sequence[Encoded], width: Width, processor: Any) -> Batch:
        """Pad sources (B, S), with a mask, and targets (B, T) on the right."""
        ids = [record["input_ids"] for record in records]
        return {
            "input_ids": pad(ids, width[0], padding_of(processor)).long(),
            "attention_mask": mask(ids, width[0]),
            **self.answers(records, width[1]),
        }

    def made_up(self, length: int, uniform: Uniform, processor: Any) -> Encoded:
        """Tokens from the whole vocabulary, as many on either side."""
        ids = (uniform(length) * len(processor)).astype(np.int32)
        return {"input_ids": ids, **self.made_up_answer(length, uniform)}

    def widest(self, processor: Any) -> Encoded:
        """Both as long as can be, of the highest token."""
        longest, highest = bucket(self.settings.max_length), highest_of(processor)
        target = np.full(bucket(self.settings.max_target_length), highest, dtype=np.int32)
        return {
            "input_ids": np.full(longest, highest, dtype=np.int32),
            "decoder_input_ids": target,
            "labels": target,
        }

    def public_scores(
        self, model: "LoadedModel", values: Sequence[Mapping[str, Any]], examples: "Examples", hardware: "Hardware"
    ) -> list[Score]:
        """Scores of greedy answers: chrF of the corpus, and ROUGE-1 and ROUGE-L as the mean over records, each from 0 to 1."""
        written = [
            model.processor.decode(ids, skip_special_tokens=True)
            for ids in generation.answers(model.module.encoder, self, examples, hardware)
        ]
        return generation.likeness(written, [str(record["target"]) for record in values])
