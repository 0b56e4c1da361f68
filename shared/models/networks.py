"""The networks that tasks train: an encoder with our head, transformers' class with its last layer apart, or as it is.

Where a head stands apart, its input is a feature: computed once for as long as the encoder does not change.
"""

from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import ModelError

HEAD = "head."  # how the names of a separate head's parameters begin


class Network(nn.Module):
    """What all three have: `encoder`, a network of transformers, which adapters go into."""

    encoder: nn.Module
    head: nn.Linear
    feature_scale: float

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def features(self, **inputs: Tensor) -> Tensor:  # noqa: ARG002 - of a subclass
        """Return the head's input; a network without a head apart has none."""
        raise TypeError(f"{type(self).__name__} has no head apart, and so no features.")


class Pooled(Network):
    """An encoder, mean pooling, and a linear head.

    The head is one linear layer on the mean of the last hidden states over a text's own tokens, normalised to zero
    mean and unit variance: the pooling that sentence encoders are trained for, bounded in norm, which clipping likes.
    """

    def __init__(self, encoder: nn.Module, hidden_size: int, labels: int, feature_scale: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.feature_scale = feature_scale
        self.head = nn.Linear(hidden_size, labels)

    def features(self, **inputs: Tensor) -> Tensor:
        """Return (B, hidden_size): the mean over each text's tokens (B, T), normalised; float32."""
        hidden = self.encoder(**inputs).last_hidden_state
        hidden = hidden.to(self.head.weight.dtype)  # float32; double in the probe
        weight = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)
        return nn.functional.layer_norm(mean, mean.shape[-1:]) * self.feature_scale

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return logits (B, labels)."""
        logits: Tensor = self.head(self.features(**inputs))
        return logits


class Native(Network):
    """A class of transformers whose last linear layer is taken out and stands apart, as `head`.

    `place` is its name in the class, where an export puts it back. Its input is scaled by `feature_scale`, which an
    export folds into its weight.
    """

    def __init__(self, encoder: nn.Module, labels: int, feature_scale: float) -> None:
        super().__init__()
        self.place = _last_linear(encoder, labels)
        parent, _, name = self.place.rpartition(".")
        head = encoder.get_submodule(self.place)
        assert isinstance(head, nn.Linear)  # noqa: S101 - as it was found
        setattr(encoder.get_submodule(parent), name, nn.Identity())
        self.encoder, self.head = encoder, head
        self.feature_scale = feature_scale

    def features(self, **inputs: Tensor) -> Tensor:
        """Return (B, ..., hidden_size), float32."""
        found: Tensor = self.encoder(**inputs).logits
        return found.to(self.head.weight.dtype) * self.feature_scale

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return logits (B, ..., labels)."""
        logits: Tensor = self.head(self.features(**inputs))
        return logits


class Whole(Network):
    """A class of transformers as it is."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, **inputs: Tensor) -> Any:
        """Return what the class gives."""
        return self.encoder(**inputs)


def _last_linear(encoder: nn.Module, labels: int) -> str:
    found = [
        name
        for name, part in encoder.named_modules()
        if isinstance(part, nn.Linear) and part.out_features == labels and not name.startswith(_inner(encoder))
    ]
    if not found:
        raise ModelError(
            f"{type(encoder).__name__} has no linear layer for the {labels} labels at its end; use another model."
        )
    return str(found[-1])


def _inner(encoder: nn.Module) -> str:
    """How the names of the pretrained part's modules begin."""
    return f"{getattr(encoder, 'base_model_prefix', '') or '?'}."
