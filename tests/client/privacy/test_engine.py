"""The clipped sum against a loop over single records, its noise, and what the engine must refuse."""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import kept
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor, nn

from client.privacy.engine import ClippedSum, Clipping, Gradients, Objective, RoundedSum, train_only
from client.privacy.noise import Continuous, Grid
from client.privacy.randomness import Keystream
from client.training import EncoderPass
from shared import models
from shared.errors import ModelError, SensitivityError
from shared.examples import Examples
from shared.run_config import RunConfig

TARGETS = {
    "bert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "roberta": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
}
Sums = dict[str, Tensor]


def texts(count: int, seed: int = 0) -> Examples:
    """Return token sequences of 1 to 40 tokens, so that they fall into several buckets."""
    draw = np.random.default_rng(seed)
    ids = [draw.integers(2, 29, draw.integers(1, 41)).tolist() for _ in range(count)]
    return kept.of_tokens(ids, draw.integers(0, 2, count).tolist())


def by_the_engine(
    config: RunConfig, examples: Examples, clipping: Clipping, order: Sequence[int]
) -> tuple[Sums, float]:
    """Return the clipped sum, and the largest norm that one record contributed."""
    model = models.load(config)
    parameters = train_only(model.module, model.trainable)
    objective = EncoderPass(model, examples, config)
    with Gradients(objective.module, parameters, config.hardware.gradients) as gradients:
        total = ClippedSum(gradients, clipping)
        most = [
            float(total.add(batch).max()) for batch in objective.groups([(number,) for number in order], whole=False)
        ]
    return total.sums(), max(most)


def by_the_loop(config: RunConfig, examples: Examples, clipping: Clipping) -> tuple[Sums, list[float]]:
    """Return the clipped sum by plain autograd on a model of its own, a record at a time, and the norms unclipped."""
    model = models.load(config)
    parameters = train_only(model.module, model.trainable)
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}
    norms = []
    for row, label in zip(kept.tokens(examples), kept.labels(examples), strict=True):
        ids = torch.tensor([row])
        loss = nn.functional.cross_entropy(
            model.module(input_ids=ids, attention_mask=torch.ones_like(ids)), torch.tensor([label])
        )
        found = [part.double() for part in torch.autograd.grad(loss, list(parameters.values()))]
        norms.append(math.sqrt(sum(float(part.square().sum()) for part in found)))
        if clipping.mode == "flat":
            factor = min(1.0, clipping.norm / norms[-1])
        else:
            factor = clipping.norm / (norms[-1] + 0.01 * clipping.norm)
        for name, part in zip(parameters, found, strict=True):
            sums[name] += factor * part
    return sums, norms


def gap(found: Sums, expected: Sums) -> float:
    """Return the L2 distance of two sums, relative to the second."""
    assert found.keys() == expected.keys()
    apart = math.sqrt(sum(float((found[name].double() - expected[name]).square().sum()) for name in expected))
    return apart / math.sqrt(sum(float(value.double().square().sum()) for value in expected.values()))


@pytest.fixture
def config_of(tiny_of: Callable[..., Any], new_config: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    def make(kind: str, trainable: str, **more: Any) -> RunConfig:
        model = {"name": str(tiny_of(kind)), "trainable": trainable, "lora": {"targets": TARGETS[kind]}}
        return new_config(model=model, task={"max_length": 48}, **more)

    return make


@pytest.mark.parametrize("method", ["one-pass", "hooks"])
@pytest.mark.parametrize("trainable", ["lora", "full", "bias", "head"])
@pytest.mark.parametrize("kind", TARGETS)
def test_the_clipped_sum_is_that_of_a_loop_over_single_records(
    kind: str, trainable: str, method: str, config_of: Callable[..., RunConfig]
) -> None:
    config, examples = config_of(kind, trainable, hardware={"gradients": method}), texts(9)
    if (kind, trainable) == ("llama", "bias"):
        with pytest.raises(ModelError, match="leaves nothing to train"):
            models.load(config)
        return
    _, norms = by_the_loop(config, examples, Clipping(1.0))
    clipping = Clipping(float(np.median(norms)))  # clips half of them
    found, most = by_the_engine(config, examples, clipping, range(9))
    exact, _ = by_the_loop(config, examples, Clipping(clipping.norm / 1.001))  # the engine's stated slack
    assert most <= clipping.norm * 1.0001
    below = [norm <= clipping.norm / 1.001 for norm in norms]
    assert sum(below) not in (0, 9)
    assert gap(found, exact) <= 1e-4


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_micro_batches_and_the_order_of_records_do_not_change_the_sum(
    trainable: str, config_of: Callable[..., RunConfig]
) -> None:
    examples, clipping = texts(12), Clipping(0.5)
    whole, _ = by_the_engine(config_of("bert", trainable), examples, clipping, range(12))
    for micro_batch in (1, 3):
        smaller = config_of("bert", trainable, hardware={"micro_batch": micro_batch})
        found, _ = by_the_engine(smaller, examples, clipping, [7, 3, 11, 0, 5, 1, 9, 2, 10, 4, 8, 6])
        assert gap(found, whole) <= 1e-5


def test_a_batch_of_one_is_one_clipped_gradient(config_of: Callable[..., RunConfig]) -> None:
    config, examples = config_of("bert", "full"), texts(1)
    found, most = by_the_engine(config, examples, Clipping(0.01), [0])
    size = math.sqrt(sum(float(value.square().sum()) for value in found.values()))
    assert size == pytest.approx(most, rel=1e-5)
    assert 0.0099 < size <= 0.01


@pytest.mark.parametrize("mode", ["flat", "normalise"])
def test_taking_one_record_away_changes_the_sum_by_no_more_than_the_norm(
    mode: Any, config_of: Callable[..., RunConfig]
) -> None:
    config, examples, clipping = config_of("bert", "lora"), texts(6), Clipping(0.3, mode)
    whole, most = by_the_engine(config, examples, clipping, range(6))
    assert most <= clipping.norm
    for gone in range(6):
        rest, _ = by_the_engine(config, examples, clipping, [number for number in range(6) if number != gone])
        change = math.sqrt(sum(float((whole[name] - rest[name]).square().sum()) for name in whole))
        assert change <= clipping.norm * 1.0001


def test_normalised_records_all_count_about_the_norm(config_of: Callable[..., RunConfig]) -> None:
    config, examples, clipping = config_of("bert", "bias"), texts(6), Clipping(0.3, "normalise")
    found, _ = by_the_engine(config, examples, clipping, range(6))
    assert gap(found, by_the_loop(config, examples, clipping)[0]) <= 1.1e-3
    for number in range(6):
        _, most = by_the_engine(config, examples, clipping, [number])
        assert 0.95 * clipping.norm <= most <= clipping.norm


@example([5.801820028991967e36], 1e-6, "flat")  # a scale of 1.7e-43 has few digits
@given(
    st.lists(st.floats(0, width=32) | st.just(math.nan), min_size=1, max_size=30),
    st.floats(1e-6, 1e6),
    st.sampled_from(["flat", "normalise"]),
)
def test_no_norm_whatever_is_lifted_above_the_clipping_norm(norms: list[float], norm: float, mode: Any) -> None:
    given_norms = torch.tensor(norms)
    factors = Clipping(norm, mode).factors(given_norms)
    finite = torch.isfinite(given_norms)
    assert bool(torch.isfinite(factors).all())
    assert bool((factors >= 0).all())
    assert bool((factors[~finite] == 0).all())
    assert bool((factors[finite].double() * given_norms[finite].double() <= norm).all())
    if mode == "flat":
        small = given_norms <= norm / 1.01
        assert bool((factors[small] == 1).all())


class Line(nn.Module):
    """A linear layer whose gradient is known: the gradient of `sum(w x)` for a record is the record."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1, bias=False)

    def forward(self, records: Tensor) -> Tensor:
        return self.layer(records)[:, 0]


def summed(records: Tensor, clipping: Clipping, method: Any = "auto") -> tuple[ClippedSum, Tensor]:
    module = Line(records.shape[1])
    with Gradients(module, dict(module.named_parameters()), method) as gradients:
        total = ClippedSum(gradients, clipping)
        contributed = total.add(Objective((records,), module))
    return total, contributed


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=1, max_size=8),
    st.floats(1e-2, 1e2),
)
def test_the_sum_of_known_gradients_is_the_sum_of_the_records_each_scaled_into_the_ball(
    rows: list[list[float]], norm: float
) -> None:
    total, contributed = summed(torch.tensor(rows), Clipping(norm))
    values = np.array(rows, dtype=np.float64)
    sizes = np.linalg.norm(values, axis=1)
    expected = (values * np.minimum(1, norm / 1.001 / np.maximum(sizes, 1e-30))[:, None]).sum(0)
    assert np.allclose(total.sums()["layer.weight"][0].double().numpy(), expected, atol=1e-4 * norm * len(rows))
    assert float(contributed.max()) <= norm * 1.0001


@pytest.mark.parametrize("method", ["one-pass", "hooks", "ghost"])
@pytest.mark.parametrize("broken", [math.nan, math.inf, 3e38])
def test_a_record_without_a_finite_gradient_counts_as_nothing_and_the_others_in_full(
    broken: float, method: str
) -> None:
    records = torch.tensor([[0.3, 0.0, 0.4], [broken, broken, 1.0], [0.0, 5.0, 0.0]])
    total, contributed = summed(records, Clipping(1.0), method)
    assert torch.allclose(total.sums()["layer.weight"], torch.tensor([[0.3, 1 / 1.001, 0.4]]), atol=1e-6)
    assert contributed.tolist() == pytest.approx([0.5, 0.0, 1 / 1.001])
    assert total.dropped == 1


# -- noise: accepted at sigma, rejected at 2/3 and 3/2 of it ------------------------------------------------

DRAWS = 20_000  # the deviation's own deviation is 0.5 %: 2/3 and 3/2 are more than 60 of them away


def agrees(values: np.ndarray, deviation: float) -> bool:
    """Whether a chi-squared test at 1e-6 accepts centred Gaussian values of this deviation."""
    statistic = float(np.square(values / deviation).sum())
    return bool(chi2.ppf(5e-7, values.size) < statistic < chi2.ppf(1 - 5e-7, values.size))


def test_an_empty_sample_is_pure_noise_of_the_stated_deviation_over_the_divisor() -> None:
    module = Line(DRAWS)
    with Gradients(module, dict(module.named_parameters())) as gradients:
        total = ClippedSum(gradients, Clipping(0.3))
    noise = Continuous(0.3, Keystream(hashlib.sha256(b"noise").digest()))
    values = (noise.noised(total.sums()["layer.weight"], 2.0) / 40.0).double().numpy()
    assert values.shape == (1, DRAWS)
    expected = 2.0 * 0.3 / 40.0
    assert agrees(values, expected)
    assert not agrees(values, expected * 2 / 3)
    assert not agrees(values, expected * 3 / 2)


def test_the_noise_is_the_same_whatever_was_drawn_and_the_divisor_is_the_public_one() -> None:
    means = []
    for count in (1, 50):
        total, _ = summed(torch.ones((count, 4)), Clipping(1.0))
        noised = Continuous(1.0, Keystream(bytes(32))).noised(total.sums()["layer.weight"], 1.5) / 25.0
        means.append(noised - total.sums()["layer.weight"] / 25.0)
    assert torch.allclose(means[0], means[1], atol=1e-6)
    assert float(means[0].abs().max()) > 0


# -- what couples records, or hides a gradient, is refused ---------------------------------------------------


class Flattening(nn.Module):
    """Sees tokens as if they were records, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, records: Tensor) -> Tensor:
        count = records.shape[0]
        return self.layer(records.reshape(-1, 3)).reshape(count, -1).sum(1)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, records: Tensor) -> Tensor:
        return self.layer(self.layer(records)).sum(1)


class Aside(nn.Module):
    """Uses a weight without its module's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, records: Tensor) -> Tensor:
        return nn.functional.linear(records, self.layer.weight).sum(1)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.BatchNorm1d(6)

    def forward(self, records: Tensor) -> Tensor:
        return self.layer(records).sum(1)


@pytest.mark.parametrize("module", [Flattening(), Twice(), Aside(), Normed()], ids=lambda module: type(module).__name__)
def test_hooks_refuse_a_layer_that_does_not_see_one_row_a_record_once(module: nn.Module) -> None:
    with (
        pytest.raises(SensitivityError) as refused,
        Gradients(module, dict(module.named_parameters()), "hooks") as gradients,
    ):
        ClippedSum(gradients, Clipping(1.0)).add(Objective((torch.ones(5, 6),), module))
    assert "5 records" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_mean_loss_is_refused() -> None:
    module = Line(3)
    with (
        Gradients(module, dict(module.named_parameters())) as gradients,
        pytest.raises(SensitivityError, match="one value a record"),
    ):
        ClippedSum(gradients, Clipping(1.0)).add(Objective((torch.ones(5, 3),), lambda records: module(records).mean()))


def test_the_model_is_as_before_once_the_engine_is_gone(config_of: Callable[..., RunConfig]) -> None:
    config = config_of("bert", "full")
    model = models.load(config)
    parameters = train_only(model.module, model.trainable)
    ids = torch.tensor([[5, 6, 7]])
    before = model.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    for method in ("hooks", "ghost", "one-pass"):
        with Gradients(model.module, parameters, method) as gradients, suppress(SensitivityError):
            ClippedSum(gradients, Clipping(1.0)).add(
                Objective((ids,), lambda ids: model.module(input_ids=ids, attention_mask=torch.ones_like(ids))[:, 0])
            )
    hooks = [
        part
        for part in model.module.modules()
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks
    ]
    assert hooks == []
    assert torch.equal(before, model.module(input_ids=ids, attention_mask=torch.ones_like(ids)))
    assert [name for name, _ in model.module.named_parameters()] == list(parameters)
    assert all(parameter.grad is None for parameter in parameters.values())


def test_the_sum_is_the_same_by_every_method(config_of: Callable[..., RunConfig]) -> None:
    examples, clipping = texts(8), Clipping(0.3)
    first, _ = by_the_engine(
        config_of("roberta", "lora", hardware={"gradients": "one-pass"}), examples, clipping, range(8)
    )
    for method in ("hooks", "ghost"):
        other, _ = by_the_engine(
            config_of("roberta", "lora", hardware={"gradients": method}), examples, clipping, range(8)
        )
        assert gap(other, first) <= 1e-5


# -- sums of whole numbers -----------------------------------------------------------------------------------


def test_a_rounded_sum_is_the_same_to_the_last_bit_whatever_the_micro_batch(
    config_of: Callable[..., RunConfig],
) -> None:
    config, examples, clipping = config_of("bert", "lora"), texts(10), Clipping(0.5)
    model = models.load(config)
    parameters = train_only(model.module, model.trainable)
    size = sum(parameter.numel() for parameter in parameters.values())
    grid, sums = Grid.of(clipping.norm, size, 0.01), []
    order = list(range(10))
    for micro_batch in (1, 4):
        smaller = config_of("bert", "lora", hardware={"micro_batch": micro_batch})
        objective = EncoderPass(model, examples, smaller)
        with Gradients(model.module, parameters) as gradients:
            total = RoundedSum(gradients, clipping, grid)
            most = max(
                float(total.add(batch).max()) for batch in objective.groups([(number,) for number in order], whole=True)
            )
        assert most <= clipping.norm
        sums.append(torch.cat([value.flatten() for value in total.sums().values()]))
    exact = by_the_loop(config, examples, Clipping(clipping.norm / 1.001))[0]
    found = torch.cat([value.flatten() for value in exact.values()])
    assert sums[0].dtype == torch.int64
    # Each record may be rounded another way where a gradient's last bits fall on a step's edge; in all, rarely.
    assert int((sums[0] - sums[1]).abs().max()) <= 1
    assert float((sums[0] * grid.step - found).abs().max()) <= 10 * grid.step


# -- Opacus's own optimizer can take over from here ----------------------------------------------------------


def test_opacus_optimizer_and_accountant_work_on_the_one_pass_sum() -> None:
    from opacus.accountants import RDPAccountant
    from opacus.optimizers import DPOptimizerFastGradientClipping

    records = torch.tensor([[3.0, 0.0, 4.0], [0.1, 0.2, 0.2], [0.0, 5.0, 0.0]])
    module = Line(3)
    before = module.layer.weight.detach().clone()
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=2,
        loss_reduction="mean",
    )
    accountant = RDPAccountant()
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.1))
    with Gradients(module, dict(module.named_parameters())) as gradients:
        total = ClippedSum(gradients, Clipping(1.0))
        total.add(Objective((records,), module))
    for name, parameter in module.named_parameters():
        parameter.grad = total.sums()[name]
    optimizer.step()
    moved = (before - module.layer.weight.detach())[0]
    assert torch.allclose(moved, torch.tensor([0.6 / 1.001 + 0.1, 1 / 1.001 + 0.2, 0.8 / 1.001 + 0.2]) / 2, atol=1e-6)
    assert len(accountant) == 1


# -- ways to compute the same --------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_checkpointing_changes_no_sum_and_is_used(
    trainable: str, config_of: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, clipping = texts(6), Clipping(0.3)
    plain, _ = by_the_engine(config_of("bert", trainable), examples, clipping, range(6))
    config = config_of("bert", trainable, hardware={"checkpointing": True, "gradients": "one-pass"})
    spared, _ = by_the_engine(config, examples, clipping, range(6))
    assert gap(spared, plain) <= 1e-6
    assert models.load(config).module.encoder.is_activation_checkpointing


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_kinds_of_attention_have_padding_masks_and_the_same_sum(
    attention: str, config_of: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, clipping, config = texts(6), Clipping(0.3), config_of("bert", "full")
    expected, _ = by_the_loop(config, examples, Clipping(clipping.norm / 1.001))
    load = models.load

    def with_attention(config: RunConfig) -> Any:
        loaded = load(config)
        loaded.module.encoder.set_attn_implementation(attention)
        return loaded

    monkeypatch.setattr(models, "load", with_attention)
    found, _ = by_the_engine(config, examples, clipping, range(6))
    assert gap(found, expected) <= 1e-4
