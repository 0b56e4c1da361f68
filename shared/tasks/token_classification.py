"""Token classification: words, each with a tag of IOB2 (Tjong Kim Sang and Veenstra 1999): `O`, `B-TYPE` and `I-TYPE`.

A word's tag is on its first sub-token; the others are ignored. Words that `task.max_length` cuts off are not learnt from,
and in the scores they have the tag `O`: an entity among them is one that was missed. So has a word that gives no token.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from shared.curves import share
from shared.errors import ConfigError, ModelError
from shared.metrics import Counts, Score, with_intervals
from shared.run_config import RunConfig
from shared.tasks import register
from shared.tasks.base import Batch, Column, Encoded, Measured, Task, Uniform, Width, bucket, mask, pad, per_record

OUTSIDE = "O"
IGNORED = -100  # the tag of a word that is not there
CUT = -1  # the place of a word whose tokens are cut off
# Entities of a record, each of another type and found, that count whole; the vector of a record with more is scaled down to
# their norm. Rates are shares of sums over records, so that a scaled record weighs less and tells the same.
ENTITIES = 6


@register
class TokenClassification(Task):
    """Words and their tags; scored by entities, as strict IOB2 reads them."""

    name = "token-classification"
    columns: ClassVar = {"words": Column("words"), "tags": Column("tags")}
    auto = "AutoModelForTokenClassification"
    processor_options: ClassVar = {"add_prefix_space": True}  # tokenizers of bytes take words apart only so
    axes = 2  # tokens, words

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        labels = self.settings.labels
        if self.settings.multi_label:
            raise ConfigError("task.multi_label=true: a word has one tag in token-classification; set it to false.")
        self.types = [label[2:] for label in labels if label.startswith("B-")]
        expected = {OUTSIDE, *(f"{kind}-{name}" for kind in "BI" for name in self.types)}
        if not self.types or set(labels) - expected or OUTSIDE not in labels:
            strange = sorted(set(labels) - expected) or [OUTSIDE if OUTSIDE not in labels else "B-TYPE"]
            raise ConfigError(
                f"task.labels: token-classification reads IOB2, which is O, B-TYPE and I-TYPE of the same types; see {strange[0]!r}."
            )
        self._numbers = {label: number for number, label in enumerate(labels)}
        # Of each tag: which type it begins, and which it goes on with; -1: none.
        self._begins = np.array([self._type_of(label, "B-") for label in labels])
        self._goes_on = np.array([self._type_of(label, "I-") for label in labels])
        self._filler = 0

    def _type_of(self, label: str, prefix: str) -> int:
        return self.types.index(label[2:]) if label.startswith(prefix) else -1

    def adjust(self, settings: Any) -> None:
        """Keep nothing of a pass for the next."""
        settings.use_cache = False

    def fit(self, encoder: Any, processor: Any) -> None:
        """Take the padding token, and see that the tokenizer says which word a token is of.

        Raises
        ------
        ModelError
            Where it does not.
        """
        self._filler = getattr(encoder.config, "pad_token_id", None) or 0
        try:
            known = {0, 1} <= set(processor(["to", "be"], is_split_into_words=True).word_ids())
        except (ValueError, AssertionError):
            known = False
        if not known:
            raise ModelError(
                "the model's tokenizer does not say which word a token is of; use a model with a fast one."
            )

    def fault(self, values: Mapping[str, Any]) -> str | None:
        """Each word has a tag."""
        words, tags = len(values["words"]), len(values["tags"])
        return None if words == tags else f"there are {words} words and {tags} tags"

    def encode(self, values: Mapping[str, Any], processor: Any) -> Encoded:
        """Token ids (T,), and for each word (W,) its tag and the place of its first token."""
        made = processor(
            list(values["words"]), is_split_into_words=True, truncation=True, max_length=self.settings.max_length
        )
        tags = self._tags(values)
        places = np.full(len(tags), CUT, dtype=np.int32)
        for place, word in reversed(list(enumerate(made.word_ids()))):
            if word is not None:
                places[word] = place
        ids = np.asarray(made["input_ids"], dtype=np.int32)
        return {"input_ids": ids, "places": places, "labels": tags} if len(ids) else self.stand_in(values)

    def stand_in(self, values: Mapping[str, Any]) -> Encoded:
        """One token, and all words cut off."""
        tags = self._tags(values)
        return {"input_ids": np.zeros(1, np.int32), "places": np.full(len(tags), CUT, np.int32), "labels": tags}

    def _tags(self, values: Mapping[str, Any]) -> npt.NDArray[np.int32]:
        return np.array([self._numbers[tag] for tag in values["tags"]], dtype=np.int32)

    def width(self, encoded: Encoded) -> Width:
        """Next multiples of 16 tokens and of 16 words."""
        return bucket(len(encoded["input_ids"])), bucket(len(encoded["places"]))

    def collate(self, records: Sequence[Encoded], width: Width, processor: Any) -> Batch:  # noqa: ARG002 - as the base's
        """Pad ids (B, T) on the right, with a mask, and the words' places and tags (B, W)."""
        ids = [record["input_ids"] for record in records]
        return {
            "input_ids": pad(ids, width[0], self._filler).long(),
            "attention_mask": mask(ids, width[0]),
            "places": pad([record["places"] for record in records], width[1], CUT).long(),
            "labels": pad([record["labels"] for record in records], width[1], IGNORED).long(),
        }

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy over a record's own words that are not cut off; 0 where there are none."""
        words, seen = _of_words(outputs, batch), batch["places"] != CUT
        each = nn.functional.cross_entropy(
            words.double().flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="none"
        )
        return per_record(each.view_as(seen), seen)

    @property
    def cells(self) -> tuple[int, ...]:
        """For each type its entities found, predicted and true; then tags that are right, as a share of a record's, and records."""
        return (3 * len(self.types) + 2,)

    @property
    def sensitivity(self) -> float:
        """Norm of the vector of a record with `ENTITIES` entities of different types, all found, and every tag right."""
        return math.sqrt(3 * ENTITIES + 2)

    def measure(self, outputs: Tensor, batch: Batch) -> Measured:
        """Count each record's entities; its vector may be longer than `sensitivity`, to which a site clips it."""
        predicted = torch.where(batch["places"] == CUT, self._numbers[OUTSIDE], _of_words(outputs, batch).argmax(2))
        found = [
            self._counted(guess[: (tags != IGNORED).sum()], tags[tags != IGNORED])
            for guess, tags in zip(predicted.cpu().numpy(), batch["labels"].cpu().numpy(), strict=True)
        ]
        return Measured(np.tile(np.arange(self.cells[0]), (len(found), 1)), np.stack(found))

    def _counted(self, predicted: npt.NDArray[np.int64], true: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        given, wanted = self.entities(predicted), self.entities(true)
        counts = np.zeros((len(self.types), 3))
        for column, entities in enumerate((given & wanted, given, wanted)):
            for kind, _, _ in entities:
                counts[kind, column] += 1
        return np.concatenate([counts.ravel(), [(predicted == true).mean(), 1.0]])

    def entities(self, tags: npt.NDArray[np.int64]) -> set[tuple[int, int, int]]:
        """Entities (type, first word, end) of tags (W,): a `B-` and the `I-` of its type behind it; other `I-` are none."""
        found = set()
        begins = np.flatnonzero(self._begins[tags] >= 0)
        for first in begins.tolist():
            kind, end = int(self._begins[tags[first]]), first + 1
            while end < len(tags) and self._goes_on[tags[end]] == kind:
                end += 1
            found.add((kind, first, end))
        return found

    def scores(self, counts: Counts, noise: float) -> list[Score]:
        """F1, precision and recall of all entities, F1 of each type, and the mean over records of their share of right tags."""
        return with_intervals(self._scores, counts, noise)

    def _scores(self, counts: Counts) -> dict[str, Counts]:
        by_type = counts[..., :-2].reshape(*counts.shape[:-1], len(self.types), 3)
        found, given, wanted = np.moveaxis(by_type.sum(-2), -1, 0)
        each = share(2 * by_type[..., 0], by_type[..., 1] + by_type[..., 2])
        return {
            "entity_f1": share(2 * found, given + wanted),
            "entity_precision": share(found, given),
            "entity_recall": share(found, wanted),
            "tag_accuracy": share(counts[..., -2], counts[..., -1]),
            **{f"entity_f1_{kind}": each[..., number] for number, kind in enumerate(self.types)},
        }

    def made_up(self, length: int, uniform: Uniform, processor: Any) -> Encoded:
        """Random tokens, each a word, some of them cut off."""
        places = np.where(uniform(length) < 0.25, CUT, np.arange(length)).astype(np.int32)
        places[0] = 0
        ids = (uniform(length) * len(processor)).astype(np.int32)
        return {"input_ids": ids, "places": places, "labels": np.zeros(length, dtype=np.int32)}

    def unlikely(self, outputs: Tensor, batch: Batch) -> dict[str, npt.NDArray[Any]]:
        """The tag of the lowest score, of each word."""
        lowest = _of_words(outputs, batch).argmin(2)
        return {"labels": torch.where(batch["labels"] == IGNORED, IGNORED, lowest).cpu().numpy().astype(np.int32)}

    def widest(self, processor: Any) -> Encoded:
        """As many tokens as can be, the highest, each a word."""
        length = bucket(self.settings.max_length)
        ids = np.full(length, max(processor.get_vocab().values(), default=0), dtype=np.int32)
        return {"input_ids": ids, "places": np.arange(length, dtype=np.int32), "labels": np.zeros(length, np.int32)}


def _of_words(outputs: Tensor, batch: Batch) -> Tensor:
    """Scores (B, W, tags) at words' first tokens, of scores (B, T, tags); any, where a word is cut off."""
    places = batch["places"].clamp_min(0)
    return outputs.gather(1, places.unsqueeze(2).expand(-1, -1, outputs.shape[2]))
