"""Choosing what is trained, over families of architectures: adapters, last layers, biases, a base of four bits."""

import builtins
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import nn

from client.privacy.engine import ClippedSum, Clipping, Gradients, Objective, train_only
from client.training import EncoderPass
from shared import models
from shared.errors import ConfigError, ModelError
from shared.examples import Examples
from shared.models import LoadedModel, Whole, places, quantised, trainable
from shared.run_config import Model, RunConfig, parse

ALL = sorted(families.FAMILIES)
# Ends of the names of attention's linear layers, and how many of them there are.
ATTENTION = {
    "bert": ({"query", "key", "value", "dense"}, 12),
    "roberta": ({"query", "key", "value", "dense"}, 12),
    "gpt2": ({"c_attn", "c_proj"}, 6),
    "llama": ({"q_proj", "k_proj", "v_proj", "o_proj"}, 12),
    "t5": ({"q", "k", "v", "o"}, 32),  # two layers of one attention, three of two
    "bart": ({"q_proj", "k_proj", "v_proj", "out_proj"}, 32),
    "whisper": ({"q_proj", "k_proj", "v_proj", "out_proj"}, 32),
    "vit": ({"q_proj", "k_proj", "v_proj", "o_proj"}, 12),
    "dinov2": ({"q_proj", "k_proj", "v_proj", "o_proj"}, 12),
    "wav2vec2": ({"q_proj", "k_proj", "v_proj", "out_proj"}, 12),
}
AFTER = {  # what is trained with the last layer, beside it
    "bert": {"classifier"},
    "roberta": {"classifier"},
    "gpt2": {"ln_f"},
    "llama": {"norm"},
    "t5": {"final_layer_norm"},
    "bart": set(),  # its layers end with norms of their own, and the decoder's own norm comes before them
    "whisper": {"layer_norm"},
    "vit": {"layernorm", "classifier"},
    "dinov2": {"layernorm", "classifier"},
    "wav2vec2": {"projector", "classifier"},  # its encoder's norm comes before its layers
}


def chosen(family: str, module: Whole, **settings: Any) -> tuple[str, ...]:
    model = Model.model_validate({"name": family, **settings})
    trainable.adapt(module, model, None)
    return trainable.choose(module, model, None, lambda: module(**families.batch(family)))


def parents(names: tuple[str, ...]) -> set[str]:
    return {name.split(".")[-2] for name in names}


# -- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_attention_names_the_linear_layers_of_every_attention_and_no_others(family: str) -> None:
    names = places.attention(families.network(family).encoder)
    ends, count = ATTENTION[family]
    assert {name.rpartition(".")[2] for name in names} == ends
    assert len(names) == count


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_adapters_go_into_every_family_and_change_nothing_before_the_first_step(family: str, targets: str) -> None:
    plain, module = families.network(family), families.network(family)
    names = chosen(family, module, lora={"targets": targets, "rank": 2, "rslora": True})
    assert names
    assert all(".lora_B." in name for name in names)
    if targets == "attention":
        assert len(names) == ATTENTION[family][1]
    else:
        assert len(names) > ATTENTION[family][1]
        assert not any("lm_head" in name or "proj_out" in name for name in names)
    batch = families.batch(family)
    assert torch.equal(module(**batch).logits, plain(**batch).logits)


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    def output(**lora: Any) -> torch.Tensor:
        module = families.network("bert")
        names = chosen("bert", module, lora={"targets": "attention", "rank": 4, "alpha": 8} | lora)
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            for name, value in parameters.items():
                if ".lora_" in name:
                    value.fill_(0.1 if name in names else 1.0)
            layer = module.get_submodule("encoder.bert.encoder.layer.0.attention.self.query")
            plain: nn.Module = layer.base_layer  # type: ignore[assignment]
            x = torch.ones(1, 16)
            found: torch.Tensor = layer(x) - plain(x)
        return found

    # x A' = 16 in each of 4 places, times 0.1: 6.4, times 8 / 4, or 8 / 2
    assert torch.allclose(output(), torch.full((1, 16), 6.4 * 2), rtol=1e-4)
    assert torch.allclose(output(rslora=True), torch.full((1, 16), 6.4 * 4), rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_svd_listens_to_the_inputs_of_linear_layers_however_they_keep_their_weights(family: str) -> None:
    module = families.network(family)
    chosen(family, module, lora={"targets": "attention", "rank": 2, "init": "svd"})
    name = {
        "bert": "encoder.bert.encoder.layer.1.attention.self.key",
        "gpt2": "encoder.transformer.h.1.attn.c_attn",
    }[family]
    layer: Any = module.get_submodule(name)
    weight = layer.base_layer.weight.detach().double()
    weight = weight.t() if family == "gpt2" else weight  # (out, in)
    a = layer.lora_A["default"].weight.double()
    largest = torch.linalg.eigvalsh(weight.t() @ weight).flip(0)[:2]
    assert torch.allclose((weight @ a.t()).square().sum(0), largest, rtol=1e-3)


def test_a_rank_without_singular_vectors_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"model.lora.rank=17 is above 16, the smaller side of 'encoder.bert.*random"):
        chosen("bert", families.network("bert"), lora={"targets": "attention", "rank": 17, "init": "svd"})


# -- last layers, biases, everything -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_the_last_layer_is_trained_with_what_comes_after_it(family: str) -> None:
    module = families.network(family)
    names = chosen(family, module, trainable="last")
    layers = [f"encoder.{name}." for name, _ in places.layers(module.encoder)]
    assert len(layers) == 3
    of_layer = tuple(name for name in names if name.startswith(layers[-1]))
    assert len(of_layer) == sum(1 for _ in module.get_submodule(layers[-1][:-1]).parameters())
    assert parents(tuple(name for name in names if name not in of_layer)) == AFTER[family]
    two = chosen(family, families.network(family), trainable="last", last_layers=2)
    assert {name for name in two if not name.startswith(layers[1])} == set(names)
    assert any(name.startswith(layers[1]) for name in two)


@pytest.mark.parametrize("family", ["bert", "whisper"])
def test_more_last_layers_than_there_are_is_one_line(family: str) -> None:
    with pytest.raises(ModelError, match=r"model.last_layers=4 is above the 3 layers of .*'full'") as fault:
        chosen(family, families.network(family), trainable="last", last_layers=4)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("family", ALL)
def test_biases_and_everything_are_what_they_say(family: str) -> None:
    module = families.network(family)
    everything = [name for name, _ in module.named_parameters()]
    assert list(chosen(family, module, trainable="full")) == everything
    biases = tuple(name for name in everything if name.endswith(".bias"))
    if biases:
        assert chosen(family, module, trainable="bias") == biases
    else:
        with pytest.raises(ModelError, match=r"trainable='bias' leaves nothing to train in (llama|t5)"):
            chosen(family, module, trainable="bias")


# -- gradients of single records, with and without checkpointing ---------------------------------------------------


def clipped(family: str, module: Whole, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return the one-pass engine's clipped sum; twenty-fifths of what the records' norms are."""
    parameters = train_only(module, names)
    objective = Objective(tuple(families.batch(family).values()), families.loss(family, module))
    with Gradients(module, parameters, "one-pass") as gradients:
        total = ClippedSum(gradients, Clipping(0.04))
        total.add(objective)
        return {name: value.clone() for name, value in total.sums().items()}


def looped(family: str, module: Whole, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    parameters = train_only(module, names)
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    loss, inputs = families.loss(family, module), tuple(families.batch(family).values())
    for record in range(len(inputs[0])):
        found = torch.autograd.grad(
            loss(*(part[record : record + 1] for part in inputs)).sum(), list(parameters.values())
        )
        norm = torch.stack([part.norm() for part in found]).norm()
        factor = min(1.0, 0.04 / float(norm))
        for name, part in zip(total, found, strict=True):
            total[name] += factor * part
    return total


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("settings", [{"trainable": "last"}, {"lora": {"targets": "attention", "rank": 2}}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_pass_gives_what_a_loop_gives(family: str, settings: dict[str, Any], checkpointing: bool) -> None:
    module = families.network(family)
    names = chosen(family, module, **settings)
    if checkpointing:
        encoder: Any = module.encoder
        encoder.config.use_cache = False
        encoder.activation_checkpointing_enable({"use_reentrant": False})
    module.train()
    engine, loop = clipped(family, module, names), looped(family, module, names)
    scale = max(float(part.norm()) for part in loop.values())
    assert scale > 0
    for name, part in loop.items():
        assert float((engine[name] - part).norm()) <= 2e-3 * scale, (
            name
        )  # the engine clips by 1.001 x the norm: half of that, before rounding


# -- four bits -----------------------------------------------------------------------------------------------------


Load = Callable[..., LoadedModel]


@pytest.fixture
def load(tiny_model: Path) -> Load:
    def of(**model: Any) -> LoadedModel:
        return models.load(config(tiny_model, **model))

    return of


def config(tiny_model: Path, **model: Any) -> RunConfig:
    values = {
        "model": {"name": str(tiny_model), "lora": {"rank": 2, "targets": "attention"}} | model,
        "task": {"labels": ["bad", "good"], "max_length": 32},
        "training": {"rounds": 1, "sampling_rate": 0.1},
    }
    return parse(RunConfig, values, source="test")


needs_bitsandbytes = pytest.mark.skipif(
    "bitsandbytes" not in sys.modules and not any(Path(path, "bitsandbytes").is_dir() for path in sys.path),
    reason="needs the extra `quantised`",
)


@needs_bitsandbytes
@pytest.mark.parametrize("trained", ["lora", "head", "bias", "last"])
def test_a_base_of_four_bits_is_trained_upon_and_probed(tiny_model: Path, load: Load, trained: str) -> None:
    from client.privacy import probe

    plain, model = load(trainable=trained), load(trainable=trained, base="4bit")
    assert model.trainable == plain.trainable
    assert model.exchanged == plain.exchanged
    assert model.base_digest == plain.base_digest  # of the weights as their file has them
    packed = [part for part in model.module.modules() if isinstance(part, quantised.Packed)]
    assert packed
    for part in packed:
        assert part.packed.dtype == torch.uint8
        assert part.packed.numel() * 2 == part.in_features * part.out_features
    parameters = train_only(model.module, model.trainable)
    passes = EncoderPass(model, Examples.single(model.task, model.processor, []), config(tiny_model))
    with Gradients(model.module, parameters, "one-pass") as gradients:
        probe.check(model.module, gradients, *passes.made_up())


@needs_bitsandbytes
def test_four_bits_are_near_the_weights_and_the_same_each_time(load: Load) -> None:
    plain, model, again = load(), load(base="4bit"), load(base="4bit")
    place = "encoder.encoder.layer.0.attention.self.query.base_layer"
    packed, other = model.module.get_submodule(place), again.module.get_submodule(place)
    assert isinstance(packed, quantised.Packed)
    assert isinstance(other, quantised.Packed)
    assert torch.equal(packed.weight(torch.float32), other.weight(torch.float32))
    weight = plain.module.get_submodule(place).weight
    assert isinstance(weight, torch.Tensor)
    apart = (packed.weight(torch.float32) - weight).norm() / weight.norm()
    assert 0.05 < float(apart) < 0.12  # of normal values in blocks of 64: 0.09


def test_everything_cannot_be_trained_in_four_bits(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.base='4bit' is for weights that stand still.*use 'lora'"):
        config(tiny_model, base="4bit", trainable="full")


def test_four_bits_without_bitsandbytes_are_one_line(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "bitsandbytes":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ModelError, match=r"needs bitsandbytes, which is not installed; `pip install moonflower\[quantised"
    ):
        load(base="4bit")


@needs_bitsandbytes
def test_no_kernel_is_fetched_where_the_package_for_it_is_installed(tmp_path: Path) -> None:
    """A stand-in for that package tells when it is imported."""
    (tmp_path / "kernels.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    code = "from shared.models.quantised import installed_code_only as only\nwith only():\n    import bitsandbytes"
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}\nimport kernels"],
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "ran").exists()  # by the last import, which shows that the stand-in is found
    (tmp_path / "ran").unlink()
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"],
        check=True,
        capture_output=True,
    )
    assert not (tmp_path / "ran").exists()


@needs_bitsandbytes
@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (32, 32), (7, 100), (64, 64)])
def test_a_layer_of_any_shape_is_packed_and_its_gradient_is_that_of_its_weight(rows: int, columns: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Linear(columns, rows)
        x = torch.randn(4, columns, requires_grad=True)
    packed = quantised.Packed(linear)
    weight = packed.weight(torch.float32)
    kept = linear.weight.detach()
    assert float((weight - kept).norm() / kept.norm()) < 0.12
    gradient = torch.autograd.grad(packed(x).square().sum(), x)[0]
    expected = torch.autograd.grad(nn.functional.linear(x, weight, linear.bias).square().sum(), x)[0]
    assert torch.allclose(gradient, expected)


@needs_bitsandbytes
def test_adapters_are_put_in_without_bitsandbytes_and_opacus_which_take_seconds_to_import() -> None:
    code = """
import sys
import client.privacy.engine
from shared.models.trainable import adapt
from shared.run_config import Model
import families
network = families.network("bert")
adapt(network, Model(name="tiny", trainable="lora"), None)
assert any("lora_B" in name for name, _ in network.named_parameters())
assert not {"bitsandbytes", "opacus"} & set(sys.modules), set(sys.modules)
import bitsandbytes
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=dict(os.environ) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
