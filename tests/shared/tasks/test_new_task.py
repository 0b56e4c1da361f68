"""A new task, whole: ordered labels, of which the expected one is learnt. It runs under privacy as the others do."""

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny_networks
import torch
from torch import Tensor

from shared import tasks
from shared.curves import share
from shared.metrics import Counts, Score, with_intervals
from shared.tasks.base import Batch, Column, Encoded, Measured, Task, Uniform, Width, bucket, mask, pad, shares


class Rating(Task):
    """A text and its stars, fewest first; scored by how near the expected number of stars is, from 0 to 1."""

    name = "rating"
    columns: ClassVar = {"text": Column("text"), "label": Column("label")}
    model, features = "pooled", True

    def encode(self, values: Mapping[str, Any], processor: Any) -> Encoded:
        ids = processor(values["text"], truncation=True, max_length=self.settings.max_length)["input_ids"]
        return self.stand_in(values) | {"input_ids": np.asarray(ids, dtype=np.int32)}

    def stand_in(self, values: Mapping[str, Any]) -> Encoded:
        stars = self.settings.labels.index(values["label"])
        return {"input_ids": np.zeros(1, dtype=np.int32), "labels": np.asarray(stars)}

    def width(self, encoded: Encoded) -> Width:
        return (bucket(len(encoded["input_ids"])),)

    def collate(self, records: Sequence[Encoded], width: Width, processor: Any) -> Batch:
        ids = [record["input_ids"] for record in records]
        labels = torch.tensor([int(record["labels"]) for record in records])
        return {"input_ids": pad(ids, *width).long(), "attention_mask": mask(ids, *width), "labels": labels}

    def off(self, outputs: Tensor, batch: Batch) -> Tensor:
        """How far the expected stars (B,) are from the true ones, as a share of all."""
        stars = torch.arange(outputs.shape[1], dtype=torch.float64, device=outputs.device)
        return (outputs.double().softmax(1) @ stars - batch["labels"]) / (outputs.shape[1] - 1)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.off(outputs, batch) ** 2

    @property
    def cells(self) -> tuple[int, ...]:
        return (2,)

    def measure(self, outputs: Tensor, batch: Batch) -> Measured:
        return shares(1 - self.off(outputs, batch).abs().cpu().numpy()[:, None])

    def scores(self, counts: Counts, noise: float) -> list[Score]:
        return with_intervals(lambda held: {"nearness": share(held[..., 0], held[..., 1])}, counts, noise)

    def made_up(self, length: int, uniform: Uniform, processor: Any) -> Encoded:
        return {"input_ids": (uniform(length) * len(processor)).astype(np.int32), "labels": np.asarray(0)}

    def unlikely(self, outputs: Tensor, batch: Batch) -> dict[str, Any]:
        return {"labels": outputs.argmin(1).cpu().numpy()}

    def widest(self, processor: Any) -> Encoded:
        ids = np.full(bucket(self.settings.max_length), len(processor) - 1, dtype=np.int32)
        return {"input_ids": ids, "labels": np.asarray(0)}


@pytest.fixture
def registered() -> Iterator[None]:
    tasks.register(Rating)
    yield
    del tasks._REGISTERED[Rating.name]


def test_a_new_task_is_a_class_of_under_60_lines() -> None:
    assert len(inspect.getsource(Rating).splitlines()) < 60


@pytest.mark.usefixtures("registered")
def test_a_new_task_learns_under_privacy_in_a_whole_run(
    tmp_path: Path, tiny_model: Path, moonflower_home: Path
) -> None:
    draw = random.Random(0)  # noqa: S311 - a test
    told = {"one": ["awful"], "two": ["poor", "bad"], "three": ["fine"], "four": ["great", "good"]}

    def row() -> dict[str, str]:
        label = draw.choice(list(told))
        return {"text": f"the film was {draw.choice(told[label])} and so {draw.choice(told[label])}", "label": label}

    assert Rating.name in tasks.names()
    head = {"sampling_rate": 1.0, "learning_rate": 0.5, "clipping_norm": 1.0, "local_steps": 3}
    server = {"server_optimizer": "sgd", "server_learning_rate": 1.0}
    settings = {
        "name": "rating",
        "model": {"name": str(tiny_model), "lora": {"rank": 2, "alpha": 2}},
        "task": {"name": "rating", "labels": list(told), "max_length": 16},
        "warm_start": {"rounds": 30, **head, **server},
        "training": {"rounds": 1, "sampling_rate": 0.3, "clipping_norm": 0.5, "server_learning_rate": 1e-3},
        "privacy": {"max_noise_multiplier": 100.0},
        "evaluation": {"every": 31},
    }
    sites = {name: [row() for _ in range(400)] for name in ("north", "south")}
    before, after, pooled = tiny_networks.run(tmp_path, settings, sites, [row() for _ in range(200)])
    assert after["nearness"] > before["nearness"] + 0.03, (before, after)
    assert pooled.keys() == {"nearness"}
