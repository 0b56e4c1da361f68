"""What an exported model makes of records, batch by batch, in rows that can be shown."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoFeatureExtractor

from server.export import exported, kinds
from server.export import manifest as manifests
from server.export.kinds import Kind
from server.export.manifest import Manifest
from server.export.use.reading import Row
from shared.errors import ModelError
from shared.models import quiet

HALF = 0.5
WRITERS = ("writing", "rewriting", "dictation")


@dataclass(frozen=True)
class Opened:
    """An exported model, ready to be used."""

    manifest: Manifest
    kind: Kind
    run: Callable[..., Any]
    rate: int | None  # of sound, in samples a second


def open_model(folder: Path, base: str | None = None) -> Opened:
    """Load an exported folder; of an adapter over `base`.

    Raises
    ------
    ModelError
        Where it is none, cannot be loaded, or is of a task that nothing is known of here.
    """
    manifest = manifests.read(folder)
    kind = kinds.of(manifest)
    if kind is None:
        raise ModelError(f"{folder} is a model for {manifest.task}, which `predict` does not know; README.md loads it.")
    with quiet():
        run = kinds.load(kind, manifest, str(folder), exported.network(folder, manifest, base))
        extractor = AutoFeatureExtractor.from_pretrained(folder) if "audio" in kind.roles else None  # type: ignore[no-untyped-call]
    return Opened(manifest, kind, run, None if extractor is None else extractor.sampling_rate)


def columns(model: Opened, scores: bool) -> list[str]:
    """Name the columns of what `predict` yields."""
    match model.kind.plain:
        case "words":
            return ["record", "tags"]
        case "answers":
            return ["record", "answer", "score"]
        case plain if plain in WRITERS:
            return ["record", "text"]
    of_labels = list(model.manifest.labels) if scores else []
    return ["record", *(["labels"] if model.manifest.multi_label else ["label", "score"]), *of_labels]


def predict(
    model: Opened, rows: Sequence[Row], *, batch: int, most_tokens: int, released: bool
) -> Iterator[list[dict[str, Any]]]:
    """Yield what is predicted of each `batch` rows.

    Parameters
    ----------
    most_tokens
        Of a text that is written.
    released
        Decide by the thresholds that were chosen on released scores, not at one half.

    Raises
    ------
    ModelError
        Where the model has no such thresholds.
    """
    if released and not model.manifest.thresholds:
        raise ModelError("this model has no thresholds that were chosen on released scores; leave --thresholds out.")
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        found = _outputs(model, some, most_tokens)
        yield [{"record": row.name, **each} for row, each in zip(some, _said(model, found, released), strict=True)]


def _outputs(model: Opened, rows: Sequence[Row], most_tokens: int) -> Any:
    values = [row.values for row in rows]
    match model.kind.plain:
        case "texts":
            pairs = [each.get("pair") for each in values]
            if any(pairs) and not all(pairs):
                raise ModelError(f"record {rows[[*map(bool, pairs)].index(False)].name} has no pair, and others have.")
            return model.run([each["text"] for each in values], pairs if any(pairs) else None)
        case "words":
            return model.run([list(each["words"]) for each in values])
        case "answers":
            return model.run([each["question"] for each in values], [each["context"] for each in values])
        case "images":
            return model.run([each["image"].open() for each in values])
        case "sounds" | "dictation":
            clips = [each["audio"].samples(model.rate) for each in values]
            return model.run(clips) if model.kind.plain == "sounds" else model.run(clips, most_tokens)
        case "writing":
            return model.run(
                [each.get("messages") or each.get("prompt") or each["text"] for each in values], most_tokens
            )
    return model.run([each["source"] for each in values], most_tokens)


def _said(model: Opened, found: Any, released: bool) -> Iterator[dict[str, Any]]:
    labels = model.manifest.labels
    match model.kind.plain:
        case "words":
            for logits in found:
                cut = logits.isnan().all(1).tolist()  # words that the model was not shown
                tags = logits.argmax(1).tolist()
                yield {"tags": [None if gone else labels[tag] for tag, gone in zip(tags, cut, strict=True)]}
        case "answers":
            for answer, score in found:
                yield {"answer": answer, "score": score}
        case plain if plain in WRITERS:
            for text in found:
                yield {"text": text}
        case _:
            yield from _labelled(model.manifest, found, released)


def _labelled(manifest: Manifest, logits: Tensor, released: bool) -> Iterator[dict[str, Any]]:
    labels = manifest.labels
    if manifest.multi_label:
        limits = torch.tensor(manifest.thresholds if released else [HALF] * len(labels))
        for row in logits.double().sigmoid():
            held = [label for label, p, limit in zip(labels, row, limits, strict=True) if p >= limit]
            yield {"labels": held, **dict(zip(labels, row.tolist(), strict=True))}
        return
    for row in logits.double().softmax(1):
        number = int(row.argmax())
        if released:  # of two labels, the second's
            number = int(row[1] >= manifest.thresholds[0])
        yield {"label": labels[number], "score": float(row[number]), **dict(zip(labels, row.tolist(), strict=True))}
