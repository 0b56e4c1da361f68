"""Changed copies of a record: one gradient, one clipping; the records as they are where scores are taken."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import seeing
import torch
from torch import Tensor

from client.privacy import probe
from client.privacy.engine import ClippedSum, Clipping, Gradients, Objective, train_only
from client.privacy.randomness import Keystream
from client.training import EncoderPass
from shared import models, scoring
from shared.errors import ConfigError, SensitivityError
from shared.examples import Examples
from shared.models import LoadedModel
from shared.run_config import RunConfig

COPIES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return seeing.write_eye(tmp_path_factory.mktemp("vit"), "vit")


def config(folder: str, copies: int = COPIES, trainable: str = "full", **how: Any) -> RunConfig:
    augmentation = {"multiplicity": copies} | how
    exact = {"gradients": "one-pass", "precision": "float32"}
    return seeing.config("image-classification", folder, trainable, augmentation=augmentation, hardware=exact)


@pytest.fixture
def model(folder: str) -> LoadedModel:
    return models.load(config(folder))


def images(model: LoadedModel, count: int) -> Examples:
    draws = np.random.default_rng(0)
    made = [model.task.made_up(1, draws.random, model.processor) for _ in range(count)]
    labelled = [record | {"labels": np.asarray(number % 3)} for number, record in enumerate(made)]
    return Examples.single(model.task, model.processor, labelled)


def summed(model: LoadedModel, objective: EncoderPass, norm: float) -> tuple[dict[str, Tensor], list[float]]:
    """Clipped sums of all records, and what each contributed."""
    parameters = train_only(model.module, model.trainable)
    with Gradients(objective.module, parameters, "one-pass") as gradients:
        total = ClippedSum(gradients, Clipping(norm))
        units = [(number,) for number in range(len(objective._examples))]
        each = [float(value) for batch in objective.groups(units, whole=False) for value in total.add(batch)]
        return total.sums(), each


def test_copies_of_a_record_count_as_one_and_their_gradients_are_averaged_before_the_clipping(
    model: LoadedModel,
) -> None:
    examples, run = images(model, 4), config("vit")
    seen: list[dict[str, npt.NDArray[Any]]] = []
    original = model.task.augmented

    def kept(encoded: Any, uniform: Any, processor: Any) -> Any:
        seen.append(original(encoded, uniform, processor))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.task, "augmented", kept)
        sums, each = summed(model, EncoderPass(model, examples, run, Keystream(bytes(32)).uniform), 1e6)
    assert len(each) == 4
    assert len(seen) == 4 * COPIES
    assert not np.array_equal(seen[0]["pixels"], seen[1]["pixels"])
    changed = Examples.single(model.task, model.processor, seen)
    plain = run.model_copy(update={"augmentation": run.augmentation.model_copy(update={"multiplicity": 0})})
    alone, _ = summed(model, EncoderPass(model, changed, plain), 1e6)
    largest = max(float(value.norm()) for value in alone.values())
    for name, value in sums.items():
        assert torch.allclose(value, alone[name] / COPIES, atol=1e-5 * largest), name
    _, each = summed(model, EncoderPass(model, examples, run, Keystream(bytes(32)).uniform), 1e-3)
    assert all(value <= 1e-3 for value in each)


def test_the_probe_passes_units_of_as_many_rows_and_catches_copies_that_are_clipped_apart(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = EncoderPass(model, images(model, 0), config("vit"))
    together, _ = objective.made_up()
    assert {batch.inputs[0].shape[1] for _, batch in together if batch.inputs[0].dim() == 5} == {2, 3}
    parameters = train_only(model.module, model.trainable)
    with Gradients(objective.module, parameters, "one-pass") as gradients:
        probe.check(objective.module, gradients, *objective.made_up())

        original = EncoderPass._objective

        def flat(self: EncoderPass, examples: Examples, units: Any, *given: Any) -> Objective:
            """Make each copy a record, which is clipped by itself: together they count k times."""
            return original(self, examples, [(row,) for unit in units for row in unit], *given)

        monkeypatch.setattr(EncoderPass, "_objective", flat)
        with pytest.raises(SensitivityError, match="has lost a record"):
            probe.check(objective.module, gradients, *objective.made_up())


def test_scores_are_of_the_records_as_they_are(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a record was changed to be scored")

    monkeypatch.setattr(model.task, "augmented", never)
    counts, _ = scoring.exact(model, images(model, 5), config("vit").hardware)
    assert counts.sum() == 5


def test_changes_that_nothing_would_be_trained_on_are_refused(folder: str, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"augmentation\.multiplicity=3 .* trained on features"):
        config(folder, trainable="head")
    with pytest.raises(ValueError, match="needs a record's copies as one"):
        seeing.config(
            "image-classification", folder, "full", hardware={"gradients": "hooks"}, augmentation={"multiplicity": 2}
        )
    text = seeing.config("text-classification", str(tiny_model), "lora", augmentation={"multiplicity": 2})
    with pytest.raises(ConfigError, match="text-classification has no random changes of records"):
        models.load(text)
