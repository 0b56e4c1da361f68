"""Clips of any length and rate, as the model hears them, with networks of each kind."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeing
import soundfile
import tiny_networks
import torch
import transformers

from shared import media, models
from shared.errors import ModelError
from shared.models import LoadedModel

RATE = 16_000


@pytest.fixture(scope="module", params=seeing.EARS)
def listener(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = seeing.write_ear(tmp_path_factory.mktemp("listener"), request.param)
    return models.load(seeing.config("audio-classification", folder, "full"))


def kept_of(model: LoadedModel, file: Path, samples: Any, rate: int = RATE) -> dict[str, Any]:
    soundfile.write(file, samples, rate, subtype="PCM_16")
    return model.task.encode({"audio": media.clip(file.name, file.parent), "label": "b"}, model.processor)  # type: ignore[return-value]


def tone(seconds: float, rate: int = RATE) -> Any:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate).astype(np.float32)


def test_clips_are_kept_in_16_bits_and_cut_at_the_public_length(listener: LoadedModel, tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).integers(-(2**15), 2**15, RATE // 2, dtype=np.int16)
    kept = kept_of(listener, tmp_path / "short.wav", drawn)
    assert kept["audio"].dtype == np.int16
    assert np.array_equal(kept["audio"], drawn)  # to the bit
    assert len(kept_of(listener, tmp_path / "long.wav", tone(1.7))["audio"]) == RATE
    assert abs(len(kept_of(listener, tmp_path / "slow.wav", tone(0.5, 8_000), 8_000)["audio"]) - RATE // 2) <= 1


def test_what_a_clip_sounds_like_depends_on_no_other_and_its_length_shows_in_no_shape(
    listener: LoadedModel, tmp_path: Path
) -> None:
    clips = [tone(1.0), tone(0.3), 1e-4 * tone(0.7), np.zeros(1, dtype=np.float32)]
    kept = [kept_of(listener, tmp_path / f"{n}.wav", clip) for n, clip in enumerate(clips)]
    task, processor = listener.task, listener.processor
    together = task.collate(kept, (), processor)
    (name,) = set(together) - {"labels"}
    assert torch.isfinite(together[name]).all()
    for number, each in enumerate(kept):
        assert task.width(each) == ()
        alone = task.collate([each], (), processor)[name]
        assert torch.equal(alone[0], together[name][number])
    with torch.no_grad():
        assert listener.outputs(together).shape == (4, 3)


@pytest.mark.parametrize("kind", seeing.EARS)
def test_nothing_of_a_clip_is_hidden_at_random_in_training(tmp_path: Path, kind: str) -> None:
    model = models.load(seeing.config("audio-classification", seeing.write_ear(tmp_path, kind), "full"))
    assert model.module.training
    record = model.task.widest(model.processor)
    with torch.no_grad():
        first, *others = [model.outputs(model.task.collate([record], (), model.processor)) for _ in range(4)]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("trainable", ["full", "lora"])
@pytest.mark.parametrize("kind", seeing.EARS)
def test_the_one_pass_engine_is_right_on_networks_of_sounds(tmp_path: Path, kind: str, trainable: str) -> None:
    folder = seeing.write_ear(tmp_path, kind)
    assert seeing.probed(seeing.config("audio-classification", folder, trainable)) == "one-pass"


def test_whispers_window_is_shortened_and_its_positions_stay_the_first_ones(tmp_path: Path) -> None:
    folder = seeing.write_ear(tmp_path, "whisper")
    whole = transformers.AutoModelForAudioClassification.from_pretrained(folder)
    model = models.load(seeing.config("audio-classification", folder, "head"))
    kept = model.module.encoder.get_submodule("encoder.embed_positions").weight
    assert kept.shape == (50, 16)  # a second; the model's own two have 100
    assert torch.equal(kept, whole.encoder.embed_positions.weight[:50])
    record = model.task.widest(model.processor)
    assert model.task.collate([record], (), model.processor)["input_features"].shape == (1, 8, 100)


def test_a_model_that_lacks_its_encoders_weights_is_refused(tmp_path: Path) -> None:
    """Whisper's classifier has no part of its own that is the pretrained one, by whose name the lack would show."""
    from safetensors.torch import load_file, save_file

    folder = seeing.write_ear(tmp_path, "whisper")
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    save_file({name: value for name, value in held.items() if "layers.1.fc1" not in name}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights: 'encoder\.layers\.1\.fc1"):
        models.load(seeing.config("audio-classification", folder, "head"))


def test_sounds_are_learnt_under_privacy_in_a_whole_run(tmp_path: Path, moonflower_home: Path) -> None:
    """Low tones and high ones; a head first, then adapters on two changed copies of each clip."""
    model = seeing.write_ear(tmp_path / "model", "whisper")
    draw = random.Random(0)  # noqa: S311 - a test

    def row(number: int) -> dict[str, str]:
        label = draw.choice(["low", "high"])
        pitch = draw.uniform(100, 400) if label == "low" else draw.uniform(2_000, 4_000)
        sound = 0.3 * np.sin(2 * np.pi * pitch * np.arange(int(RATE * draw.uniform(0.6, 1.2))) / RATE)
        soundfile.write(tmp_path / f"{number}.wav", sound.astype(np.float32), RATE)
        return {"audio": f"{number}.wav", "label": label}

    head = {"sampling_rate": 1.0, "learning_rate": 1.0, "clipping_norm": 1.0, "local_steps": 3}
    server = {"server_optimizer": "sgd", "server_learning_rate": 1.0}
    settings = {
        "name": "sounds",
        "model": {"name": model, "lora": {"rank": 2, "alpha": 2, "targets": ["attention"]}},
        "task": {"name": "audio-classification", "labels": ["low", "high"], "max_seconds": 1},
        "warm_start": {"rounds": 6, **head, **server},
        "training": {"rounds": 1, "sampling_rate": 0.3, "clipping_norm": 0.5, "server_learning_rate": 1e-3},
        "augmentation": {"multiplicity": 2},
        "privacy": {"max_noise_multiplier": 100.0},
        "evaluation": {"every": 7},
    }
    sites = {"north": [row(n) for n in range(200)], "south": [row(n) for n in range(200, 400)]}
    before, after, _ = tiny_networks.run(tmp_path, settings, sites, [row(n) for n in range(400, 500)])
    assert after["loss"] < before["loss"], (before, after)
    assert after["accuracy"] > 0.8, (before, after)
