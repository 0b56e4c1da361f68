"""Scores of the public test set, on the server. The test set is public: its scores carry no noise."""

import copy
from pathlib import Path

import torch

from server.history.records import Metric
from shared import arrays, records
from shared.arrays import Arrays
from shared.examples import Examples
from shared.features import FeatureCache, features
from shared.models import HEAD, LoadedModel
from shared.run_config import RunConfig
from shared.scoring import exact

FINE, LARGEST = 1000, 10_000_000  # bins of a public record's score, and cells of all


class TestSet:
    """The public test records, encoded once."""

    def __init__(self, path: Path, config: RunConfig, model: LoadedModel) -> None:
        self._model, self._config = model, config
        task, processor = copy.copy(model.task), model.processor  # what it took from the model, and its own bins
        task.bins = max(task.bins, min(FINE, LARGEST // max(1, len(config.task.labels)) ** 2))
        read = records.read(path, task, identified=False)
        held = [task.encode(record.values, processor) for record in read]
        self._written = [record.values for record in read[: config.evaluation.generated_records]]
        self._whole = Examples.single(task, processor, held)
        self._quick = self._whole.first(config.evaluation.quick_records or len(held))
        self._cache = FeatureCache()

    @torch.no_grad()
    def score(self, trained: Arrays, *, whole: bool) -> list[Metric]:
        """Score `trained` on the whole set, or on its first `evaluation.quick_records`; exact."""
        examples = self._whole if whole else self._quick
        model, hardware = self._model, self._config.hardware
        arrays.write(model.module, trained)
        held = None
        if model.task.features:
            encoder = arrays.digest({name: array for name, array in trained.items() if not name.startswith(HEAD)})
            held = self._cache.get(f"{len(examples)}", encoder, lambda: features(model, examples, hardware))
        counts, loss = exact(model, examples, hardware, held)
        found = [Metric("test", None, score.name, score.value) for score in examples.task.scores(counts, 0.0)]
        if all(metric.name != "loss" for metric in found):
            found.append(Metric("test", None, "loss", loss))
        if whole and self._written:
            few = self._whole.first(len(self._written))
            more = model.task.public_scores(model, self._written, few, hardware)
            found += [Metric("test", None, score.name, score.value) for score in more]
        return [*found, Metric("test", None, "records", len(examples))]
