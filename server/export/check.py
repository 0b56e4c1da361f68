"""Whether an exported folder does what the run's model does: loaded again by plain code, on the same records."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.export import kinds
from server.export.manifest import Manifest
from server.export.source import Source
from shared import records
from shared.errors import ModelError
from shared.examples import Examples, collate
from shared.models import LoadedModel
from shared.tasks.base import Batch

TOLERANCE = 1e-3  # of logits, between the run's code and plain code: kernels round differently
SAMPLES = 16  # records that both see before an export is put in place
LENGTHS = (3, 12, 7)  # of made-up records
OUTPUTS = ("logits", "start_logits", "end_logits")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sample:
    """A record as the network takes it, its values where it is a real one, and what the run's model gives for it."""

    batch: Batch
    values: dict[str, Any] | None
    expected: dict[str, Tensor]


def outputs(found: Any) -> dict[str, Tensor]:
    """Return what of a network's outputs is compared."""
    if isinstance(found, Tensor):
        return {"logits": found}
    return {name: getattr(found, name) for name in OUTPUTS if isinstance(getattr(found, name, None), Tensor)}


@torch.no_grad()
def samples(source: Source, model: LoadedModel) -> list[Sample]:
    """Give records of the public test set, or made-up ones, the widest among them; one that is cut, where texts are."""
    task, processor = model.task, model.processor
    if source.test_set is not None:
        held: list[dict[str, Any] | None] = [
            dict(record.values) for record in records.read(source.test_set, task, identified=False)[:SAMPLES]
        ]
    elif {"text", "label"} <= task.columns.keys():
        held = [{"text": label, "label": _target(model, label)} for label in source.config.task.labels]
    else:
        held = []
    if held and task.name == "text-classification":
        long = " ".join(str(values["text"]) for values in held if values)
        held.append({**(held[0] or {}), "text": " ".join([long] * source.config.task.max_length)})
    made = [task.encode(values, processor) for values in held if values is not None]
    draws = np.random.default_rng(0)  # made-up records, which are nobody's
    extra = [task.made_up(length, draws.random, processor) for length in LENGTHS] + [task.widest(processor)]
    held += [None] * len(extra)
    examples = Examples.single(task, processor, [*made, *extra])
    batches = [collate(examples, [(number,)], CPU) for number in range(len(held))]
    return [
        Sample(model.inputs(batch), values, outputs(model.outputs(batch)))
        for batch, values in zip(batches, held, strict=True)
    ]


def _target(model: LoadedModel, label: str) -> Any:
    return (label,) if model.task.settings.multi_label else label


@torch.no_grad()
def compare(source: Source, manifest: Manifest, taken: list[Sample], folder: str, network: Any) -> None:
    """Compare what an export gives with what the run's model gave.

    Parameters
    ----------
    network
        The export as it was loaded: it takes a batch, and gives logits.

    Raises
    ------
    ModelError
        Where they differ.
    """
    kind = kinds.of(manifest)
    worst, largest = 0.0, 1.0
    pairs = [] if manifest.head == "pooled" and manifest.format == "hf" else [(s, network(**s.batch)) for s in taken]
    for sample, found in pairs:
        got = outputs(found)
        for name, expected in sample.expected.items():
            worst, largest = _worse(worst, got[name] - expected), max(largest, float(expected.abs().max()))
    if kind is not None and kind.plain in PLAIN:
        run = kinds.load(kind, manifest, folder, network)
        real = [sample for sample in taken if sample.values is not None]
        for sample in real:
            got_logits = run(*PLAIN[kind.plain](sample.values or {}, kind.roles))
            expected = sample.expected["logits"]
            worst, largest = _worse(worst, got_logits - expected), max(largest, float(expected.abs().max()))
    if not worst <= TOLERANCE * largest:
        raise ModelError(
            f"Run {source.run.id}: the exported model's logits differ from the run's by {worst:.3g} on {len(taken)} records; "
            f"nothing was written. This is a fault of the export of {source.config.model.name}; please report it."
        )


def _worse(worst: float, difference: Tensor) -> float:
    """Return the larger of two differences; what is no number is infinitely large."""
    largest = float(difference.abs().nan_to_num(torch.inf).max()) if difference.numel() else 0.0
    return max(worst, largest)


def _texts(values: dict[str, Any], roles: tuple[str, ...]) -> list[Any]:
    return [[values[role]] for role in roles if values.get(role) is not None]


def _images(values: dict[str, Any], _: tuple[str, ...]) -> list[Any]:
    return [[values["image"].open()]]


PLAIN: dict[str, Callable[[dict[str, Any], tuple[str, ...]], list[Any]]] = {  # whose code gives (N, labels)
    "texts": _texts,
    "images": _images,
}
