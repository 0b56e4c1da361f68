"""Load a pretrained Transformer, give it a task's head, and choose what is trained."""

from shared.models.devices import autocast, pick_device
from shared.models.loading import LoadedModel, load, quiet, shapes
from shared.models.networks import HEAD, Native, Network, Pooled, Whole
from shared.models.sources import locate, weights_digest

__all__ = [
    "HEAD",
    "LoadedModel",
    "Native",
    "Network",
    "Pooled",
    "Whole",
    "autocast",
    "load",
    "locate",
    "pick_device",
    "quiet",
    "shapes",
    "weights_digest",
]
