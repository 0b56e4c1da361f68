"""Random changes of images and sounds: what they keep, and that they change what they are asked to."""

from typing import Any

import numpy as np
import pytest

from shared import augmentation
from shared.run_config import Augmentation

STILL = {"flip": False, "crop": 0.0, "jitter": 0.0, "shift": 0.0, "gain": 0.0, "noise": 0.0}


def only(**how: Any) -> Augmentation:
    return Augmentation.model_validate(STILL | how)


@pytest.fixture
def pixels() -> Any:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.fixture
def samples() -> Any:
    return np.random.default_rng(0).integers(-20_000, 20_000, 1_000, dtype=np.int16)


def test_nothing_changes_where_nothing_is_asked_for(pixels: Any, samples: Any) -> None:
    uniform = np.random.default_rng(1).random
    assert np.array_equal(augmentation.image(pixels, only(), uniform), pixels)
    assert np.array_equal(augmentation.sound(samples, 1_000, 1_000, only(), uniform), samples)


def test_an_image_is_mirrored_half_of_the_time(pixels: Any) -> None:
    uniform = np.random.default_rng(1).random
    found = [augmentation.image(pixels, only(flip=True), uniform) for _ in range(200)]
    mirrored = sum(np.array_equal(each, pixels[:, ::-1]) for each in found)
    assert sum(np.array_equal(each, pixels) for each in found) == 200 - mirrored
    assert 60 < mirrored < 140  # a fair coin is outside once in 10^8


def test_an_image_is_moved_by_at_most_the_share_and_its_edge_is_mirrored_in(pixels: Any) -> None:
    uniform = np.random.default_rng(1).random
    wanted = {
        np.pad(pixels, ((2, 2), (3, 3), (0, 0)), "reflect")[top : top + 20, left : left + 30].tobytes()
        for top in range(5)
        for left in range(7)
    }
    found = {augmentation.image(pixels, only(crop=0.1), uniform).tobytes() for _ in range(1_000)}
    assert found == wanted


def test_light_and_colour_change_and_stay_in_range(pixels: Any) -> None:
    uniform = np.random.default_rng(1).random
    for _ in range(20):
        found = augmentation.image(pixels, only(jitter=0.5), uniform)
        assert found.shape == pixels.shape
        assert found.dtype == np.uint8
        assert not np.array_equal(found, pixels)


def test_a_clip_is_moved_cut_at_the_window_and_never_empty(samples: Any) -> None:
    uniform = np.random.default_rng(1).random
    lengths = set()
    for _ in range(300):
        found = augmentation.sound(samples, 1_000, 1_000, only(shift=0.2), uniform)
        lengths.add(len(found))
        silent = len(found) - len(np.trim_zeros(found, "f"))
        kept = found[silent:]
        assert np.array_equal(kept, samples[: len(kept)]) or np.array_equal(found, samples[1_000 - len(found) :])
    assert min(lengths) >= 800
    assert max(lengths) == 1_000
    assert min(len(augmentation.sound(samples[:1], 1_000, 1_000, only(shift=1.0), uniform)) for _ in range(50)) == 1


def test_a_clip_is_louder_or_softer_by_at_most_so_many_decibels(samples: Any) -> None:
    uniform = np.random.default_rng(1).random
    quiet = (samples // 20).astype(np.int16)
    found = [augmentation.sound(quiet, 1_000, 1_000, only(gain=6.0), uniform) for _ in range(200)]
    ratios = [float(np.linalg.norm(each.astype(float)) / np.linalg.norm(quiet.astype(float))) for each in found]
    assert 0.5 < min(ratios) < 0.55
    assert 1.8 < max(ratios) < 2.01


def test_noise_is_within_its_bound_and_no_sample_overflows(samples: Any) -> None:
    uniform = np.random.default_rng(1).random
    quiet = np.zeros(1_000, dtype=np.int16)
    most = max(int(np.abs(augmentation.sound(quiet, 1_000, 1_000, only(noise=0.01), uniform)).max()) for _ in range(50))
    assert 200 < most <= 328
    loud = np.full(1_000, 32_767, dtype=np.int16)
    assert (augmentation.sound(loud, 1_000, 1_000, only(gain=40.0, noise=1.0), uniform) > -32_767).all()
