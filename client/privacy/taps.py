"""How each torch function is tapped where trained parameters meet the records: see `client.privacy.one_pass`.

A rule runs the function with the parameters detached and taps its output, or the parameter's side. Functions without a
rule of their own are run record by record once more in the backward pass, by a batched vector-Jacobian product.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from client.privacy import origins
from client.privacy.book import sum_type
from shared.errors import SensitivityError

if TYPE_CHECKING:
    from client.privacy.one_pass import OnePass


def _linear(one: "OnePass", func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if origins.of(input) is not origins.RECORDS:
        return other(one, func, (input, weight, bias), {})
    out = F.linear(input, origins.plain(weight), None if bias is None else origins.plain(bias))
    return _tap_matrix(one, out, input, weight, bias)


def _addmm(one: "OnePass", func: Any, bias: Tensor, x: Tensor, weight: Tensor, **options: Any) -> Any:
    if (
        options
        or origins.of(x) is not origins.RECORDS
        or origins.of(weight) is origins.RECORDS
        or origins.of(bias) is origins.RECORDS
        or bias.dim() != 1
    ):
        return other(one, func, (bias, x, weight), options)
    out = torch.addmm(origins.plain(bias), x, origins.plain(weight))
    return _tap_matrix(one, out, x, weight, bias, transposed=True)


def _matmul(one: "OnePass", func: Any, x: Tensor, weight: Tensor) -> Any:
    if (
        origins.of(x) is not origins.RECORDS
        or origins.of(weight) is origins.RECORDS
        or weight.dim() != 2
        or x.dim() < 2
    ):
        return other(one, func, (x, weight), {})
    return _tap_matrix(one, func(x, origins.plain(weight)), x, weight, None, transposed=True)


def _tap_matrix(
    one: "OnePass", out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool = False
) -> Tensor:
    trains_weight, trains_bias = origins.trained(weight), bias is not None and origins.trained(bias)
    if not (trains_weight or trains_bias):
        return out

    def book(gradient: Tensor, *saved: Tensor) -> None:
        left = one.by_record(gradient, gradient.shape[-1])
        if trains_weight:
            right = one.by_record(saved[0], saved[0].shape[-1])
            one.entry(weight).add_outer(*((right, left) if transposed else (left, right)))
        if trains_bias and bias is not None:
            one.entry(bias).add_whole(left.sum(1, dtype=sum_type(left)))

    return one.tap(out, book, *([x] if trains_weight else []))


def _embedding(
    one: "OnePass",
    _: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001 - of max_norm
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise SensitivityError("an embedding with max_norm, scale_grad_by_freq or sparse couples the records.")
    out = F.embedding(input, origins.plain(weight), padding_idx)
    padding = None if padding_idx is None else padding_idx % weight.shape[0]

    def book(gradient: Tensor, ids: Tensor) -> None:
        if padding is not None:  # autograd gives that row no gradient
            gradient = torch.where((ids == padding).unsqueeze(-1), 0.0, gradient)
        one.entry(weight).add_rows(ids.reshape(one.records, -1), one.by_record(gradient, gradient.shape[-1]))

    return one.tap(out, book, input)


def _layer_norm(
    one: "OnePass",
    _: Any,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    shape = list(normalized_shape)
    out = F.layer_norm(input, shape, origins.plain(weight), origins.plain(bias), eps)
    return _tap_affine(one, out, input, weight, bias, lambda x: F.layer_norm(x, shape, None, None, eps))


def _rms_norm(
    one: "OnePass",
    _: Any,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    shape = list(normalized_shape)
    out = F.rms_norm(input, shape, origins.plain(weight), eps)
    return _tap_affine(one, out, input, weight, None, lambda x: F.rms_norm(x, shape, None, eps))


def _group_norm(
    one: "OnePass",
    _: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    out = F.group_norm(input, num_groups, origins.plain(weight), origins.plain(bias), eps)

    def normalised(x: Tensor) -> Tensor:
        return F.group_norm(x, num_groups, None, None, eps).flatten(2).transpose(1, 2)

    return _tap_affine(one, out, input, weight, bias, normalised, lambda g: g.flatten(2).transpose(1, 2))


def _tap_affine(
    one: "OnePass",
    out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalised: Callable[[Tensor], Tensor],
    ordered: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Tensor:
    """Tap weight * normalised(x) + bias, whose parameters are small: their gradients are kept whole."""

    def book(gradient: Tensor, *saved: Tensor) -> None:
        gradient = ordered(gradient)
        if weight is not None and origins.trained(weight):
            each = gradient * normalised(saved[0].to(gradient.dtype))
            one.entry(weight).add_whole(one.summed(each, weight.shape))
        if bias is not None and origins.trained(bias):
            one.entry(bias).add_whole(one.summed(gradient, bias.shape))

    return one.tap(out, book, *([x] if weight is not None and origins.trained(weight) else []))


def _conv(
    one: "OnePass",
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    flat = func is F.conv1d
    batched = input.dim() == (3 if flat else 4)
    if origins.of(input) is not origins.RECORDS or isinstance(padding, str) or not batched:
        return other(one, func, (input, weight, bias, stride, padding, dilation, groups), {})
    out = func(input, origins.plain(weight), origins.plain(bias), stride, padding, dilation, groups)
    kernel = (1, weight.shape[2]) if flat else tuple(weight.shape[2:])
    stride, padding, dilation = _pair(stride, flat, 1), _pair(padding, flat, 0), _pair(dilation, flat, 1)

    def book(gradient: Tensor, *saved: Tensor) -> None:
        gradient = gradient.flatten(2)  # (R, out, L)
        if bias is not None and origins.trained(bias):
            each = gradient.reshape(one.records, -1, *gradient.shape[1:])
            one.entry(bias).add_whole(each.sum((1, 3), dtype=sum_type(each)))
        if not origins.trained(weight):
            return
        x = (saved[0].unsqueeze(2) if flat else saved[0]).to(gradient.dtype)
        columns = F.unfold(x, kernel, dilation, padding, stride)  # (R, in / groups x kernel x groups, L)
        if groups == 1:
            left = gradient.transpose(1, 2).reshape(one.records, -1, gradient.shape[1])
            right = columns.transpose(1, 2).reshape(one.records, -1, columns.shape[1])
            one.entry(weight).add_outer(left, right)
            return
        rows = gradient.shape[0]
        left = gradient.reshape(rows * groups, -1, gradient.shape[2])
        right = columns.reshape(rows * groups, -1, columns.shape[2])
        each = torch.bmm(left, right.transpose(1, 2)).reshape(one.records, -1, *weight.shape)
        one.entry(weight).add_whole(each.sum(1, dtype=sum_type(each)))

    return one.tap(out, book, *([input] if origins.trained(weight) else []))


def _rowwise(one: "OnePass", func: Any, *args: Any, **kwargs: Any) -> Any:
    """Tap the parameter's side of a function that keeps rows apart: it gets a row of its own for each of theirs."""
    given = list(origins.tensors(args, kwargs))
    dimensions = max(value.dim() for value in given)
    whole = [value for value in given if origins.of(value) is origins.RECORDS and value.dim() == dimensions]
    rows = max((value.shape[0] for value in whole if dimensions), default=0)
    if not rows or rows % one.records:
        raise _unknown(func)

    def placed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _spread(one, func, value, dimensions, rows) if origins.trained(value) else value
        return [placed(each) for each in value] if isinstance(value, list | tuple) else value

    return func(*[placed(value) for value in args], **{name: placed(value) for name, value in kwargs.items()})


def _spread(one: "OnePass", func: Any, value: Tensor, dimensions: int, rows: int) -> Tensor:
    shape = (1,) * (dimensions - value.dim()) + tuple(value.shape)
    if shape[0] not in (1, rows):
        raise _unknown(func)
    shared = shape[0] == 1  # else the value has a row for each of the records' rows
    source = origins.of(value)

    def book(gradient: Tensor) -> None:
        each = gradient.reshape(one.records, -1, *shape[1:])  # (B, k, ...)
        if isinstance(source, origins.LookedUp):
            ids = source.ids if not shared else source.ids.reshape(1, -1).expand(one.records, -1)
            values = each.sum(1) if shared else each
            one.entry(source.table).add_rows(
                ids.reshape(one.records, -1), values.reshape(one.records, -1, values.shape[-1])
            )
        elif shared:
            one.entry(value).add_whole(each.sum(1, dtype=sum_type(each)))
        else:
            own = torch.eye(one.records, device=each.device, dtype=torch.bool)
            own = own.view(one.records, one.records, *[1] * (each.dim() - 1))
            one.entry(value).add_whole(torch.where(own, each.unsqueeze(0), 0.0))

    placed = origins.plain(value).reshape(shape)
    return one.tap(placed.expand(rows, *shape[1:]) if shared else placed, book)


def other(one: "OnePass", func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tap any other function whose rows are apart, record by record: its per-record gradients are made whole."""
    if func in _ROWWISE:
        return _rowwise(one, func, *args, **kwargs)
    places = [place for place, value in enumerate(args) if isinstance(value, Tensor)]
    weights = [place for place in places if origins.of(args[place]) not in (None, origins.RECORDS)]
    rows = [place for place in places if origins.of(args[place]) is origins.RECORDS]
    sizes = {args[place].shape[:1] for place in rows}
    named = any(origins.of(value) is not None for value in origins.tensors((), kwargs))
    if named or not weights or len(sizes) != 1 or getattr(func, "__name__", "").endswith("_"):
        raise _unknown(func)
    taken = [args[place] for place in weights]

    def run(*values: Tensor) -> Any:
        filled = list(args)
        for place, value in zip([*weights, *rows], values, strict=True):
            filled[place] = value
        return func(*filled, **kwargs)

    out = run(*[origins.plain(value) for value in taken], *[args[place] for place in rows])
    if not isinstance(out, Tensor) or out.shape[:1] not in sizes or out.shape[0] % one.records:
        raise _unknown(func)

    def of_one_record(gradient: Tensor, *x: Tensor) -> Any:
        pulled = torch.func.vjp(lambda *values: run(*values, *x), *[origins.plain(value) for value in taken])
        return pulled[1](gradient)

    def book(gradient: Tensor, *x: Tensor) -> None:
        each = [value.reshape(one.records, -1, *value.shape[1:]) for value in (gradient, *x)]
        try:
            with slow_without_a_word():
                found: Any = torch.func.vmap(of_one_record)(*each)
        except (RuntimeError, IndexError, ValueError):
            raise _unknown(func) from None
        for value, gradients in zip(taken, found, strict=True):
            one.note(value)
            one.entry(value).add_whole(gradients)

    return one.tap(out, book, *[args[place] for place in rows])


@contextmanager
def slow_without_a_word() -> Iterator[None]:
    """Let torch loop over records where it has no batched form, without its advice to report that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def _unknown(func: Any) -> SensitivityError:
    name = getattr(func, "__name__", str(func))
    return SensitivityError(
        f"a trained parameter meets the records in {name!r}, where it has no gradient for each record."
    )


def _pair(value: Any, flat: bool, neutral: int) -> tuple[int, int]:
    """Two dimensions of a convolution's setting; a flat convolution's first is neutral."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return (neutral, values[0]) if flat else (values[0], values[-1])


_METHODS = ["add", "sub", "mul", "div", "true_divide", "rsub", "where", "maximum", "minimum", "pow"]
_METHODS += ["bmm", "baddbmm", "matmul", "cat", "concat", "stack"]
_OPERATORS = ["__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__"]
_OPERATORS += ["__truediv__", "__rtruediv__", "__itruediv__", "__div__", "__rdiv__", "__matmul__", "__rmatmul__"]
_OPERATORS += ["add_", "sub_", "mul_", "div_", "masked_fill", "__pow__", "__rpow__"]
# Functions whose output has, in dimension 0, a row for each of the inputs' rows, and nothing between rows.
_ROWWISE = {getattr(torch, name) for name in _METHODS if hasattr(torch, name)}
_ROWWISE |= {F.scaled_dot_product_attention}
_ROWWISE |= {getattr(Tensor, name) for name in [*_METHODS, *_OPERATORS] if hasattr(Tensor, name)}

RULES: dict[Any, Callable[..., Any]] = dict.fromkeys(_ROWWISE, _rowwise) | {
    F.linear: _linear,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.conv1d: _conv,
    F.conv2d: _conv,
}
