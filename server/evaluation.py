"""Scores of the public test set, on the server. The test set is public: its scores carry no noise."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from server.history.records import Metric
from server.public_test import read
from shared import arrays, metrics
from shared.arrays import Arrays
from shared.features import FeatureCache, features
from shared.models import HEAD, LoadedModel
from shared.run_config import RunConfig
from shared.tasks.text_classification import Examples, tokenise


class TestSet:
    """The public test records, JSON lines of `text` and `label`, tokenised once."""

    def __init__(self, path: Path, config: RunConfig, model: LoadedModel) -> None:
        self._model, self._config = model, config
        texts, labels = read(path, config.task)
        self._whole = tokenise(model.tokenizer, texts, labels, config.task.max_length)
        quick = config.evaluation.quick_records or len(labels)
        self._quick = Examples(self._whole.tokens[:quick], self._whole.labels[:quick])
        self._cache = FeatureCache()

    def score(self, trained: Arrays, *, whole: bool) -> list[Metric]:
        """Score `trained` on the whole set, or on its first `evaluation.quick_records`; exact."""
        examples = self._whole if whole else self._quick
        module = self._model.module
        arrays.write(module, trained)
        encoder = arrays.digest({name: array for name, array in trained.items() if not name.startswith(HEAD)})
        held = self._cache.get(f"{len(examples)}", encoder, lambda: features(module, examples, self._config.hardware))
        with torch.no_grad():
            logits = module.head(held)
            labels = torch.tensor(examples.labels, device=logits.device)
            loss = float(nn.functional.cross_entropy(logits, labels))
            probabilities = logits.softmax(1).double().cpu().numpy()
        counts = metrics.count(probabilities, np.asarray(examples.labels), 1000)
        found = [Metric("test", None, score.name, score.value) for score in metrics.scores(counts)]
        return [*found, Metric("test", None, "loss", loss), Metric("test", None, "records", len(examples))]
