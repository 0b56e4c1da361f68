"""Audio classification: a clip of sound a record, and one of the declared labels, or any number of them.

What is kept of a clip are 16-bit samples at the model's rate, cut at `task.max_seconds`. All are filled up with silence to that
length when they are used, whatever lengths the model would take: a clip's length is its own, and nobody outside may tell it
from a batch. What a model hears (a log-mel spectrogram, normalised samples) is made of each clip by itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from shared import augmentation
from shared.errors import ModelError
from shared.tasks import hearing, register
from shared.tasks.base import Batch, Column, Encoded, Uniform, Width
from shared.tasks.classification import Classification

TENTHS = 10
FULL = 2**15  # of a 16-bit sample


@register
class AudioClassification(Classification):
    """Clips of sound."""

    name = "audio-classification"
    columns: ClassVar = {"audio": Column("audio"), "label": Column("label")}
    auto = "AutoModelForAudioClassification"
    processor = "AutoFeatureExtractor"
    inputs = ("input_features", "input_values")
    axes = 0
    augments = True

    def adjust(self, settings: Any) -> None:
        """Hide nothing of a clip: the places would be drawn for a batch as a whole."""
        super().adjust(settings)
        settings.apply_spec_augment = False

    def fit(self, encoder: Any, processor: Any) -> None:
        """Take the rate and the window; Whisper's own window of 30 s is made as short as was asked for.

        Raises
        ------
        ModelError
            Where the processor is not one of sound.
        """
        super().fit(encoder, processor)
        names = [name for name in getattr(processor, "model_input_names", ()) if name in self.inputs]
        if not names or not hasattr(processor, "sampling_rate"):
            raise ModelError(
                f"{type(processor).__name__} makes no features of sound; use a model such as Whisper, wav2vec2 or AST."
            )
        self.given, self.rate = names[0], int(processor.sampling_rate)
        self.longest = self.settings.max_seconds * self.rate
        if encoder.config.model_type == "whisper":
            hearing.shorten(encoder, processor, self.settings.max_seconds)
            self.longest = processor.n_samples

    def encode(self, values: Mapping[str, Any], processor: Any) -> Encoded:  # noqa: ARG002 - as the base's
        """16-bit samples (T,), at most `longest`."""
        heard = values["audio"].samples(self.rate, self.longest / self.rate)[: self.longest]
        return {"audio": np.clip(np.rint(heard * FULL), -FULL, FULL - 1).astype(np.int16), **self.target(values)}

    def stand_in(self, values: Mapping[str, Any]) -> Encoded:
        """Silence."""
        return {"audio": np.zeros(1, dtype=np.int16), **self.target(values)}

    def width(self, encoded: Encoded) -> Width:  # noqa: ARG002 - as the base's
        """All clips are as long as the window."""
        return ()

    def collate(self, records: Sequence[Encoded], width: Width, processor: Any) -> Batch:  # noqa: ARG002 - as the base's
        """What the model hears of each clip, (B, ...)."""
        heard = []
        for record in records:
            samples = np.zeros(self.longest, dtype=np.float32)
            samples[: len(record["audio"])] = record["audio"] / np.float32(FULL)
            heard.append(processor(samples, sampling_rate=self.rate, return_tensors="np")[self.given])
        values = np.concatenate(heard).astype(np.float32, copy=False)
        return {self.given: torch.from_numpy(values), **self.targets(records)}

    def augmented(self, encoded: Encoded, uniform: Uniform, processor: Any) -> Encoded:  # noqa: ARG002 - as the base's
        """The clip earlier or later, louder or softer, and with noise."""
        how = self.config.augmentation
        return {**encoded, "audio": augmentation.sound(encoded["audio"], self.longest, self.rate, how, uniform)}

    def made_up(self, length: int, uniform: Uniform, processor: Any) -> Encoded:  # noqa: ARG002 - as the base's
        """So many tenths of the window of noise, as loud as it happens."""
        noise = 2 * uniform(max(1, min(length, TENTHS) * self.longest // TENTHS)) - 1
        return {"audio": (noise * (FULL - 1) * uniform(1)).astype(np.int16), **self.no_target()}

    def widest(self, processor: Any) -> Encoded:  # noqa: ARG002 - as the base's
        """A whole window, as loud as can be."""
        return {"audio": np.full(self.longest, FULL - 1, dtype=np.int16), **self.no_target()}
