"""Images of any size and mode, as the model's processor sees them, with networks of each kind."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import seeing
import tiny_networks
import torch
import transformers

from shared import media, models
from shared.errors import ModelError
from shared.models import LoadedModel
from shared.tasks.image_classification import normalised, pixels

SIZED = {"height": 16, "width": 16}
PROCESSORS: dict[str, Any] = {
    "vit": transformers.ViTImageProcessorPil(size=SIZED),
    "deit": transformers.DeiTImageProcessorPil(size={"height": 20, "width": 20}, crop_size=SIZED),
    "convnext": transformers.ConvNextImageProcessorPil(size={"shortest_edge": 16}, crop_pct=0.8),
    "bit": transformers.BitImageProcessorPil(size={"shortest_edge": 18}, crop_size=SIZED),
    "clip": transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIZED),
    "unnormalised": transformers.ViTImageProcessorPil(size=SIZED, do_normalize=False),
}


def image_of(mode: str, size: tuple[int, int], seed: int = 0) -> PIL.Image.Image:
    draws = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return (
        PIL.Image.fromarray(draws, "RGBA").convert("RGB").convert(mode)
        if mode != "RGBA"
        else PIL.Image.fromarray(draws)
    )


def kept_of(file: Path, model: LoadedModel) -> dict[str, Any]:
    return model.task.encode({"image": media.image(file.name, file.parent), "label": "b"}, model.processor)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = seeing.write_eye(tmp_path_factory.mktemp("vit"), "vit")
    return models.load(seeing.config("image-classification", folder, "full"))


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("size", [(16, 16), (61, 40), (9, 33), (300, 210)])
def test_what_is_kept_and_batched_is_what_the_processor_gives(processor: Any, size: tuple[int, int]) -> None:
    image = image_of("RGB", size)
    found = pixels(image, processor)
    assert found.dtype == np.uint8
    wanted = processor(image, return_tensors="np")["pixel_values"]
    assert np.abs(normalised([found], processor) - wanted).max() <= 1e-6


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "png"), ("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("1", "png"), ("L", "jpg")],
)
def test_an_image_of_any_mode_is_kept_as_three_colours(
    vit: LoadedModel, tmp_path: Path, mode: str, suffix: str
) -> None:
    file = tmp_path / f"image.{suffix}"
    image_of(mode, (40, 30)).save(file)
    kept = kept_of(file, vit)
    assert kept["pixels"].shape == (16, 16, 3)
    assert kept["labels"] == 1
    batch = vit.task.collate([kept, kept], (), vit.processor)
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    if mode == "L" and suffix == "png":
        assert (kept["pixels"] == kept["pixels"][..., :1]).all()


def test_a_photograph_that_was_taken_sideways_is_kept_upright(vit: LoadedModel, tmp_path: Path) -> None:
    upright = PIL.Image.new("RGB", (32, 32), "white")
    upright.paste("black", (0, 0, 32, 8))  # a dark sky
    told = PIL.Image.Exif()
    told[0x0112] = 6  # turned by a quarter, to be turned back when shown
    upright.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=told)
    upright.save(tmp_path / "upright.png")
    sides = [kept_of(tmp_path / name, vit)["pixels"] for name in ("side.png", "upright.png")]
    assert np.array_equal(*sides)


def test_a_slender_image_takes_no_more_memory_than_others(tmp_path: Path) -> None:
    processor = PROCESSORS["bit"]
    image = PIL.Image.new("RGB", (60_000, 1), "red")
    seen: list[tuple[int, int]] = []
    kind = type(processor)

    class Watched(kind):  # type: ignore[misc, valid-type]
        def resize(self, image: Any, *given: Any, **options: Any) -> Any:
            found = super().resize(image, *given, **options)
            seen.append(found.shape[1:])
            return found

    watched = Watched.from_dict(processor.to_dict())
    assert pixels(image, watched).shape == (16, 16, 3)
    assert max(seen[0]) <= 8 * 18


def test_an_image_that_the_processor_cannot_take_gets_a_black_one_in_its_place(vit: LoadedModel) -> None:
    kept = vit.task.stand_in({"label": "c"})
    assert not kept["pixels"].any()
    assert vit.task.collate([kept], (), vit.processor)["pixel_values"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("trainable", ["full", "lora"])
@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2", "swin", "convnext"])
def test_the_one_pass_engine_is_right_on_networks_of_images(tmp_path: Path, kind: str, trainable: str) -> None:
    folder = seeing.write_eye(tmp_path, kind)
    assert seeing.probed(seeing.config("image-classification", folder, trainable)) == "one-pass"


def test_a_network_with_batch_normalisation_is_refused_by_name(tmp_path: Path) -> None:
    folder = seeing.write_eye(tmp_path, "resnet")
    with pytest.raises(ModelError, match=r"has batch normalisation .* use a model with layer or group normalisation"):
        models.load(seeing.config("image-classification", folder, "head"))


def test_a_processor_that_keeps_an_images_proportions_is_refused(tmp_path: Path) -> None:
    open_ended = transformers.BitImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False)
    folder = seeing.write_eye(tmp_path, "vit", open_ended)
    with pytest.raises(ModelError, match=r"images of several sizes .* do_center_crop"):
        models.load(seeing.config("image-classification", folder, "head"))


def test_the_same_image_has_the_same_outputs_in_plain_transformers(vit: LoadedModel, tmp_path: Path) -> None:
    image = image_of("RGB", (50, 40))
    image.save(tmp_path / "image.png")
    kept = kept_of(tmp_path / "image.png", vit)
    with torch.no_grad():
        ours = vit.module.features(**vit.inputs(vit.task.collate([kept], (), vit.processor)))
        inputs = vit.processor(image, return_tensors="pt")
        theirs = vit.module.encoder.base_model(**inputs).last_hidden_state[:, 0]  # type: ignore[operator, union-attr]
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_images_are_learnt_under_privacy_in_a_whole_run(tmp_path: Path, moonflower_home: Path) -> None:
    """Dark and bright ones; a head first, then adapters on three changed copies of each image."""
    model = seeing.write_eye(tmp_path / "model", "vit")
    draw = random.Random(0)  # noqa: S311 - a test

    def row(number: int) -> dict[str, str]:
        label = draw.choice(["dark", "bright"])
        noise = np.random.default_rng(number).integers(0, 128, (20, 24, 3))
        PIL.Image.fromarray((noise + 127 * (label == "bright")).astype(np.uint8)).save(tmp_path / f"{number}.png")
        return {"image": f"{number}.png", "label": label}

    head = {"sampling_rate": 1.0, "learning_rate": 1.0, "clipping_norm": 1.0, "local_steps": 3}
    server = {"server_optimizer": "sgd", "server_learning_rate": 1.0}
    settings = {
        "name": "images",
        "model": {"name": model, "lora": {"rank": 2, "alpha": 2, "targets": ["attention"]}},
        "task": {"name": "image-classification", "labels": ["dark", "bright"]},
        "warm_start": {"rounds": 6, **head, **server},
        "training": {"rounds": 1, "sampling_rate": 0.3, "clipping_norm": 0.5, "server_learning_rate": 1e-3},
        "augmentation": {"multiplicity": 3, "jitter": 0.1},
        "privacy": {"max_noise_multiplier": 100.0},
        "evaluation": {"every": 7},
    }
    sites = {"north": [row(n) for n in range(200)], "south": [row(n) for n in range(200, 400)]}
    before, after, _ = tiny_networks.run(tmp_path, settings, sites, [row(n) for n in range(400, 500)])
    assert after["loss"] < before["loss"], (before, after)
    assert after["accuracy"] > 0.8, (before, after)
