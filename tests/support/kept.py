"""What is kept of texts for a network: made from token ids, and looked into."""

from collections.abc import Sequence

import numpy as np

from shared import tasks
from shared.examples import Examples
from shared.run_config import RunConfig

CONFIG = {"model": {"name": "any"}, "task": {"labels": ["bad", "good"]}, "training": {"rounds": 1, "batch_size": 1}}


def of_tokens(tokens: Sequence[Sequence[int]], labels: Sequence[int]) -> Examples:
    """Keep texts of these token ids, each a unit of its own."""
    records = [
        {"input_ids": np.asarray(ids, dtype=np.int32), "labels": np.asarray(label)}
        for ids, label in zip(tokens, labels, strict=True)
    ]
    return Examples.single(tasks.of(RunConfig.model_validate(CONFIG)), None, records)


def tokens(examples: Examples) -> list[tuple[int, ...]]:
    """Token ids of each row."""
    return [tuple(examples.row(number)["input_ids"].tolist()) for number in range(examples.rows)]


def labels(examples: Examples) -> list[int]:
    """Label's number of each row."""
    return [int(examples.row(number)["labels"]) for number in range(examples.rows)]
