"""The one-pass engine, layer by layer and trick by trick, against a loop over single records in double."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from client.privacy.book import Entry, Outer
from client.privacy.engine import ClippedSum, Clipping, Gradients, Objective
from client.privacy.one_pass import OnePass
from shared.errors import SensitivityError

RECORDS, TOKENS, WIDTH = 3, 5, 8


def tokens(records: int = RECORDS, length: int = TOKENS) -> Tensor:
    return torch.randint(1, 11, (records, length), generator=torch.Generator().manual_seed(3))


def vectors(records: int = RECORDS, *shape: int) -> Tensor:
    return torch.randn((records, *(shape or (TOKENS, WIDTH))), generator=torch.Generator().manual_seed(4)).double()


class Made(nn.Module):
    """A module of named parts, and a function of them and the records."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._function(self, *inputs)


def made(forward: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> Made:
    torch.manual_seed(1)
    module = Made(forward, **parts).double().train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def by_the_loop(module: nn.Module, inputs: tuple[Tensor, ...], clip: float) -> tuple[dict[str, Tensor], Tensor]:
    """Return the clipped sum and the norms, one record at a time by plain autograd."""
    parameters = dict(module.named_parameters())
    sums, norms = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}, []
    for record in range(len(inputs[0])):
        loss = module(*[part[record : record + 1] for part in inputs])
        assert loss.shape == (1,)
        found = torch.autograd.grad(loss[0], list(parameters.values()), allow_unused=True)
        each = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), found, strict=True)]
        norm = math.sqrt(sum(float(part.square().sum()) for part in each))
        norms.append(norm)
        for name, part in zip(parameters, each, strict=True):
            sums[name] += min(1.0, clip / (norm * 1.001)) * part
    return sums, torch.tensor(norms, dtype=torch.float64)


def check(module: nn.Module, *inputs: Tensor) -> None:
    _, norms = by_the_loop(module, inputs, 1.0)
    for clip in (float(norms.median()), float(norms.max()) * 2, float(norms.min()) / 3):
        expected, _ = by_the_loop(module, inputs, clip)
        with Gradients(module, dict(module.named_parameters()), "one-pass") as gradients:
            total = ClippedSum(gradients, Clipping(clip))
            contributed = total.add(Objective(inputs, module))
            for name, value in total.sums().items():
                assert torch.allclose(value, expected[name], rtol=1e-9, atol=1e-10 * clip), name
        assert float(contributed.max()) <= clip
        assert torch.allclose(contributed, (norms.clamp(max=clip / 1.001)), rtol=1e-8)
    with Gradients(module, dict(module.named_parameters()), "one-pass") as gradients:
        whole = gradients.per_record(Objective(inputs, module))
    stacked = torch.cat([value.reshape(len(value), -1) for value in whole.values()], 1)
    assert torch.allclose(stacked.norm(dim=1), norms, rtol=1e-9)


def conv(self: Made, x: Tensor) -> Tensor:
    return self.conv(x).square().flatten(1).sum(1)


CASES: dict[str, tuple[Callable[[], Made], Tensor]] = {
    "linear over tokens": (
        lambda: made(lambda self, x: self.a(x).square().sum((1, 2)), a=nn.Linear(WIDTH, 6)),
        vectors(),
    ),
    "linear, wide enough for Gram norms": (
        lambda: made(lambda self, x: self.a(x).tanh().sum((1, 2)), a=nn.Linear(WIDTH, 40)),
        vectors(),
    ),
    "linear over records": (
        lambda: made(lambda self, x: self.a(x[:, 0]).tanh().sum(1), a=nn.Linear(WIDTH, 6)),
        vectors(),
    ),
    "weight used twice": (
        lambda: made(lambda self, x: self.a(self.a(x).tanh()).square().sum((1, 2)), a=nn.Linear(WIDTH, WIDTH)),
        vectors(),
    ),
    "tied embedding and output head": (
        lambda: made(
            lambda self, ids: F.cross_entropy(
                F.linear(self.words(ids).tanh(), self.words.weight).transpose(1, 2), ids.flip(1), reduction="none"
            ).sum(1),
            words=nn.Embedding(11, WIDTH),
        ),
        tokens(),
    ),
    "embedding with a padding row": (
        lambda: made(lambda self, ids: self.words(ids).tanh().sum((1, 2)), words=nn.Embedding(11, 4, padding_idx=2)),
        torch.tensor([[1, 2, 2], [3, 3, 2], [4, 5, 6]]),
    ),
    "positions looked up once and broadcast": (
        lambda: made(
            lambda self, ids: (
                (self.words(ids) + self.places(torch.arange(ids.shape[1]).unsqueeze(0))).tanh().sum((1, 2))
            ),
            words=nn.Embedding(11, 4),
            places=nn.Embedding(9, 4),
        ),
        tokens(),
    ),
    "positions without a batch dimension": (
        lambda: made(
            lambda self, ids: (self.words(ids) * self.places(torch.arange(ids.shape[1]))).sum((1, 2)).tanh(),
            words=nn.Embedding(11, 4),
            places=nn.Embedding(9, 4),
        ),
        tokens(),
    ),
    "token types for each record": (
        lambda: made(
            lambda self, ids: (
                (self.words(ids) + self.types(torch.zeros(ids.shape, dtype=torch.long))).tanh().sum((1, 2))
            ),
            words=nn.Embedding(11, 4),
            types=nn.Embedding(2, 4),
        ),
        tokens(),
    ),
    "relative positions, batch as large as the sequence": (
        lambda: made(
            lambda self, x: (
                (
                    x @ x.transpose(1, 2)
                    + self.bias((torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).clamp(0)).permute(
                        2, 0, 1
                    )
                )
                .softmax(-1)
                .square()
                .sum((1, 2))
            ),
            bias=nn.Embedding(9, 1),
        ),
        vectors(TOKENS),
    ),
    "class token and position parameters": (
        lambda: made(
            lambda self, x: (
                (torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.places).tanh().square().sum((1, 2))
            ),
            cls=nn.Parameter(torch.ones(1, 1, WIDTH)),
            places=nn.Parameter(torch.ones(1, TOKENS + 1, WIDTH)),
        ),
        vectors(),
    ),
    "layer scale and one plus weight": (
        lambda: made(
            lambda self, x: ((1.0 + self.w) * x * self.scale).tanh().sum((1, 2)),
            w=nn.Parameter(torch.ones(WIDTH)),
            scale=nn.Parameter(torch.ones(())),
        ),
        vectors(),
    ),
    "layer norm": (
        lambda: made(lambda self, x: self.n(x).tanh().square().sum((1, 2)), n=nn.LayerNorm(WIDTH)),
        vectors(),
    ),
    "layer norm without bias": (
        lambda: made(lambda self, x: self.n(x).tanh().square().sum((1, 2)), n=nn.LayerNorm(WIDTH, bias=False)),
        vectors(),
    ),
    "rms norm": (
        lambda: made(lambda self, x: self.n(x).tanh().square().sum((1, 2)), n=nn.RMSNorm(WIDTH)),
        vectors(),
    ),
    "group norm": (
        lambda: made(lambda self, x: self.n(x).tanh().square().sum((1, 2)), n=nn.GroupNorm(2, 4)),
        vectors(RECORDS, 4, 6),
    ),
    "tokens flattened into the batch": (
        lambda: made(
            lambda self, x: self.a(x.reshape(-1, WIDTH)).tanh().reshape(len(x), -1).sum(1), a=nn.Linear(WIDTH, 6)
        ),
        vectors(),
    ),
    "windows flattened into the batch": (
        lambda: made(
            lambda self, x: self.a(x.reshape(len(x) * 3, 2, WIDTH)).tanh().reshape(len(x), -1).sum(1),
            a=nn.Linear(WIDTH, 6),
        ),
        vectors(RECORDS, 6, WIDTH),
    ),
    "conv 1d": (lambda: made(conv, conv=nn.Conv1d(4, 6, 3, stride=2, padding=1)), vectors(RECORDS, 4, 9)),
    "conv 1d in groups": (lambda: made(conv, conv=nn.Conv1d(4, 6, 3, groups=2)), vectors(RECORDS, 4, 9)),
    "conv 2d": (lambda: made(conv, conv=nn.Conv2d(3, 5, (2, 3), stride=2)), vectors(RECORDS, 3, 6, 7)),
    "conv 2d by channel": (lambda: made(conv, conv=nn.Conv2d(4, 4, 3, padding=1, groups=4)), vectors(RECORDS, 4, 5, 5)),
    "conv 2d, channels last": (
        lambda: made(conv, conv=nn.Conv2d(3, 5, 2)),
        vectors(RECORDS, 3, 6, 7).to(memory_format=torch.channels_last),
    ),
    "conv 1d padded to the same length": (
        lambda: made(conv, conv=nn.Conv1d(4, 6, 3, padding="same")),
        vectors(RECORDS, 4, 9),
    ),
    "weight norm": (
        lambda: made(conv, conv=nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))),
        vectors(RECORDS, 4, 9),
    ),
    "addmm, as GPT-2": (
        lambda: made(
            lambda self, x: torch.addmm(self.b, x.view(-1, WIDTH), self.w).view(len(x), -1).tanh().sum(1),
            w=nn.Parameter(torch.ones(WIDTH, 6)),
            b=nn.Parameter(torch.ones(6)),
        ),
        vectors(),
    ),
    "a matrix times the transposed weight": (
        lambda: made(lambda self, x: (x @ self.a.weight.t()).tanh().sum((1, 2)), a=nn.Linear(WIDTH, 6, bias=False)),
        vectors(),
    ),
    "changed in place afterwards": (
        lambda: made(lambda self, x: self.a(x).mul_(2.0).relu_().square().sum((1, 2)), a=nn.Linear(WIDTH, 6)),
        vectors(),
    ),
    "another function of weights and records": (
        lambda: made(
            lambda self, x: F.bilinear(x[:, 0], x[:, 1], self.w).tanh().sum(1),
            w=nn.Parameter(torch.ones(4, WIDTH, WIDTH)),
        ),
        vectors(),
    ),
    "a parameter that nothing uses": (
        lambda: made(lambda self, x: self.a(x).sum((1, 2)), a=nn.Linear(WIDTH, 6), b=nn.Linear(2, 2)),
        vectors(),
    ),
    "checkpointed": (
        lambda: made(
            lambda self, x: checkpoint(lambda h: self.b(self.a(h).tanh()).tanh(), self.c(x), use_reentrant=False).sum(
                (1, 2)
            ),
            a=nn.Linear(WIDTH, 6),
            b=nn.Linear(6, 5),
            c=nn.Linear(WIDTH, WIDTH),
        ),
        vectors(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_clipped_sum_and_the_norms_are_those_of_the_loop(case: str) -> None:
    build, records = CASES[case]
    check(build(), records)


def test_attention_with_a_learned_bias_is_that_of_the_loop() -> None:
    def attend(self: Made, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), TOKENS, 2, 12).transpose(1, 2).split(4, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias).square().sum((1, 2, 3))

    check(
        made(attend, qkv=nn.Linear(WIDTH, 24), bias=nn.Parameter(torch.ones(1, 2, TOKENS, TOKENS))),
        vectors(),
    )


# -- what it must refuse -------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[Callable[[], Made], Tensor]] = {
    "max_norm": (
        lambda: made(lambda self, ids: self.words(ids).sum((1, 2)), words=nn.Embedding(11, 4, max_norm=1.0)),
        tokens(),
    ),
    "scaled by frequency": (
        lambda: made(lambda self, ids: self.words(ids).sum((1, 2)), words=nn.Embedding(11, 4, scale_grad_by_freq=True)),
        tokens(),
    ),
    "batch norm": (lambda: made(lambda self, x: self.n(x).sum((1, 2)), n=nn.BatchNorm1d(TOKENS)), vectors()),
    "rows that are not the records'": (
        lambda: made(lambda self, x: self.a(x.transpose(0, 1)).tanh().sum((0, 2)), a=nn.Linear(WIDTH, 6)),
        vectors(),
    ),
    "weights written into the records' tensor": (
        lambda: made(
            lambda self, x: torch.index_put(
                x, (torch.arange(len(x)), torch.zeros(len(x), dtype=torch.long)), self.w
            ).sum((1, 2)),
            w=nn.Parameter(torch.ones(WIDTH)),
        ),
        vectors(),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_gradient_for_each_record_is_refused_in_one_line(case: str) -> None:
    build, records = REFUSED[case]
    module = build()
    with (
        Gradients(module, dict(module.named_parameters()), "one-pass") as gradients,
        pytest.raises(SensitivityError) as refused,
    ):
        ClippedSum(gradients, Clipping(1.0)).add(Objective((records,), module))
    assert "\n" not in str(refused.value)


def test_a_use_that_is_not_seen_is_refused_and_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function outside of torch's own, say: its gradient arrives at the parameter itself, summed over the batch."""

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            return gradient @ w.t(), (x.transpose(1, 2) @ gradient).sum(0)

    module = made(lambda self, x: Hidden.apply(x, self.w).sum((1, 2)), w=nn.Parameter(torch.ones(WIDTH, 2)))
    with (
        Gradients(module, dict(module.named_parameters()), "one-pass") as gradients,
        pytest.raises(SensitivityError, match="'w' is used in a way"),
    ):
        ClippedSum(gradients, Clipping(1.0)).add(Objective((vectors(),), module))


# -- precision and memory ------------------------------------------------------------------------------------


def test_gram_norms_of_terms_that_cancel_never_come_out_too_small() -> None:
    """In float32 the Gram norm of contributions that cancel is mostly rounding; it must not let a record count more."""
    generator = torch.Generator().manual_seed(0)
    right = 100.0 + 1e-3 * torch.randn((64, 32, 48), generator=generator)
    left = torch.randn((64, 32, 48), generator=generator)
    left -= left.mean(1, keepdim=True)
    outer = Outer(left, right)
    assert outer.norms_by_gram()
    exact = torch.bmm(left.double().transpose(1, 2), right.double()).flatten(1).norm(dim=1)
    lefts = torch.bmm(left, left.transpose(1, 2))
    rights = torch.bmm(right, right.transpose(1, 2))
    bare = lefts.mul(rights).sum((1, 2)).clamp_min(0).sqrt()
    assert bool((bare.double() < exact * 0.99).any())  # the bare Gram norm does come out too small
    assert bool((outer.squared_norms().sqrt().double() >= exact * 0.999).all())


@pytest.mark.parametrize("mode", ["flat", "normalise"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_no_record_is_let_through_where_squares_are_lost(mode: Any, tokens: int) -> None:
    """An output's gradient of 1e-24 squares to 0 in float32; times an input of 1e18 it is far above the clipping norm."""
    left = torch.zeros((2, tokens, 40))
    left[0, 0, 0], left[1] = 1e-24, 0.5
    if tokens > 1:
        left[0, 1, 1] = 1.0  # a position of ordinary size beside it
    right = torch.zeros((2, tokens, 48))
    right[0, 0, 0], right[1] = 1e18, 0.5
    outer = Outer(left, right)
    assert outer.norms_by_gram()
    true = outer.product().double().flatten(1).norm(dim=1)
    assert float(true[0]) == pytest.approx(1e-6, rel=1e-3)
    clipping = Clipping(1e-7, mode)
    factors = clipping.factors(outer.squared_norms().sqrt())
    assert bool((factors.double() * true <= clipping.norm * 1.0001).all())
    assert float(factors[1] * true[1]) > 0.98 * clipping.norm  # an ordinary record is clipped as ever


def test_sums_and_norms_are_float32_under_bfloat16() -> None:
    module = made(lambda self, x: self.a(x).float().tanh().sum((1, 2)), a=nn.Linear(WIDTH, 40)).float()
    x = vectors().float()

    def losses(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out: Tensor = module(x)
        return out

    with Gradients(module, dict(module.named_parameters()), "one-pass") as gradients:
        total = ClippedSum(gradients, Clipping(0.5))
        contributed = total.add(Objective((x,), losses))
        alone = ClippedSum(gradients, Clipping(0.5))
        sizes = [float(alone.add(Objective((x[n : n + 1],), losses))) for n in range(RECORDS)]
    assert contributed.dtype == torch.float32
    assert {value.dtype for value in total.sums().values()} == {torch.float32}
    assert contributed.tolist() == pytest.approx(sizes, rel=1e-5)
    for name, value in total.sums().items():
        assert torch.allclose(value, alone.sums()[name], rtol=1e-4, atol=1e-6)
    exact, _ = by_the_loop(module, (x,), 0.5)
    size = math.sqrt(sum(float(value.square().sum()) for value in exact.values()))
    apart = math.sqrt(sum(float((total.sums()[name] - exact[name]).square().sum()) for name in exact))
    assert apart < 0.02 * size  # bfloat16's own rounding


def test_no_gradient_of_a_large_matrix_is_kept_record_by_record() -> None:
    module = made(lambda self, x: self.a(x).tanh().sum((1, 2)), a=nn.Linear(WIDTH, 40))
    x = vectors()
    one = OnePass(dict(module.named_parameters()), (x,), RECORDS)
    with one:
        one.backward(module(x).sum())
    entry: Entry = one.entries()["a.weight"]
    assert entry.whole is None
    assert [tuple(outer.left.shape) for outer in entry.outers] == [(RECORDS, TOKENS, 40)]
    assert one.carried == set()


def test_what_is_made_whole_is_reported() -> None:
    build, x = CASES["weight norm"]
    module = build()
    one = OnePass(dict(module.named_parameters()), (x,), RECORDS)
    with one:
        one.backward(module(x).sum())
    one.entries()
    assert one.carried == {"conv.parametrizations.weight.original0", "conv.parametrizations.weight.original1"}
