"""Whisper's window: thirty seconds, whatever a clip's length, unless it is made shorter."""

from typing import Any

from torch import nn


def shorten(encoder: Any, extractor: Any, seconds: int) -> None:
    """Make the window of a network of Whisper's kind and of its feature extractor at most so many seconds.

    Of the positions the first are kept, which stay what they were: a pass is that much cheaper. The extractor adds no
    noise of its own (`dither`): it would come from torch's generator.
    """
    extractor.dither = 0.0
    if seconds >= extractor.chunk_length:
        return
    extractor.chunk_length = seconds
    extractor.n_samples = seconds * extractor.sampling_rate
    extractor.nb_max_frames = extractor.n_samples // extractor.hop_length
    inner = encoder.get_encoder()
    places = extractor.nb_max_frames // (inner.conv1.stride[0] * inner.conv2.stride[0])
    old = inner.embed_positions.weight
    inner.embed_positions = nn.Embedding.from_pretrained(old.detach()[:places].clone(), freeze=True)  # type: ignore[no-untyped-call]
    inner.max_source_positions = encoder.config.max_source_positions = inner.config.max_source_positions = places
