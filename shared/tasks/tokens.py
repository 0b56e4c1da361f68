"""What tasks that write have in common: their targets are tokens, and their loss is the cross-entropy of each next one.

A record's loss is the mean over its own tokens that count (`labels` other than `IGNORED`), so that a long record weighs as
much as a short one. Labels are shifted here, when a record is encoded: what stands at a place is what comes next. What a
record adds to the counts is (min(loss, log V) / log V, the share of tokens that are guessed, 1) / sqrt(3), of a vocabulary
of V tokens: log V is what a model loses that knows nothing, and a public bound.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from shared import metrics
from shared.errors import ModelError
from shared.metrics import Counts, Score
from shared.tasks.base import Batch, Encoded, Measured, Task, Uniform, pad, per_record, shares

IGNORED = -100  # a label that does not count
Ids = npt.NDArray[np.int32]


class Writing(Task):
    """A task whose network gives `logits` (B, T, V) for `labels` (B, T).

    Attributes
    ----------
    vocabulary
        V, of the network's output.
    """

    model = "whole"
    classifies = False
    vocabulary: int = 0

    def adjust(self, settings: Any) -> None:
        """Keep nothing of a pass for the next."""
        settings.use_cache = False

    def fit(self, encoder: Any, processor: Any) -> None:  # noqa: ARG002 - as the base's
        """Take the vocabulary's size from the network's last layer."""
        last = encoder.get_output_embeddings()
        if last is None:
            raise ModelError(f"{type(encoder).__name__} has no last layer over a vocabulary; use another model.")
        self.vocabulary = last.weight.shape[0]

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Mean cross-entropy, in nats, over a record's own tokens that count; 0 where none does.

        The logits stay float32 (double where the model is): a vocabulary is large.
        """
        logits, labels = outputs.logits, batch["labels"]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        each = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return per_record(each.view_as(labels).double(), labels != IGNORED)

    @property
    def cells(self) -> tuple[int, ...]:
        """(3,): loss, tokens guessed, records."""
        return (3,)

    def measure(self, outputs: Any, batch: Batch) -> Measured:
        """Place each record: the means of its chunks, where it has several rows."""
        labels = batch["labels"]
        guessed = per_record((outputs.logits.argmax(-1) == labels).double(), labels != IGNORED)
        lost = torch.nan_to_num(self.losses(outputs, batch) / math.log(self.vocabulary), nan=1.0)
        rows = torch.stack([lost, guessed], dim=1)
        records = int(batch["begins"].sum()) if "begins" in batch else len(rows)
        return shares(rows.reshape(records, -1, 2).mean(1).cpu().numpy())

    def scores(self, counts: Counts, noise: float) -> list[Score]:
        """Mean over records of their losses and of their shares of tokens guessed; perplexity is exp of the mean loss."""
        most = math.log(self.vocabulary)
        loss = metrics.with_intervals(lambda held: {"loss": most * _mean(held, 0)}, counts, noise, highest=most)[0]
        low, high = (None if bound is None else math.exp(bound) for bound in (loss.low, loss.high))
        guessed = metrics.with_intervals(lambda held: {"token_accuracy": _mean(held, 1)}, counts, noise)
        return [loss, Score("perplexity", math.exp(loss.value), low, high), *guessed]

    def unlikely(self, outputs: Any, batch: Batch) -> dict[str, npt.NDArray[Any]]:
        """The token of the lowest score at each place that counts."""
        lowest = torch.where(batch["labels"] == IGNORED, IGNORED, outputs.logits.argmin(-1))
        return {"labels": lowest.cpu().numpy().astype(np.int32)}

    def made_up_labels(self, length: int, uniform: Uniform) -> Ids:
        """Labels before `unlikely` gives others: about one in four does not count, and the last does."""
        labels = np.where(uniform(length) < 0.25, IGNORED, 0).astype(np.int32)
        labels[-1] = 0
        return labels


class Answering(Writing):
    """A task whose network reads one thing and writes another: encoder and decoder.

    Attributes
    ----------
    prefix
        Tokens that every answer begins with; they are given, and not learnt.
    end
        The token that ends an answer.
    """

    prefix: tuple[int, ...] = ()
    end: int = 0

    def answer(self, ids: Sequence[int]) -> Encoded:
        """What the decoder reads and is to write, of an answer's own tokens; cut at `task.max_target_length`."""
        ids = [*ids, self.end][: self.settings.max_target_length + 1 - len(self.prefix)]
        read = [*self.prefix, *ids[:-1]]
        write = [*[IGNORED] * (len(self.prefix) - 1), *ids]
        return {"decoder_input_ids": np.asarray(read, dtype=np.int32), "labels": np.asarray(write, dtype=np.int32)}

    def answers(self, records: Sequence[Encoded], width: int) -> Batch:
        """Pad answers to (B, width); the decoder sees what comes before, so that it needs no mask."""
        return {
            "decoder_input_ids": pad([record["decoder_input_ids"] for record in records], width, self.end).long(),
            "labels": pad([record["labels"] for record in records], width, IGNORED).long(),
        }

    def made_up_answer(self, length: int, uniform: Uniform) -> Encoded:
        """Random tokens."""
        return {
            "decoder_input_ids": (uniform(length) * self.vocabulary).astype(np.int32),
            "labels": self.made_up_labels(length, uniform),
        }

    def no_answer(self, length: int = 1) -> Encoded:
        """An answer that nothing is learnt from."""
        ids = np.full(length, self.end, dtype=np.int32)
        return {"decoder_input_ids": ids, "labels": np.full(length, IGNORED, dtype=np.int32)}


def end_of(processor: Any, encoder: Any) -> int:
    """Return the token that ends a text.

    Raises
    ------
    ModelError
        Where there is none.
    """
    for holder, name in ((processor, "eos_token_id"), (encoder.generation_config, "eos_token_id")):
        found = getattr(holder, name, None)
        if found is not None:
            return int(found[0] if isinstance(found, list) else found)
    raise ModelError(f"{type(encoder).__name__} knows no token that ends a text; use another model.")


def padding_of(processor: Any) -> int:
    """Return the token that fills a row up; masked, it may be any, and is token 0 where the tokenizer has none."""
    found = getattr(processor, "pad_token_id", None)
    return 0 if found is None else int(found)


def highest_of(processor: Any) -> int:
    """Return the highest token of a tokenizer."""
    vocabulary: Mapping[str, int] = processor.get_vocab()
    return max(vocabulary.values(), default=0)


def _mean(counts: Counts, place: int) -> Counts:
    """Mean over records, within [0, 1]: noise can push a count below zero; 0 of nothing."""
    part, whole = counts[..., place], counts[..., 2]
    return np.clip(np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0), 0.0, 1.0)
