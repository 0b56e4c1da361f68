"""Scores of the public test set, on the server. The test set is public: its scores carry no noise."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from server.history.records import Metric
from shared import arrays, metrics
from shared.arrays import Arrays
from shared.errors import DataError
from shared.features import FeatureCache, features
from shared.models import HEAD, LoadedModel
from shared.run_config import RunConfig, Task
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


def read(path: Path, task: Task) -> tuple[list[str], list[int]]:
    """Read the public test records' texts and their labels' numbers.

    Raises
    ------
    DataError
        Naming the row at fault.
    """
    numbers = {label: number for number, label in enumerate(task.labels)}
    texts: list[str] = []
    labels: list[int] = []
    try:
        with path.open(encoding="utf-8") as lines:  # and not splitlines(): a text may hold U+2028
            for row, line in enumerate(lines, 1):
                text, label = _row(line, f"{path}, row {row}")
                if label not in numbers:
                    raise DataError(f"{path}, row {row}: label {label!r} is not one of the declared {list(numbers)}.")
                texts.append(text)
                labels.append(numbers[label])
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    if not labels:
        raise DataError(f"{path} holds no records.")
    return texts, labels


def _row(line: str, where: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str) or "label" not in record:
        raise DataError(f"{where}: not a JSON object with a text and a label.")
    return record["text"], str(record["label"])
