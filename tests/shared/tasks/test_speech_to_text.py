"""Speech to text: a clip's features are its own, transcripts begin as Whisper's do, and windows may be short."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from writers import END, START, config_of, probed, two_parts, whisper

from shared import generation, media, models
from shared.errors import ModelError
from shared.examples import Examples, collate
from shared.models import LoadedModel
from shared.run_config import Hardware
from shared.tasks.speech_to_text import SpeechToText
from shared.tasks.tokens import IGNORED

RATE = 16000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return models.load(config_of(folder, "speech-to-text", task={"max_seconds": 1}))


def clip(tmp_path: Path, seconds: float, pitch: float = 300.0, rate: int = RATE) -> media.Clip:
    held, file = io.BytesIO(), tmp_path / f"{seconds}-{pitch}.wav"
    soundfile.write(held, 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate), rate, format="WAV")
    file.write_bytes(held.getvalue())
    return media.clip(file.name, tmp_path)


def kept(
    model: LoadedModel, clips: list[media.Clip], words: tuple[str, ...] = ("four", "two and one", "six")
) -> Examples:
    values = [{"audio": audio, "transcript": word} for audio, word in zip(clips, words, strict=False)]
    return Examples.single(model.task, model.processor, [model.task.encode(each, model.processor) for each in values])


def test_a_clip_is_kept_as_16_bit_samples_at_the_models_rate_cut_at_the_window(
    model: LoadedModel, tmp_path: Path
) -> None:
    examples = kept(model, [clip(tmp_path, 0.5, rate=2 * RATE), clip(tmp_path, 3.0)])
    assert examples.row(0)["audio"].dtype == np.int16
    assert [len(examples.row(number)["audio"]) for number in (0, 1)] == [RATE // 2, RATE]
    assert 0.45 < np.abs(examples.row(1)["audio"]).max() / 32767 < 0.55


def test_the_transcripts_beginning_is_given_and_does_not_count(model: LoadedModel, tmp_path: Path) -> None:
    row = kept(model, [clip(tmp_path, 0.5)]).row(0)
    four = model.processor.tokenizer(" four", add_special_tokens=False)["input_ids"]
    assert row["decoder_input_ids"].tolist() == [START, *four]
    assert row["labels"].tolist() == [*four, END]


def test_of_a_longer_beginning_only_what_comes_after_it_counts(folder: Path, tmp_path: Path) -> None:
    model = models.load(config_of(folder, "speech-to-text"))
    task = model.task
    assert isinstance(task, SpeechToText)
    task.prefix = (START, 200, 201)  # as Whisper's: what begins, the language, no time stamps
    row = kept(model, [clip(tmp_path, 0.5)]).row(0)
    four = model.processor.tokenizer(" four", add_special_tokens=False)["input_ids"]
    assert row["decoder_input_ids"].tolist() == [START, 200, 201, *four]
    assert row["labels"].tolist() == [IGNORED, IGNORED, *four, END]


def test_a_clips_features_do_not_depend_on_its_neighbours(model: LoadedModel, tmp_path: Path) -> None:
    clips = [clip(tmp_path, 0.3), clip(tmp_path, 1.0, 900.0), clip(tmp_path, 0.7, 100.0)]
    examples = kept(model, clips)
    together = collate(examples, [(0,), (1,), (2,)], torch.device("cpu"))["input_features"]
    assert together.shape == (3, 8, 100)
    for number in range(3):
        alone = collate(examples, [(number,)], torch.device("cpu"))["input_features"]
        assert torch.equal(together[number], alone[0])


@torch.no_grad()
def test_a_records_loss_is_its_own_and_that_of_a_loop(model: LoadedModel, tmp_path: Path) -> None:
    examples = kept(model, [clip(tmp_path, 0.3), clip(tmp_path, 1.0, 900.0), clip(tmp_path, 0.7, 100.0)])
    expected = []
    for number in range(3):
        row, batch = examples.row(number), collate(examples, [(number,)], torch.device("cpu"))
        ids = torch.from_numpy(row["decoder_input_ids"]).long().unsqueeze(0)
        logits = model.module.encoder(input_features=batch["input_features"], decoder_input_ids=ids).logits[0].double()
        each = [float(logits[place].logsumexp(0) - logits[place, label]) for place, label in enumerate(row["labels"])]
        expected.append(sum(each) / len(each))
    for width in (None, (32,)):
        batch = collate(examples, [(0,), (1,), (2,)], torch.device("cpu"), width)
        assert model.task.losses(model.outputs(batch), batch).tolist() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_a_short_window_keeps_the_first_positions_and_the_long_one_all(folder: Path, model: LoadedModel) -> None:
    whole = models.load(config_of(folder, "speech-to-text"))
    places = [each.module.encoder.get_encoder().embed_positions.weight for each in (model, whole)]  # type: ignore[operator]
    assert [len(place) for place in places] == [50, 100]
    assert torch.equal(places[0], places[1][:50])
    assert whole.processor.feature_extractor.n_samples == 2 * RATE


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_one_pass_gives_each_records_own_gradient(folder: Path, trainable: str) -> None:
    lora = {"rank": 2, "targets": ["q_proj", "v_proj"]}
    changes: dict[str, Any] = {"model": {"trainable": trainable, "lora": lora}, "hardware": {"gradients": "one-pass"}}
    assert probed(config_of(folder, "speech-to-text", task={"max_seconds": 1}, **changes)) == "one-pass"


def test_what_is_random_in_a_pass_is_off(folder: Path) -> None:
    """Layers dropped and parts of spectrograms hidden are drawn for a batch as a whole: records would share them."""
    import json

    file = folder / "config.json"
    before = file.read_text(encoding="utf-8")
    wild = {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5, "apply_spec_augment": True, "mask_time_prob": 0.5}
    file.write_text(json.dumps(json.loads(before) | wild), encoding="utf-8")
    try:
        settings = models.load(config_of(folder, "speech-to-text")).module.encoder.config
    finally:
        file.write_text(before, encoding="utf-8")
    assert (settings.encoder_layerdrop, settings.decoder_layerdrop, settings.apply_spec_augment) == (0.0, 0.0, False)


def test_transcripts_of_public_clips_are_scored_by_their_words(model: LoadedModel, tmp_path: Path) -> None:
    clips = [clip(tmp_path, 0.3), clip(tmp_path, 1.0, 900.0)]
    values = [{"audio": audio, "transcript": word} for audio, word in zip(clips, ("four", "two"), strict=True)]
    examples = kept(model, clips, ("four", "two"))
    (score,) = model.task.public_scores(model, values, examples, Hardware())
    task = model.task
    assert isinstance(task, SpeechToText)
    heard = generation.answers(model.module.encoder, task, examples, Hardware())
    said = [model.processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in heard]
    assert score.name == "wer"
    assert score.value == generation.word_errors(said, ["four", "two"])


def test_a_model_that_does_not_hear_as_whisper_does_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        models.load(config_of(two_parts(tmp_path, "bart"), "speech-to-text"))
