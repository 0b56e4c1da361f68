"""Random changes of images and sounds, which leave what they show as it is: moved, mirrored, other light, louder, noisier.

Several changed copies of a record are rows of one record: their gradients are averaged inside it, before it is clipped (De et
al. 2022, "Unlocking High-Accuracy Differentially Private Image Classification through Scale", section 4). So they cost no
privacy, and time by their number.

Which changes are drawn does not matter for the guarantee: whatever they are, a record's gradient is a function of that record
alone, clipped to the same norm. The numbers come from the site's own stream all the same, which needs no second seed.
"""

import numpy as np
import numpy.typing as npt

from shared.run_config import Augmentation
from shared.tasks.base import Uniform

Pixels = npt.NDArray[np.uint8]
Samples = npt.NDArray[np.int16]

GREY = np.asarray([0.299, 0.587, 0.114], dtype=np.float32)  # of red, green and blue (ITU-R BT.601)
LOUDEST = 2**15 - 1


def image(pixels: Pixels, how: Augmentation, uniform: Uniform) -> Pixels:
    """Return an image (H, W, 3) moved, mirrored or not, and in another light; of the same size."""
    draws = uniform(6)
    rows, columns = (_moved(side, how.crop, draw) for side, draw in zip(pixels.shape[:2], draws[:2], strict=True))
    if how.flip and draws[2] < 0.5:
        columns = columns[::-1]
    changed = pixels[rows[:, None], columns]
    if not how.jitter:
        return changed
    light, contrast, colour = (1 + how.jitter * (2 * draws[3:] - 1)).astype(np.float32)
    grey = changed @ GREY
    middle = grey.mean()
    values = grey[..., None] + colour * (changed - grey[..., None])
    values = light * (middle + contrast * (values - middle))
    lit: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return lit


def _moved(side: int, share: float, draw: float) -> npt.NDArray[np.int64]:
    """Places (side,) that are looked at, by up to `share` of the side off; what lies outside is mirrored in."""
    most = int(share * side)
    places = np.arange(side) + int(draw * (2 * most + 1)) - most
    mirrored: npt.NDArray[np.int64] = side - 1 - np.abs(side - 1 - np.abs(places))
    return mirrored


def sound(samples: Samples, longest: int, rate: int, how: Augmentation, uniform: Uniform) -> Samples:
    """Return a clip (T,) earlier or later, louder or softer, and with white noise; at most `longest` samples.

    What is moved before the beginning is lost, but for the last sample.
    """
    later, louder, hiss = uniform(3)
    shift = int((2 * later - 1) * how.shift * rate)
    moved = samples[min(-shift, len(samples) - 1) :] if shift < 0 else np.pad(samples, (shift, 0))[:longest]
    values = moved * 10 ** ((2 * louder - 1) * how.gain / 20)
    if how.noise:
        values = values + hiss * how.noise * LOUDEST * (2 * uniform(len(moved)) - 1)
    heard: Samples = np.clip(np.rint(values), -LOUDEST, LOUDEST).astype(np.int16)
    return heard
