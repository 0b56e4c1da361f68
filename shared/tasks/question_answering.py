"""Question answering: the span of a context that answers a question, or none (SQuAD's columns, Rajpurkar et al. 2016, 2018).

A context that is too long for the network is cut in chunks that overlap, each with the question; they are rows of the one
record. A chunk that does not hold the whole answer is to point at its first token, which stands for none. At evaluation the
best span of all chunks is the answer, unless the first tokens of all are better.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from shared.curves import share
from shared.errors import ConfigError, ModelError
from shared.metrics import Counts, Score, with_intervals
from shared.run_config import RunConfig
from shared.squad import exact_match, f1
from shared.tasks import register
from shared.tasks.base import (
    Batch,
    Chunks,
    Column,
    Encoded,
    Measured,
    Task,
    Uniform,
    Width,
    bucket,
    mask,
    pad,
    shares,
)

SHORTEST = 32  # task.max_length, of which a quarter is for the question and a quarter for what chunks share
MOST = 16  # chunks of a record; what is behind them is cut off
LONGEST = 30  # tokens of an answer that is given
BETWEEN = "\0"  # answers


@register
class QuestionAnswering(Task):
    """Spans of contexts, scored by exact match and F1 of words."""

    name = "question-answering"
    columns: ClassVar = {"question": Column("text"), "context": Column("text"), "answers": Column("answers")}
    model = "whole"
    auto = "AutoModelForQuestionAnswering"
    head = "qa_outputs"
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    chunks = True
    classifies = False

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        if self.settings.max_length < SHORTEST:
            raise ConfigError(
                f"task.max_length={self.settings.max_length} is too short for a question and a context; give at least {SHORTEST}."
            )
        self._typed, self._filler = False, 0  # as in text classification

    def adjust(self, settings: Any) -> None:
        """Two outputs a token, and nothing kept of a pass for the next."""
        settings.num_labels, settings.use_cache = 2, False

    def fit(self, encoder: Any, processor: Any) -> None:
        """Take the padding token, and see that the tokenizer says where in a text a token stands.

        Raises
        ------
        ModelError
            Where it does not.
        """
        self._filler = getattr(encoder.config, "pad_token_id", None) or 0
        known = getattr(encoder.config, "type_vocab_size", 0) > 1
        self._typed = known and "token_type_ids" in processor.model_input_names
        if not processor.is_fast:
            raise ModelError(
                "the model's tokenizer does not say where in a text a token stands; use a model with a fast one."
            )

    def fault(self, values: Mapping[str, Any]) -> str | None:
        """Each answer stands in the context where it is said to."""
        answers = values["answers"]
        for number, (text, start) in enumerate(zip(answers["text"], answers["answer_start"], strict=True), 1):
            if not values["context"].startswith(text, start):
                return f"answer {number} does not stand in the context at its answer_start"
            if BETWEEN in text:
                return f"answer {number} holds a zero character"
        return None

    def encode(self, values: Mapping[str, Any], processor: Any) -> Chunks:
        """Token ids of question and chunk, where each token stands in the context, and the tokens of the first answer."""
        longest = self.settings.max_length
        question = values["question"]
        asked = processor(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        made = processor(
            question if len(asked) <= longest // 4 else question[: asked[longest // 4 - 1][1]],
            values["context"],
            truncation="only_second",
            max_length=longest,
            stride=longest // 4,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        return [self._chunk(made, number, values) for number in range(min(MOST, len(made["input_ids"])))]

    def _chunk(self, made: Any, number: int, values: Mapping[str, Any]) -> Encoded:
        own = np.array([part == 1 for part in made.sequence_ids(number)])
        offsets = np.where(own[:, None], np.array(made["offset_mapping"][number]).reshape(-1, 2), -1)
        first, last = _span(offsets, values["answers"])
        ids = np.array(made["input_ids"][number], dtype=np.int32)
        types = np.array(made["token_type_ids"][number]) if self._typed else None
        return self._encoded(ids, types, offsets, (first, last), values if number == 0 else None)

    def _encoded(
        self, ids: Any, types: Any, offsets: Any, span: tuple[int, int], values: Mapping[str, Any] | None
    ) -> Encoded:
        """A chunk; the texts, which answers are compared with, are kept in a record's first."""
        typed = {"token_type_ids": types.astype(np.int8)} if self._typed else {}
        context, answers = ("", ()) if values is None else (values["context"], values["answers"]["text"])
        return {
            "input_ids": ids,
            **typed,
            "offsets": offsets.astype(np.int32),
            "first": np.asarray(span[0]),
            "last": np.asarray(span[1]),
            "begins": np.asarray(int(values is not None)),
            "context": _characters(context),
            "answers": _characters(BETWEEN.join(answers)),
        }

    def stand_in(self, values: Mapping[str, Any]) -> Encoded:
        """One token, which stands for no answer."""
        ids = np.zeros(1, dtype=np.int32)
        return self._encoded(ids, ids, np.full((1, 2), -1), (0, 0), values)

    def width(self, encoded: Encoded) -> Width:
        """Next multiple of 16 tokens."""
        return (bucket(len(encoded["input_ids"])),)

    def collate(self, records: Sequence[Encoded], width: Width, processor: Any) -> Batch:  # noqa: ARG002 - as the base's
        """Pad ids (B, T) on the right, with a mask, and offsets (B, T, 2); texts (B, L), which the network does not see."""
        ids = [record["input_ids"] for record in records]
        batch = {"input_ids": pad(ids, width[0], self._filler).long(), "attention_mask": mask(ids, width[0])}
        if self._typed:
            batch["token_type_ids"] = pad([record["token_type_ids"] for record in records], width[0]).long()
        batch["offsets"] = pad([record["offsets"] for record in records], width[0], -1)
        for name in ("first", "last", "begins"):
            batch[name] = torch.from_numpy(np.stack([record[name] for record in records])).long()
        for name in ("context", "answers"):
            texts = [record[name] for record in records]
            batch[name] = pad(texts, max(1, *map(len, texts)), -1)
        return batch

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Mean cross-entropy of the answer's first and last token, among the context's and the one that stands for none."""
        first, last = _scores(outputs, batch)
        cross_entropy = nn.functional.cross_entropy
        return (
            cross_entropy(first, batch["first"], reduction="none")
            + cross_entropy(last, batch["last"], reduction="none")
        ) / 2

    @property
    def cells(self) -> tuple[int, ...]:
        """(3,): exact matches, F1, records."""
        return (3,)

    def measure(self, outputs: Any, batch: Batch) -> Measured:
        """Compare each record's best span with its answers."""
        first, last = _scores(outputs, batch)
        spans, best = _best(first, last)
        none = first[:, 0] + last[:, 0]
        begins = np.append(np.flatnonzero(batch["begins"].cpu().numpy()), len(none))
        found = []
        for start, end in pairwise(begins.tolist()):
            row = start + int(best[start:end].argmax())
            given = ""
            if float(best[row]) > float(none[start:end].min()):
                begin, behind = (int(batch["offsets"][row, spans[row, side], side]) for side in (0, 1))
                given = _text(batch["context"][start])[begin:behind]
            answers = _text(batch["answers"][start]).split(BETWEEN)
            found.append([exact_match(given, answers), f1(given, answers)])
        return shares(np.array(found))

    def scores(self, counts: Counts, noise: float) -> list[Score]:
        """Means over records, as SQuAD's evaluation has them, from 0 to 1."""

        def means(held: Counts) -> dict[str, Counts]:
            return {name: share(held[..., place], held[..., 2]) for place, name in enumerate(("exact_match", "f1"))}

        return with_intervals(means, counts, noise)

    def made_up(self, length: int, uniform: Uniform, processor: Any) -> Encoded:
        """Random tokens; the first is the question."""
        ids = (uniform(length) * len(processor)).astype(np.int32)
        return self._made_up(ids)

    def _made_up(self, ids: npt.NDArray[np.int32]) -> Encoded:
        places = np.arange(len(ids))
        offsets = np.where(places[:, None] > 0, np.stack([places, places + 1], axis=1), -1)
        values = {"context": "a" * (len(ids) + 1), "answers": {"text": ("a",)}}
        return self._encoded(ids, np.minimum(places, 1), offsets, (0, 0), values)

    def unlikely(self, outputs: Any, batch: Batch) -> dict[str, npt.NDArray[Any]]:
        """The tokens of the lowest scores."""
        low = [side.masked_fill(side.isinf(), torch.inf).argmin(1).cpu().numpy() for side in _scores(outputs, batch)]
        return {"first": low[0], "last": low[1]}

    def widest(self, processor: Any) -> Encoded:
        """A chunk as long as can be, of the highest token."""
        highest = max(processor.get_vocab().values(), default=0)
        return self._made_up(np.full(bucket(self.settings.max_length), highest, dtype=np.int32))


def _span(offsets: npt.NDArray[np.int64], answers: Mapping[str, Any]) -> tuple[int, int]:
    """First and last token of the first answer, where they are in the chunk; else (0, 0)."""
    if not answers["text"]:
        return 0, 0
    begin = answers["answer_start"][0]
    behind = begin + len(answers["text"][0])
    first = np.flatnonzero((offsets[:, 0] <= begin) & (begin < offsets[:, 1]))
    last = np.flatnonzero((offsets[:, 0] < behind) & (behind <= offsets[:, 1]))
    return (int(first[0]), int(last[-1])) if len(first) and len(last) else (0, 0)


def _scores(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores (B, T), double, of each token as the answer's first and last; -inf where it cannot be."""
    allowed = batch["offsets"][:, :, 0] >= 0
    allowed[:, 0] = True
    first, last = outputs.start_logits.double(), outputs.end_logits.double()
    return first.masked_fill(~allowed, -torch.inf), last.masked_fill(~allowed, -torch.inf)


def _best(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """First and last token (B, 2) of the best span that is not the first token, and its score (B,); -inf where there is none."""
    first, last = first.clone(), last.clone()
    first[:, 0] = last[:, 0] = -torch.inf
    best = torch.full_like(first[:, 0], -torch.inf)
    spans = torch.zeros(len(best), 2, dtype=torch.long, device=best.device)
    for more in range(min(LONGEST, first.shape[1])):
        score, place = (first[:, : first.shape[1] - more] + last[:, more:]).max(1)
        better = score > best
        best = torch.where(better, score, best)
        spans = torch.where(better[:, None], torch.stack([place, place + more], dim=1), spans)
    return spans, best


def _characters(text: str) -> npt.NDArray[np.int32]:
    return np.array([ord(character) for character in text], dtype=np.int32)


def _text(characters: Tensor) -> str:
    return "".join(chr(code) for code in characters.tolist() if code >= 0)
