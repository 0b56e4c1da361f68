"""Image classification: an image a record, and one of the declared labels, or any number of them.

What is kept of an image are its pixels as the model's processor resizes and crops them, one byte each. The processor's
arithmetic (rescale, normalise) is a function of one pixel's value: it is read off the processor, for all 256, when a
processor's first batch is made.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch

from shared import augmentation
from shared.augmentation import Pixels
from shared.errors import ModelError
from shared.tasks import register
from shared.tasks.base import Batch, Column, Encoded, Uniform, Width
from shared.tasks.classification import Classification

ARITHMETIC = {"do_rescale": False, "do_normalize": False}
SLENDER = 8  # times its short side is what an image's long side counts for
LOOKED_AT = ((40, 30), (30, 40), (300, 500))  # sizes of the images that a processor is tried with
EXACT = 1e-6
VALUES = 256  # of a pixel


@register
class ImageClassification(Classification):
    """Images."""

    name = "image-classification"
    columns: ClassVar = {"image": Column("image"), "label": Column("label")}
    auto = "AutoModelForImageClassification"
    processor = "AutoImageProcessor"
    processor_options: ClassVar = {"backend": "pil"}  # the other one needs torchvision
    inputs = ("pixel_values",)
    axes = 0
    augments = True
    _processor: Any = None  # whose arithmetic `_table` is
    _table: npt.NDArray[np.float32] | None = None

    def fit(self, encoder: Any, processor: Any) -> None:
        """Take the size that the processor makes of images, whatever theirs is.

        Raises
        ------
        ModelError
            Where it makes several sizes, or what it does to a pixel depends on others.
        """
        super().fit(encoder, processor)
        try:
            tried = [_made_up(size) for size in LOOKED_AT]
            whole = [processor(image, return_tensors="np")["pixel_values"][0] for image in tried]
            kept = [pixels(image, processor) for image in tried]
        except (ValueError, TypeError, KeyError, IndexError):
            raise ModelError(
                "model.name: its image processor does not make one image of three colours of each image; use another model."
            ) from None
        sizes = {image.shape for image in kept}
        if len(sizes) > 1:
            shown = " and ".join(f"{width} x {height}" for height, width, _ in sorted(sizes)[:2])
            raise ModelError(
                f"model.name: its image processor makes images of several sizes ({shown}); set its size to a height and a "
                "width, or do_center_crop, in preprocessor_config.json."
            )
        self.size = kept[0].shape
        apart = np.abs(np.stack(whole) - normalised(kept, processor)).max()
        if not apart <= EXACT:
            raise ModelError(
                "model.name: its image processor does more than to resize, crop, rescale and normalise; use another model."
            )

    def encode(self, values: Mapping[str, Any], processor: Any) -> Encoded:
        """Pixels (H, W, 3), of the size that the processor makes."""
        found = pixels(values["image"].open(), processor)
        if found.shape != self.size:
            raise ValueError(f"an image of {found.shape} and not {self.size}")  # `stand_in` is kept of it
        return {"pixels": found, **self.target(values)}

    def stand_in(self, values: Mapping[str, Any]) -> Encoded:
        """A black image."""
        return {"pixels": np.zeros(self.size, dtype=np.uint8), **self.target(values)}

    def width(self, encoded: Encoded) -> Width:  # noqa: ARG002 - as the base's
        """Nothing is padded."""
        return ()

    def collate(self, records: Sequence[Encoded], width: Width, processor: Any) -> Batch:  # noqa: ARG002 - as the base's
        """Pixels (B, 3, H, W), float32, as the processor gives them."""
        if self._table is None or self._processor is not processor:
            self._processor, self._table = processor, _arithmetic(processor)
        values = _looked_up([record["pixels"] for record in records], self._table)
        return {"pixel_values": torch.from_numpy(values), **self.targets(records)}

    def augmented(self, encoded: Encoded, uniform: Uniform, processor: Any) -> Encoded:  # noqa: ARG002 - as the base's
        """The image moved, mirrored, and in another light."""
        return {**encoded, "pixels": augmentation.image(encoded["pixels"], self.config.augmentation, uniform)}

    def made_up(self, length: int, uniform: Uniform, processor: Any) -> Encoded:  # noqa: ARG002 - as the base's
        """Random pixels."""
        drawn = (uniform(int(np.prod(self.size))) * VALUES).astype(np.uint8)
        return {"pixels": drawn.reshape(self.size), **self.no_target()}

    def widest(self, processor: Any) -> Encoded:  # noqa: ARG002 - as the base's
        """A white image."""
        return {"pixels": np.full(self.size, VALUES - 1, dtype=np.uint8), **self.no_target()}


def pixels(image: PIL.Image.Image, processor: Any) -> Pixels:
    """Return an image as the processor resizes and crops it, (H, W, 3).

    Of a slender image only the middle is taken: an image of 1 x 80,000 pixels, made 224 high, would fill the memory.
    """
    short, long = sorted(image.size)
    if long > SLENDER * short:
        width, height = (min(side, SLENDER * short) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    found = processor(image, return_tensors="np", **ARITHMETIC)["pixel_values"][0]
    if found.ndim != 3 or found.shape[0] != 3:
        raise ValueError(f"the processor gives {found.shape}")
    return np.ascontiguousarray(np.moveaxis(np.rint(found), 0, -1).astype(np.uint8))


def normalised(images: Sequence[Pixels], processor: Any) -> npt.NDArray[np.float32]:
    """Return images (H, W, 3) as the processor gives them, (B, 3, H, W), float32."""
    return _looked_up(images, _arithmetic(processor))


def _looked_up(images: Sequence[Pixels], table: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    together = np.moveaxis(np.stack(images), -1, 1)
    return np.stack([colour[together[:, number]] for number, colour in enumerate(table)], axis=1)


def _arithmetic(processor: Any) -> npt.NDArray[np.float32]:
    """Return what the processor makes of each value of a pixel, (3, 256): read off a grey image that has them all."""
    ramp = np.arange(VALUES, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    shape = {name: False for name in vars(processor) if name.startswith("do_") and name not in ARITHMETIC}
    table: npt.NDArray[np.float32] = processor(ramp, return_tensors="np", input_data_format="channels_last", **shape)[
        "pixel_values"
    ][0].reshape(3, VALUES)
    return table.astype(np.float32)


def _made_up(size: tuple[int, int]) -> PIL.Image.Image:
    """An image of this (width, height) with all values of pixels."""
    count = size[0] * size[1] * 3
    return PIL.Image.fromarray((np.arange(count) * 7919 % VALUES).astype(np.uint8).reshape(size[1], size[0], 3))
