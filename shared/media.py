"""Images and clips of sound as records hold them: looked at in whole when they are read, and decoded again where needed.

What is kept is where the bytes lie, so that a data set larger than memory can be read. A file that a record names lies in
the data's own folder: a path that leads out of it, by `..` or by a link, is refused.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
import scipy.signal
import soundfile

from shared.errors import Fault

# What pillow may take the bytes for: not EPS, say, for which it starts another program.
IMAGES = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SOUNDS = {"WAV": ".wav", "WAVEX": ".wav", "FLAC": ".flac", "OGG": ".ogg", "MP3": ".mp3"}
MOST_PIXELS = 80_000_000  # of an image: a small file may claim to be any size
RATES = (1_000, 384_000)  # samples a second
LONGEST = 3_600  # seconds of a clip
UNKNOWN = 2**31 - 2**16  # what a wav file says of its size, or more, where it was written to a pipe
BLOCK = 2**18  # samples that are looked at at once

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Source:
    """Where encoded bytes lie: in a file, or here."""

    path: Path | None
    held: bytes = field(default=b"", repr=False)

    def read(self) -> bytes:
        """Return the bytes."""
        return self.held if self.path is None else self.path.read_bytes()


@dataclass(frozen=True)
class Image:
    """An image of a record, (width, height) pixels."""

    source: Source
    size: tuple[int, int]
    suffix: str = ".png"  # of a file of its format

    def open(self) -> PIL.Image.Image:
        """Decode it, as RGB and upright; of several frames the first."""
        with PIL.Image.open(io.BytesIO(self.source.read()), formats=IMAGES) as image:
            return _rgb(PIL.ImageOps.exif_transpose(image))


@dataclass(frozen=True)
class Clip:
    """A clip of sound of a record: its own rate in samples a second, and how many samples it has."""

    source: Source
    rate: int
    frames: int
    suffix: str = ".wav"  # of a file of its format

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.frames / self.rate

    def samples(self, rate: int | None = None, most_seconds: float | None = None) -> Samples:
        """Decode it as (T,) float32 in [-1, 1]: the mean of its channels, at `rate` samples a second or its own.

        What comes after `most_seconds` is left out. Another rate is had by polyphase filtering
        (`scipy.signal.resample_poly`), whatever the clip's own is: T is then ceil(frames * rate / own rate).
        """
        frames = -1 if most_seconds is None else max(1, math.ceil(most_seconds * self.rate))
        decoded, _ = soundfile.read(io.BytesIO(self.source.read()), frames=frames, dtype="float32", always_2d=True)
        return resample(decoded.mean(axis=1), self.rate, rate or self.rate)


def resample(samples: Samples, rate: int, wanted: int) -> Samples:
    """Return samples (T,) of one rate at another one."""
    if rate == wanted:
        return samples
    common = math.gcd(rate, wanted)
    made: Samples = scipy.signal.resample_poly(samples, wanted // common, rate // common)
    return made.astype(np.float32, copy=False)


def image(value: Any, folder: Path) -> Image:
    """Look at an image of a record: a path in `folder`, bytes, or {"bytes", "path"}.

    Raises
    ------
    Fault
        Where it is none, is broken, has no pixels or too many.
    """
    source = _source(value, folder, "image")
    try:
        with PIL.Image.open(io.BytesIO(source.read()), formats=IMAGES) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise PIL.Image.DecompressionBombError
            if opened.mode == "F":
                raise Fault(
                    f"{_named(value)}is an image of floating-point pixels, whose range is unknown; save it as PNG"
                )
            opened.load()
            return Image(source, opened.size, f".{str(opened.format).lower()}")
    except Fault:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise Fault(f"{_named(value)}is an image of more than {MOST_PIXELS} pixels") from None
    except Exception:  # decoders of many formats, on broken bytes: they have no common kind
        raise Fault(f"{_named(value)}is no image that can be decoded ({', '.join(IMAGES)})") from None


def clip(value: Any, folder: Path) -> Clip:
    """Look at a clip of a record: a path in `folder`, bytes, or {"bytes", "path"}, with its "sampling_rate" or without.

    Raises
    ------
    Fault
        Where it is none, is broken, holds no sound or what is no number, or is not of the rate that is said.
    """
    source = _source(value, folder, "clip of sound")
    try:
        held = source.read()
        if held[:4] == b"RIFF" and len(held) - 8 < int.from_bytes(held[4:8], "little") < UNKNOWN:
            raise Fault(
                f"{_named(value)}is a clip that is cut off: it has {len(held)} bytes, and says that it has more"
            )
        with soundfile.SoundFile(io.BytesIO(held)) as opened:
            rate, kind, seconds = opened.samplerate, opened.format, opened.frames / opened.samplerate
            if kind not in SOUNDS:
                raise Fault(f"{_named(value)}is a clip of the format {kind}; save it as wav, flac, ogg or mp3")
            if not RATES[0] <= rate <= RATES[1]:
                raise Fault(f"{_named(value)}has {rate} samples a second; it may have {RATES[0]} to {RATES[1]}")
            if seconds > LONGEST:
                raise Fault(f"{_named(value)}is {seconds:.0f} s long, above {LONGEST} s; cut it")
            frames = 0
            for block in opened.blocks(BLOCK, dtype="float32"):
                if not np.isfinite(block).all():
                    raise Fault(f"{_named(value)}holds samples that are not numbers")
                frames += len(block)
    except Fault:
        raise
    except (soundfile.SoundFileError, OSError, ValueError, TypeError, RuntimeError):
        raise Fault(f"{_named(value)}is no clip of sound that can be decoded (wav, flac, ogg, mp3)") from None
    if frames == 0:
        raise Fault(f"{_named(value)}is a clip without a single sample")
    said = value.get("sampling_rate") if isinstance(value, Mapping) else None
    if said is not None and said != rate:
        raise Fault(f"{_named(value)}is said to have {said} samples a second and has {rate}")
    return Clip(source, rate, frames, SOUNDS[kind])


def _source(value: Any, folder: Path, what: str) -> Source:
    if isinstance(value, Mapping) and value.keys() & {"bytes", "path"}:
        held = value.get("bytes")
        value = value.get("path") if held is None else held
    if isinstance(value, bytes):
        if not value:
            raise Fault("holds no bytes")
        return Source(None, value)
    if not isinstance(value, str) or not value.strip():
        raise Fault(f"is no {what}: neither a path nor bytes")
    return Source(inside(value, folder))


def inside(text: str, folder: Path) -> Path:
    """Return the file that a path in `folder` names, by that name: where a link is changed, it is another file.

    Raises
    ------
    Fault
        Where it lies outside, or is no file.
    """
    try:
        found = (folder / text).resolve()
        if not found.is_relative_to(folder.resolve()):
            raise Fault(f"names {text!r}, which lies outside of the data's folder; move it there")
        if not found.is_file():
            raise Fault(f"names {text!r}, which is no file of the data's folder")
        if not found.stat().st_size:
            raise Fault(f"names {text!r}, which is an empty file")
        with found.open("rb"):
            return folder.absolute() / text
    except OSError as error:
        raise Fault(f"names {text!r}, which cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise error if isinstance(error, Fault) else Fault(f"names {text!r}, which is no path") from None


def _named(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("path")
    return f"names {value!r}, which " if isinstance(value, str) and value else ""


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """RGB of any mode: 16-bit grey is scaled to 8 bits, and what is transparent is laid on white."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) // 257
        return PIL.Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return image.convert("RGB")
