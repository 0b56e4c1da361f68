"""Which words of a text speak for a label: integrated gradients (Sundararajan et al. 2017) over the token embeddings.

A word's share is that of the label's logit over an empty text's: the same text with every word's tokens put out, padding in
their place. The shares add up to the difference of the two logits, but for what is lost by taking steps: the gap.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from server.export import exported
from server.export import manifest as manifests
from server.export.pooling import HEAD, NORM
from shared.errors import ConfigError, ModelError
from shared.models import Pooled, quiet

AT_ONCE = 16  # steps that go through the network together


@dataclass(frozen=True)
class Piece:
    """A word of the text as it stands there, with what follows it up to the next, and its share."""

    text: str
    share: float


@dataclass(frozen=True)
class Explanation:
    """A text, word by word, for a label.

    `logit` is the label's, `empty` that of the text without its words, `gap` the sum of shares less their difference.
    """

    target: str
    predicted: str
    probability: float
    logit: float
    empty: float
    gap: float
    pieces: tuple[Piece, ...]
    cut: bool  # the text was longer than the model reads


def explain(folder: Path, text: str, *, target: str | None, steps: int, base: str | None) -> Explanation:
    """Explain one prediction; of the likeliest label where no `target` is named.

    Raises
    ------
    ModelError, ConfigError
        Where the model is no classifier of texts for transformers, or has no such label, or the text is empty.
    """
    from captum.attr import LayerIntegratedGradients

    manifest = manifests.read(folder)
    if manifest.task != "text-classification" or manifest.format != "hf":
        raise ModelError(
            f"{folder} is a model for {manifest.task} in the format {manifest.format}, and `explain` reads classifiers of texts "
            "that were exported with --format hf."
        )
    if not text.strip():
        raise ConfigError("TEXT is empty; give the text to explain.")
    labels = manifest.labels
    if target is not None and target not in labels:
        raise ConfigError(f"--target={target!r} is none of this model's labels: {', '.join(labels)}.")
    with quiet():
        network = exported.network(folder, manifest, base)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        raise ModelError(
            f"{folder} has a tokenizer that does not tell where a token stands in a text; `explain` needs that."
        )
    made = tokenizer(text, truncation=True, return_tensors="pt", return_offsets_mapping=True)
    ids, mask, offsets = made["input_ids"], made["attention_mask"], made.pop("offset_mapping")[0].tolist()
    words = made.word_ids(0)
    if all(word is None for word in words):
        raise ConfigError("TEXT has no word that the model's tokenizer knows; give another.")

    forward = _forward(network, folder, pooled=manifest.head == "pooled")
    put_out = ids.clone()
    put_out[0, [place for place, word in enumerate(words) if word is not None]] = tokenizer.pad_token_id or 0
    with torch.no_grad():
        logits, empty = forward(ids, mask)[0], forward(put_out, mask)[0]
    number = int(logits.argmax()) if target is None else labels.index(target)
    gradients = LayerIntegratedGradients(lambda i, m: forward(i, m)[:, number], network.get_input_embeddings())
    shares: Tensor = gradients.attribute(
        ids, baselines=put_out, additional_forward_args=(mask,), n_steps=steps, internal_batch_size=AT_ONCE
    )
    each = shares.sum(-1)[0].detach().double()
    probabilities = logits.double().sigmoid() if manifest.multi_label else logits.double().softmax(0)
    return Explanation(
        target=labels[number],
        predicted=labels[int(logits.argmax())],
        probability=float(probabilities[number]),
        logit=float(logits[number]),
        empty=float(empty[number]),
        gap=float(each.sum()) - float(logits[number] - empty[number]),
        pieces=_pieces(text, words, offsets, each.tolist()),
        cut=len(tokenizer(text, truncation=False)["input_ids"]) > ids.shape[1],
    )


def _forward(network: Any, folder: Path, *, pooled: bool) -> Any:
    """Give the function from ids and mask to logits."""
    if not pooled:
        return lambda ids, mask: network(input_ids=ids, attention_mask=mask).logits
    norm, head = (load_file(folder / part / "model.safetensors") for part in (NORM, HEAD))
    weight = head["linear.weight"]
    whole = Pooled(network, weight.shape[1], weight.shape[0], float(norm["norm.weight"][0]))
    whole.head.weight, whole.head.bias = nn.Parameter(weight), nn.Parameter(head["linear.bias"])
    return lambda ids, mask: whole(input_ids=ids, attention_mask=mask)


def _pieces(text: str, words: list[int | None], offsets: list[list[int]], shares: list[float]) -> tuple[Piece, ...]:
    """Put tokens together to words; what stands between two goes with the first."""
    starts: dict[int, int] = {}
    of: dict[int, float] = {}
    for word, (start, _), share in zip(words, offsets, shares, strict=True):
        if word is not None:
            starts.setdefault(word, start)
            of[word] = of.get(word, 0.0) + share
    places = [*starts.values(), len(text)]
    places[0] = 0
    return tuple(
        Piece(text[begin:end], of[word]) for word, begin, end in zip(starts, places[:-1], places[1:], strict=True)
    )
