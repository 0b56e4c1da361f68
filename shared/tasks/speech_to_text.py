"""Speech to text: a clip of sound that is heard, and its transcript that is written, by models of Whisper's kind.

What is kept of a clip are 16-bit samples at the model's rate, cut at `task.max_seconds`, or at the model's own window of
30 s where that is shorter. The log-mel spectrogram is made of each clip by itself when it is used, filled up with silence
to the window: so a clip's features depend on no other. A window of less than the model's own keeps the first of its
positions, which makes a pass that much cheaper: set `task.max_seconds` to the longest clip there is.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from shared import generation
from shared.errors import ModelError
from shared.metrics import Score
from shared.tasks import hearing, register
from shared.tasks.base import Batch, Column, Encoded, Uniform, Width, bucket
from shared.tasks.tokens import Answering, highest_of

if TYPE_CHECKING:
    from shared.examples import Examples
    from shared.models import LoadedModel
    from shared.run_config import Hardware

LOUDEST = 32767  # of a 16-bit sample


@register
class SpeechToText(Answering):
    """Transcripts of clips."""

    name = "speech-to-text"
    columns: ClassVar = {"audio": Column("audio"), "transcript": Column("text")}
    auto = "AutoModelForSpeechSeq2Seq"
    processor = "AutoProcessor"
    inputs = ("input_features", "decoder_input_ids")

    def adjust(self, settings: Any) -> None:
        """Hide nothing of a spectrogram: the places would be drawn for a batch as a whole."""
        super().adjust(settings)
        settings.apply_spec_augment = False

    def fit(self, encoder: Any, processor: Any) -> None:
        """Make the window as short as was asked for, and take what a transcript begins and ends with from the tokenizer."""
        super().fit(encoder, processor)
        if getattr(encoder.config, "model_type", "") != "whisper":
            raise ModelError(
                f"speech-to-text trains models of Whisper's kind, and this is a {type(encoder).__name__}; use openai/whisper-tiny, "
                "say."
            )
        hearing.shorten(encoder, processor.feature_extractor, self.settings.max_seconds)
        around = list(processor.tokenizer("")["input_ids"])
        if len(around) < 2:
            raise ModelError(
                "the model's tokenizer puts no begin and end token around a transcript; use Whisper's own."
            )
        self.prefix, self.end = tuple(around[:-1]), around[-1]

    def encode(self, values: Mapping[str, Any], processor: Any) -> Encoded:
        """16-bit samples, and the transcript's tokens: as Whisper was trained, with a space in front."""
        extractor = processor.feature_extractor
        samples = values["audio"].samples(extractor.sampling_rate, extractor.chunk_length)[: extractor.n_samples]
        ids = processor.tokenizer(f" {values['transcript'].strip()}", add_special_tokens=False)["input_ids"]
        return {"audio": (np.clip(samples, -1, 1) * LOUDEST).astype(np.int16), **self.answer(ids)}

    def stand_in(self, values: Mapping[str, Any]) -> Encoded:  # noqa: ARG002 - as the base's
        """Silence, and nothing to learn."""
        return {"audio": np.zeros(1, dtype=np.int16), **self.no_answer()}

    def width(self, encoded: Encoded) -> Width:
        """Next multiple of 16 tokens; the window of sound is the same for all."""
        return (bucket(len(encoded["labels"])),)

    def collate(self, records: Sequence[Encoded], width: Width, processor: Any) -> Batch:
        """Log-mel spectrograms (B, bands, frames), each made alone, and transcripts (B, T)."""
        extractor = processor.feature_extractor
        heard = [
            extractor(record["audio"] / np.float32(LOUDEST), sampling_rate=extractor.sampling_rate, return_tensors="np")
            for record in records
        ]
        features = np.concatenate([each["input_features"] for each in heard])
        return {"input_features": torch.from_numpy(features), **self.answers(records, *width)}

    def made_up(self, length: int, uniform: Uniform, processor: Any) -> Encoded:
        """A tenth of a second of noise a token, as loud as it happens, and random tokens."""
        extractor = processor.feature_extractor
        samples = uniform(min(length * extractor.sampling_rate // 10, extractor.n_samples)) * 2 - 1
        loud = LOUDEST * uniform(1)
        return {"audio": (samples * loud).astype(np.int16), **self.made_up_answer(length, uniform)}

    def widest(self, processor: Any) -> Encoded:
        """A whole window, as loud as can be, and a transcript as long as can be, of the highest token."""
        ids = np.full(bucket(self.settings.max_target_length), highest_of(processor.tokenizer), dtype=np.int32)
        audio = np.full(processor.feature_extractor.n_samples, LOUDEST, dtype=np.int16)
        return {"audio": audio, "decoder_input_ids": ids, "labels": ids}

    def public_scores(
        self, model: "LoadedModel", values: Sequence[Mapping[str, Any]], examples: "Examples", hardware: "Hardware"
    ) -> list[Score]:
        """Word error rate of greedy transcripts, without case and punctuation: errors over the words that were said."""
        written = [
            model.processor.tokenizer.decode(ids, skip_special_tokens=True)
            for ids in generation.answers(model.module.encoder, self, examples, hardware)
        ]
        return [Score("wer", generation.word_errors(written, [str(record["transcript"]) for record in values]))]
