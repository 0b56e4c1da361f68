"""Text classification: one text a record, one of the declared labels.

A record is a JSON object with an id, a text and a label. Tokens are made once; a batch is padded to its
records' own public bucket (a multiple of 16 tokens), never to its neighbours' length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shared.run_config import Task

BUCKET = 16  # tokens
NO_TOKENS = (0,)  # a text that gives no token still is one record, of one row


def widest(task: Task) -> int:
    """Length that the longest text of a task is padded to."""
    return -(-task.max_length // BUCKET) * BUCKET


@dataclass(frozen=True)
class Examples:
    """Tokenised records: token ids of each, and its label's number."""

    tokens: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def bucket(self, index: int) -> int:
        """Length that a record is padded to, a function of the record alone."""
        return -(-len(self.tokens[index]) // BUCKET) * BUCKET


@dataclass(frozen=True)
class Batch:
    """Records side by side: `input_ids` and `attention_mask` (B, T), `labels` (B,)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def tokenise(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], labels: Sequence[int], max_length: int
) -> Examples:
    """Tokenise texts, cut at `max_length` tokens."""
    if not texts:
        return Examples((), ())
    tokens = tokenizer(list(texts), truncation=True, max_length=max_length, add_special_tokens=True)["input_ids"]
    return Examples(tuple(tuple(ids) or NO_TOKENS for ids in tokens), tuple(labels))


def collate(examples: Examples, indices: Sequence[int], device: torch.device, length: int | None = None) -> Batch:
    """Put records of one bucket side by side; `length` pads further (the probe does)."""
    width = length or max(examples.bucket(index) for index in indices)
    ids = torch.zeros((len(indices), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, index in enumerate(indices):
        tokens = examples.tokens[index]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    labels = torch.tensor([examples.labels[index] for index in indices])
    return Batch(ids.to(device), mask.to(device), labels.to(device))


def batches(examples: Examples, indices: Sequence[int], micro_batch: int) -> Iterator[list[int]]:
    """Yield groups of at most `micro_batch` indices that share a bucket, the shortest first.

    Long records go in smaller groups, so that a group never holds more than `micro_batch` x 64 tokens.
    """
    buckets: dict[int, list[int]] = {}
    for index in indices:
        buckets.setdefault(examples.bucket(index), []).append(index)
    for width, members in sorted(buckets.items()):
        rows = max(1, min(micro_batch, micro_batch * 64 // width))
        for start in range(0, len(members), rows):
            yield members[start : start + rows]
