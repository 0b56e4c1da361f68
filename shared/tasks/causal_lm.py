"""Causal language modelling: a text, a prompt and its completion, or a conversation a record.

Of a text every token counts, of a prompt and its completion the completion alone. Of a conversation, written by the
tokenizer's chat template, the assistant's turns count where the template marks them ({% generation %}), else every token;
a tokenizer without a template gets a plain one, `PLAIN`, which marks them. Each record ends with the tokenizer's end token.

A text or a conversation longer than `task.max_length` tokens is cut in chunks of that length, each read without what came
before; at most `MOST_CHUNKS`, the rest is left out. They are one record: its loss is the mean of theirs. A prompt that is
too long loses its beginning, a completion its end.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from shared.tasks import register
from shared.tasks.base import Batch, Chunks, Column, Encoded, Uniform, Width, bucket, mask, pad
from shared.tasks.tokens import IGNORED, Writing, highest_of, padding_of

MOST_CHUNKS = 8  # of one record: rows that go through the network together
FORMS = ({"text"}, {"prompt", "completion"}, {"messages"})
MARKED = re.compile(r"\{%-?\s*generation\b")
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token or '' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
)


@register
class CausalLm(Writing):
    """What comes next."""

    name = "causal-lm"
    columns: ClassVar = {
        "text": Column("text", needed=False),
        "prompt": Column("text", needed=False),
        "completion": Column("text", needed=False),
        "messages": Column("messages", needed=False),
    }
    auto = "AutoModelForCausalLM"
    chunks = True

    def fault(self, values: Mapping[str, Any]) -> str | None:
        """One of the three forms, and something to say for the assistant."""
        if values.keys() not in FORMS:
            return (
                f"a record holds text, or prompt and completion, or messages, and this one holds {_listed(values)}; name its "
                "columns in site.toml, [dataset.columns], and leave the others out of the file"
            )
        if "messages" in values and all(message["role"] != "assistant" for message in values["messages"]):
            return "its messages hold none of the role 'assistant', from which a model would learn"
        return None

    def encode(self, values: Mapping[str, Any], processor: Any) -> Chunks:
        """Token ids, and after each what comes next, in one chunk or several."""
        if "messages" in values:
            ids, counts = _conversation(values["messages"], processor)
        elif "completion" in values:
            ids, counts = self._completed(values["prompt"], values["completion"], processor)
        else:
            ids = _ended(processor(values["text"])["input_ids"], processor)
            counts = [1] * len(ids)
        read = np.asarray(ids[:-1], dtype=np.int32)
        labels = np.where(np.asarray(counts[1:], dtype=bool), np.asarray(ids[1:], dtype=np.int32), IGNORED)
        starts = range(0, len(read), self.settings.max_length)
        cuts = [slice(start, start + self.settings.max_length) for start in starts]
        kept = [cut for cut in cuts if (labels[cut] != IGNORED).any()][:MOST_CHUNKS]
        if not kept:
            return [self.stand_in(values)]
        return [_chunk(read[cut], labels[cut], first=cut is kept[0]) for cut in kept]

    def _completed(self, prompt: str, completion: str, processor: Any) -> tuple[list[int], list[int]]:
        """Put both one after the other as they stand, so that all fits in one row with something before the completion."""
        before = list(processor(prompt)["input_ids"])
        if before and before[-1] == getattr(processor, "eos_token_id", None):
            before.pop()
        after = _ended(processor(completion, add_special_tokens=False)["input_ids"], processor)
        after = after[: self.settings.max_length]
        before = before[-(self.settings.max_length + 1 - len(after)) :]
        return before + after, [0] * len(before) + [1] * len(after)

    def stand_in(self, values: Mapping[str, Any]) -> Encoded:  # noqa: ARG002 - as the base's
        """One token, from which nothing is learnt."""
        return _chunk(np.zeros(1, dtype=np.int32), np.full(1, IGNORED, dtype=np.int32), first=True)

    def width(self, encoded: Encoded) -> Width:
        """Next multiple of 16 tokens."""
        return (bucket(len(encoded["input_ids"])),)

    def collate(self, records: Sequence[Encoded], width: Width, processor: Any) -> Batch:
        """Pad ids (B, T) on the right, with a mask, and labels (B, T); `begins` (B,) is 1 at a record's first chunk."""
        ids = [record["input_ids"] for record in records]
        return {
            "input_ids": pad(ids, width[0], padding_of(processor)).long(),
            "attention_mask": mask(ids, width[0]),
            "labels": pad([record["labels"] for record in records], width[0], IGNORED).long(),
            "begins": pad([record["begins"].reshape(1) for record in records], 1).long().squeeze(1),
        }

    def made_up(self, length: int, uniform: Uniform, processor: Any) -> Encoded:
        """Tokens from the whole vocabulary."""
        ids = (uniform(length) * len(processor)).astype(np.int32)
        return _chunk(ids, self.made_up_labels(length, uniform), first=True)

    def widest(self, processor: Any) -> Encoded:
        """A text as long as can be, of the highest token."""
        ids = np.full(bucket(self.settings.max_length), highest_of(processor), dtype=np.int32)
        return _chunk(ids, ids, first=True)


def _chunk(ids: Any, labels: Any, *, first: bool) -> Encoded:
    return {"input_ids": ids, "labels": labels.astype(np.int32), "begins": np.asarray(int(first))}


def _ended(ids: Sequence[int], processor: Any) -> list[int]:
    """Put the end token behind, where the tokenizer has one and has not."""
    end = getattr(processor, "eos_token_id", None)
    return [*ids] if end is None or (ids and ids[-1] == end) else [*ids, end]


def _conversation(messages: Sequence[Mapping[str, str]], processor: Any) -> tuple[list[int], list[int]]:
    """Token ids, and for each whether it counts."""
    template = getattr(processor, "chat_template", None) or PLAIN
    marked = MARKED.search(template) is not None
    made = processor.apply_chat_template(
        [dict(message) for message in messages],
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=marked,
    )
    ids = list(made["input_ids"])
    return ids, list(made["assistant_masks"]) if marked else [1] * len(ids)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(sorted(values)) or "none of them"
