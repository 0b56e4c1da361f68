"""Loading a pretrained Transformer and choosing what of it is trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shared import arrays, models
from shared.errors import ModelError
from shared.models import LoadedModel
from shared.run_config import RunConfig

Load = Callable[..., LoadedModel]


def config(name: object, **changes: Any) -> RunConfig:
    base: dict[str, Any] = {
        "model": {"name": str(name), "lora": {"rank": 2, "alpha": 4}},
        "task": {"labels": ["bad", "good"], "max_length": 32},
        "training": {"rounds": 1, "sampling_rate": 0.1},
    }
    for section, value in changes.items():
        base[section] = base[section] | value if isinstance(value, dict) else value
    return RunConfig.model_validate(base)


@pytest.fixture
def load(tiny_model: Path) -> Load:
    return lambda **changes: models.load(config(tiny_model, **changes))


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """Give a copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


# -- what is trained and what is sent ------------------------------------------------------------------------------


def test_lora_trains_b_and_the_head_and_exchanges_a_frozen(load: Load) -> None:
    model = load()
    assert all(".lora_B." in name or name.startswith("head.") for name in model.trainable)
    assert len([name for name in model.trainable if ".lora_B." in name]) == 4  # query and value of two layers
    sent_frozen = set(model.exchanged) - set(model.trainable)
    assert {".lora_A." in name for name in sent_frozen} == {True}
    assert len(sent_frozen) == 4
    wanting = {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    assert wanting == set(model.trainable)
    assert all(not model.arrays()[name].any() for name in model.exchanged if ".lora_B." in name)


def test_full_bias_and_head_train_what_they_say(load: Load) -> None:
    everything = [name for name, _ in load(model={"trainable": "full"}).module.named_parameters()]
    assert list(load(model={"trainable": "full"}).trainable) == everything
    assert load(model={"trainable": "head"}).trainable == ("head.weight", "head.bias")
    biases = {name for name in everything if name.endswith(".bias")}
    assert set(load(model={"trainable": "bias"}).trainable) == biases | {"head.weight"}
    for trainable in ("full", "bias", "head"):
        model = load(model={"trainable": trainable})
        assert model.exchanged == model.trainable


def test_before_and_after_the_training_phase_the_head_alone_is_trained(load: Load) -> None:
    model = load()
    assert model.names("warm_start") == model.names("refit") == ("head.weight", "head.bias")
    assert model.names("training") == model.trainable


@pytest.mark.parametrize("trainable", ["lora", "full", "bias", "head"])
def test_a_step_moves_every_trained_weight_and_no_other(load: Load, trainable: str) -> None:
    model = load(model={"trainable": trainable})
    before = {name: value.detach().clone() for name, value in model.module.named_parameters()}
    ids = torch.randint(5, 29, (8, 12), generator=torch.Generator().manual_seed(0))
    loss = nn.functional.cross_entropy(
        model.module(input_ids=ids, attention_mask=torch.ones_like(ids)), torch.arange(8) % 2
    )
    loss.backward()
    torch.optim.SGD([p for p in model.module.parameters() if p.requires_grad], lr=1.0).step()
    moved = {name for name, value in model.module.named_parameters() if not torch.equal(value, before[name])}
    assert moved == set(model.trainable)


def test_layers_of_lora_can_be_chosen_and_targets_that_match_nothing_are_one_line(load: Load) -> None:
    chosen = load(model={"lora": {"targets": ["intermediate.dense"], "layers": [1]}}).trainable
    assert [name for name in chosen if ".lora_B." in name] == [
        "encoder.encoder.layer.1.intermediate.dense.lora_B.default.weight"
    ]
    with pytest.raises(ModelError, match=r"targets=\['nothing'\].*linear layers are \['dense', 'key'") as fault:
        load(model={"lora": {"targets": ["nothing"]}})
    assert "\n" not in str(fault.value)


def test_svd_puts_the_leading_right_singular_vectors_of_the_frozen_weight_into_a(load: Load) -> None:
    model = load(model={"lora": {"rank": 3, "init": "svd"}})
    parameters = dict(model.module.named_parameters())
    found = [name for name in parameters if ".lora_A." in name]
    assert len(found) == 4
    for name in found:
        base = parameters[name.partition(".lora_A.")[0] + ".base_layer.weight"].double()
        vectors = parameters[name].double()
        assert torch.allclose(vectors @ vectors.T, torch.eye(3, dtype=torch.float64), atol=1e-5)
        largest = torch.linalg.eigvalsh(base.T @ base).flip(0)[:3]
        assert torch.allclose((base @ vectors.T).square().sum(0), largest, rtol=1e-4)
    plain = load(model={"lora": {"rank": 3}})
    assert not np.allclose(plain.arrays()[found[0]], model.arrays()[found[0]])


# -- the same everywhere -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["lora", "full", "head"])
def test_two_loads_are_the_same_whatever_torchs_own_seed(load: Load, trainable: str) -> None:
    torch.manual_seed(1)
    first = load(model={"trainable": trainable})
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second = load(model={"trainable": trainable})
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.base_digest == second.base_digest
    assert arrays.digest(first.arrays()) == arrays.digest(second.arrays())
    other = load(model={"trainable": trainable}, seed=1)
    assert other.base_digest == first.base_digest
    assert arrays.digest(other.arrays()) != arrays.digest(first.arrays())


def test_the_base_digest_tells_another_base(load: Load, copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][3, 3] += 1e-6
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert models.load(config(copy)).base_digest != load().base_digest


def test_dropout_is_off_and_the_model_in_train_mode(load: Load, copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    settings |= {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "classifier_dropout": 0.5}
    (copy / "config.json").write_text(json.dumps(settings))
    model = models.load(config(copy))
    assert model.module.training
    rates = {part.p for part in model.module.modules() if isinstance(part, nn.Dropout)}
    assert rates <= {0.0}
    ids = torch.arange(5, 17)[None]
    first, second = (model.module(input_ids=ids, attention_mask=torch.ones_like(ids)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, load().module(input_ids=ids, attention_mask=torch.ones_like(ids)))


def test_padding_changes_nothing(load: Load) -> None:
    module = load().module
    ids = torch.arange(5, 12)[None]
    padded = torch.cat([ids, torch.zeros((1, 9), dtype=torch.long)], dim=1)
    mask = (torch.arange(16) < 7).long()[None]
    assert torch.allclose(
        module(input_ids=ids, attention_mask=torch.ones_like(ids)),
        module(input_ids=padded, attention_mask=mask),
        atol=1e-6,
    )


def test_the_feature_is_normalised_and_scaled(load: Load) -> None:
    ids = torch.arange(5, 17)[None]
    feature = load(model={"feature_scale": 0.1}).module.features(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert float(feature.detach().norm()) == pytest.approx(0.1 * 32**0.5, rel=1e-3)


# -- what is refused -----------------------------------------------------------------------------------------------


def test_a_pinned_digest_that_differs_is_refused(tiny_model: Path) -> None:
    right = models.weights_digest(tiny_model)
    models.load(config(tiny_model, model={"digest": right}))
    with pytest.raises(ModelError, match=r"is not that of .*whose weights are") as fault:
        models.load(config(tiny_model, model={"digest": "0" * 64}))
    assert right in str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("pinned", [False, True])
def test_weights_in_a_pickle_are_not_read(copy: Path, pinned: bool) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(copy / "ran").touch, ())

    (copy / "model.safetensors").unlink()
    torch.save({"x": Code()}, copy / "pytorch_model.bin")
    with pytest.raises(ModelError) as fault:
        models.load(config(copy, model={"digest": "0" * 64} if pinned else {}))
    assert "\n" not in str(fault.value)
    assert not (copy / "ran").exists()


def test_code_that_a_model_brings_is_not_run(copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    settings |= {"model_type": "strange", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Model"}}
    (copy / "config.json").write_text(json.dumps(settings))
    (copy / "own.py").write_text(f"import pathlib\npathlib.Path({str(copy / 'ran')!r}).touch()\n")
    with pytest.raises(ModelError) as fault:
        models.load(config(copy))
    assert "\n" not in str(fault.value)
    assert not (copy / "ran").exists()


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nothing", "~/no-such-model"])
def test_a_model_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(ModelError, match="is not a folder") as fault:
        models.load(config(name))
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("spoil", ["config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_or_holds_a_broken_one_is_one_line(copy: Path, spoil: str) -> None:
    (copy / spoil).write_bytes(b"{")
    with pytest.raises(ModelError, match="cannot be loaded") as fault:
        models.load(config(copy))
    assert "\n" not in str(fault.value)
    (copy / spoil).unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        models.load(config(copy))


def test_weights_that_the_file_lacks_are_not_drawn_at_random(copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"lacks weights: 'encoder.layer.2.* and 15 more"):
        models.load(config(copy))
    (copy / "config.json").write_text(json.dumps(settings | {"hidden_size": 64}))
    with pytest.raises(ModelError, match="cannot be loaded") as fault:
        models.load(config(copy))
    assert "\n" not in str(fault.value)


def test_a_text_cannot_be_longer_than_the_model_takes(load: Load) -> None:
    load(task={"labels": ["bad", "good"], "max_length": 64})
    with pytest.raises(ModelError, match=r"task.max_length=65, padded to 80 tokens, is more than"):
        load(task={"labels": ["bad", "good"], "max_length": 65})


def test_a_tokenizer_of_another_model_is_refused(copy: Path) -> None:
    from transformers import BertTokenizer

    words = (copy / "vocab.txt").read_text(encoding="utf-8").split()
    (copy / "vocab.txt").write_text("\n".join([*words, "extra"]), encoding="utf-8")
    BertTokenizer(str(copy / "vocab.txt")).save_pretrained(copy)
    with pytest.raises(ModelError, match="has 29 embeddings and its tokenizer gives token 29"):
        models.load(config(copy))


def test_a_device_that_is_not_there_is_one_line() -> None:
    assert models.pick_device("cpu") == torch.device("cpu")
    assert models.pick_device("auto").type in ("cpu", "cuda")
    for name in ("cuda:99", "quantum", "mps:x"):
        with pytest.raises(ModelError, match=f"device={name!r}"):
            models.pick_device(name)
