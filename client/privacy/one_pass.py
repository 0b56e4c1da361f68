"""One forward and one backward pass that leave every parameter's per-record gradients in a book.

While the losses are computed, each torch function is looked at (`torch.overrides.TorchFunctionMode`), for two kinds of
tensors: those that come from the records, and those that come from trained parameters alone. A function that takes both
is where a parameter meets the records. There the parameter goes in detached, and the output is tapped: in the backward pass
the tap sees the output's gradient and, with it, all that the parameter's per-record gradient is made of (`client.privacy.book`).
So it does not matter by which module, or by how many, a parameter is used: tied weights, weights used twice, `F.linear` on
an embedding's weight, class tokens and tables of relative positions that are broadcast over the batch are all met at the
function that uses them. A tensor computed from parameters alone (a table of positions, looked up) is met as a whole, and
its per-record gradients are carried on to its parameters by a batched vector-Jacobian product.

What a tap saves, it saves as autograd does, so that gradient checkpointing makes it anew. Rows are assumed to lie record by
record, (B x k, ...), which flattened tokens and windows do. A layout that does not, and anything else that is not understood,
is refused here or found by `client.privacy.probe`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.overrides import TorchFunctionMode

from client.privacy.book import Entry
from shared.errors import SensitivityError

Book = Callable[..., None]  # (gradient of the output, *what the tap saved)

RECORDS, PARAMETER = "records", "parameter"  # what a tensor comes from
TAG = "_moonflower_from"


@dataclass(frozen=True)
class LookedUp:
    """A tensor of rows of a trained table at places that are not the records' own: positions, token types."""

    table: nn.Parameter
    ids: Tensor


class _Tap(torch.autograd.Function):
    """The identity; books the gradient that comes back through it, with what was saved."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, root: Tensor, book: Book, *saved: Tensor) -> Tensor:
        ctx.book = book
        ctx.save_for_backward(*saved)
        return value.detach()  # an alias that may be modified in place, as the value could have been

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            ctx.book(gradients[0], *ctx.saved_tensors)
        return (gradients[0] if ctx.needs_input_grad[0] else None, None, None, *[None] * len(ctx.saved_tensors))


class OnePass(TorchFunctionMode):
    """One pass over `records` records: run the losses and the backward pass inside it, then read `entries`.

    Parameters
    ----------
    parameters
        What is trained, by name. Each must require a gradient.
    inputs
        The records' tensors, each (B, ...).

    Attributes
    ----------
    carried
        Names of parameters whose per-record gradients were made whole, which takes memory and time.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], inputs: Sequence[Tensor], records: int) -> None:
        super().__init__()
        self.parameters, self.records = parameters, records
        self.carried: set[str] = set()
        self._inputs = inputs
        self._root = torch.zeros((), requires_grad=True)
        self._entries: dict[int, tuple[Tensor, Entry]] = {}  # by the tensor's id, which the tensor keeps taken

    def __enter__(self) -> "OnePass":
        for tensor in self._inputs:
            setattr(tensor, TAG, RECORDS)
        for parameter in self.parameters.values():
            setattr(parameter, TAG, PARAMETER)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for parameter in self.parameters.values():
            if hasattr(parameter, TAG):
                delattr(parameter, TAG)

    def entries(self) -> dict[str, Entry]:
        """Return each parameter's book, after the backward pass; it is read once.

        Raises
        ------
        SensitivityError
            Where a parameter had a gradient that was not booked.
        """
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                raise SensitivityError(f"parameter {name!r} is used in a way that gives no gradient for each record.")
        found = {name: self._entry(parameter) for name, parameter in self.parameters.items()}
        leaves = {id(parameter) for parameter in self.parameters.values()}
        derived = [(tensor, entry) for tensor, entry in self._entries.values() if id(tensor) not in leaves]
        for tensor, entry in derived:
            self._carry(tensor, entry.per_record(), found)
        self._entries = {}
        return found

    def _carry(self, tensor: Tensor, gradients: Tensor, found: dict[str, Entry]) -> None:
        """Carry per-record gradients (B, *tensor.shape) of a derived tensor on to the parameters behind it."""
        wanted = list(self.parameters.values())
        backwards = torch.autograd.grad(
            tensor, wanted, gradients.to(tensor.dtype), retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        for (name, entry), gradient in zip(found.items(), backwards, strict=True):
            if gradient is not None:
                self.carried.add(name)
                entry.add_whole(gradient)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, or its tapped form where it takes both records and trained parameters."""
        kwargs = kwargs or {}
        trained = records = False
        for value in _tensors(args, kwargs):
            tag = getattr(value, TAG, None)
            if tag is RECORDS:
                records = True
            elif tag is not None:
                trained = True
        if trained and records and torch.is_grad_enabled():
            rule = _RULES.get(func)
            out = rule(self, func, *args, **kwargs) if rule is not None else self._other(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        if records:
            _mark(out, RECORDS)
        elif trained:
            tag = PARAMETER
            if func is F.embedding:
                table, ids = _argument(args, kwargs, 1, "weight"), _argument(args, kwargs, 0, "input")
                if id(table) in {id(parameter) for parameter in self.parameters.values()}:
                    tag = LookedUp(table, ids)
            _mark(out, tag, only_where_graph=True)
        return out

    # How each function is tapped. `x` stands for records, `weight` for what is trained.

    def _linear(self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        if _from(input) is not RECORDS:
            return self._other(func, (input, weight, bias), {})
        out = F.linear(input, _plain(weight), None if bias is None else _plain(bias))
        return self._tap_matrix(out, input, weight, bias)

    def _addmm(self, func: Any, bias: Tensor, x: Tensor, weight: Tensor, **options: Any) -> Any:
        if options or _from(x) is not RECORDS or _from(weight) is RECORDS or _from(bias) is RECORDS or bias.dim() != 1:
            return self._other(func, (bias, x, weight), options)
        out = torch.addmm(_plain(bias), x, _plain(weight))
        return self._tap_matrix(out, x, weight, bias, transposed=True)

    def _matmul(self, func: Any, x: Tensor, weight: Tensor) -> Any:
        if _from(x) is not RECORDS or _from(weight) is RECORDS or weight.dim() != 2 or x.dim() < 2:
            return self._other(func, (x, weight), {})
        return self._tap_matrix(func(x, _plain(weight)), x, weight, None, transposed=True)

    def _tap_matrix(
        self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool = False
    ) -> Tensor:
        trains_weight, trains_bias = _trained(weight), bias is not None and _trained(bias)
        if not (trains_weight or trains_bias):
            return out

        def book(gradient: Tensor, *saved: Tensor) -> None:
            left = self._by_record(gradient, gradient.shape[-1])
            if trains_weight:
                right = self._by_record(saved[0], saved[0].shape[-1])
                self._entry(weight).add_outer(*((right, left) if transposed else (left, right)))
            if trains_bias and bias is not None:
                self._entry(bias).add_whole(left.sum(1, dtype=_sum_type(left)))

        return self._tap(out, book, *([x] if trains_weight else []))

    def _embedding(
        self,
        func: Any,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Any:
        if max_norm is not None or scale_grad_by_freq or sparse:
            raise SensitivityError("an embedding with max_norm, scale_grad_by_freq or sparse couples the records.")
        out = F.embedding(input, _plain(weight), padding_idx)
        padding = None if padding_idx is None else padding_idx % weight.shape[0]

        def book(gradient: Tensor, ids: Tensor) -> None:
            if padding is not None:  # autograd gives that row no gradient
                gradient = torch.where((ids == padding).unsqueeze(-1), 0.0, gradient)
            self._entry(weight).add_rows(ids.reshape(self.records, -1), self._by_record(gradient, gradient.shape[-1]))

        return self._tap(out, book, input)

    def _layer_norm(
        self,
        func: Any,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Any:
        shape = list(normalized_shape)
        out = F.layer_norm(input, shape, _plain(weight), _plain(bias), eps)
        return self._tap_affine(out, input, weight, bias, lambda x: F.layer_norm(x, shape, None, None, eps))

    def _rms_norm(
        self,
        func: Any,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Any:
        shape = list(normalized_shape)
        out = F.rms_norm(input, shape, _plain(weight), eps)
        return self._tap_affine(out, input, weight, None, lambda x: F.rms_norm(x, shape, None, eps))

    def _group_norm(
        self,
        func: Any,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Any:
        out = F.group_norm(input, num_groups, _plain(weight), _plain(bias), eps)

        def normalised(x: Tensor) -> Tensor:
            return F.group_norm(x, num_groups, None, None, eps).flatten(2).transpose(1, 2)

        return self._tap_affine(out, input, weight, bias, normalised, lambda g: g.flatten(2).transpose(1, 2))

    def _tap_affine(
        self,
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
            if weight is not None and _trained(weight):
                each = gradient * normalised(saved[0].to(gradient.dtype))
                self._entry(weight).add_whole(self._summed(each, weight.shape))
            if bias is not None and _trained(bias):
                self._entry(bias).add_whole(self._summed(gradient, bias.shape))

        return self._tap(out, book, *([x] if weight is not None and _trained(weight) else []))

    def _conv(
        self,
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
        if _from(input) is not RECORDS or isinstance(padding, str) or not batched:
            return self._other(func, (input, weight, bias, stride, padding, dilation, groups), {})
        out = func(input, _plain(weight), _plain(bias), stride, padding, dilation, groups)
        kernel = (1, weight.shape[2]) if flat else tuple(weight.shape[2:])
        stride, padding, dilation = _pair(stride, flat, 1), _pair(padding, flat, 0), _pair(dilation, flat, 1)

        def book(gradient: Tensor, *saved: Tensor) -> None:
            gradient = gradient.flatten(2)  # (R, out, L)
            if bias is not None and _trained(bias):
                each = gradient.reshape(self.records, -1, *gradient.shape[1:])
                self._entry(bias).add_whole(each.sum((1, 3), dtype=_sum_type(each)))
            if not _trained(weight):
                return
            x = (saved[0].unsqueeze(2) if flat else saved[0]).to(gradient.dtype)
            columns = F.unfold(x, kernel, dilation, padding, stride)  # (R, in / groups x kernel x groups, L)
            if groups == 1:
                left = gradient.transpose(1, 2).reshape(self.records, -1, gradient.shape[1])
                right = columns.transpose(1, 2).reshape(self.records, -1, columns.shape[1])
                self._entry(weight).add_outer(left, right)
                return
            rows = gradient.shape[0]
            left = gradient.reshape(rows * groups, -1, gradient.shape[2])
            right = columns.reshape(rows * groups, -1, columns.shape[2])
            each = torch.bmm(left, right.transpose(1, 2)).reshape(self.records, -1, *weight.shape)
            self._entry(weight).add_whole(each.sum(1, dtype=_sum_type(each)))

        return self._tap(out, book, *([input] if _trained(weight) else []))

    def _rowwise(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Tap the parameter's side of a function that keeps rows apart: it gets a row of its own for each of theirs."""
        given = [value for value in _tensors(args, kwargs) if _from(value) is RECORDS]
        dimensions = max(value.dim() for value in _tensors(args, kwargs))
        rows = (
            max(value.shape[0] for value in given if value.dim() == dimensions)
            if any(value.dim() == dimensions and value.dim() for value in given)
            else 0
        )
        if not rows or rows % self.records:
            raise _unknown(func)

        def spread(value: Any) -> Any:
            if isinstance(value, Tensor) and _from(value) not in (None, RECORDS):
                return self._spread(func, value, dimensions, rows)
            return [spread(each) for each in value] if isinstance(value, list | tuple) else value

        return func(*[spread(value) for value in args], **{name: spread(value) for name, value in kwargs.items()})

    def _spread(self, func: Any, value: Tensor, dimensions: int, rows: int) -> Tensor:
        shape = (1,) * (dimensions - value.dim()) + tuple(value.shape)
        if shape[0] not in (1, rows):
            raise _unknown(func)
        shared = shape[0] == 1  # else the value has a row for each of the records' rows
        source = _from(value)

        def book(gradient: Tensor) -> None:
            each = gradient.reshape(self.records, -1, *shape[1:])  # (B, k, ...)
            if isinstance(source, LookedUp):
                ids = source.ids if not shared else source.ids.reshape(1, -1).expand(self.records, -1)
                values = each.sum(1) if shared else each
                self._entry(source.table).add_rows(
                    ids.reshape(self.records, -1), values.reshape(self.records, -1, values.shape[-1])
                )
            elif shared:
                self._entry(value).add_whole(each.sum(1, dtype=_sum_type(each)))
            else:
                own = torch.eye(self.records, device=each.device, dtype=each.dtype)
                own = own.view(self.records, self.records, *[1] * (each.dim() - 1))
                self._entry(value).add_whole(own * each.unsqueeze(0))

        placed = _plain(value).reshape(shape)
        return self._tap(placed.expand(rows, *shape[1:]) if shared else placed, book)

    def _other(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Tap any other function whose rows are apart, record by record: its per-record gradients are made whole."""
        if func in _ROWWISE:
            return self._rowwise(func, *args, **kwargs)
        places = [place for place, value in enumerate(args) if isinstance(value, Tensor)]
        weights = [place for place in places if _from(args[place]) not in (None, RECORDS)]
        rows = [place for place in places if _from(args[place]) is RECORDS]
        sizes = {args[place].shape[:1] for place in rows}
        named = any(_from(value) is not None for value in _tensors((), kwargs))
        if named or not weights or len(sizes) != 1 or getattr(func, "__name__", "").endswith("_"):
            raise _unknown(func)
        taken = [args[place] for place in weights]

        def run(*values: Tensor) -> Any:
            filled = list(args)
            for place, value in zip([*weights, *rows], values, strict=True):
                filled[place] = value
            return func(*filled, **kwargs)

        out = run(*[_plain(value) for value in taken], *[args[place] for place in rows])
        if not isinstance(out, Tensor) or out.shape[:1] not in sizes or out.shape[0] % self.records:
            raise _unknown(func)

        def one(gradient: Tensor, *x: Tensor) -> Any:
            _, backward = torch.func.vjp(lambda *values: run(*values, *x), *[_plain(value) for value in taken])
            return backward(gradient)

        def book(gradient: Tensor, *x: Tensor) -> None:
            each = [value.reshape(self.records, -1, *value.shape[1:]) for value in (gradient, *x)]
            try:
                found = torch.func.vmap(one)(*each)
            except RuntimeError:
                raise _unknown(func) from None
            for value, gradients in zip(taken, found, strict=True):
                self._note(value)
                self._entry(value).add_whole(gradients)

        return self._tap(out, book, *[args[place] for place in rows])

    # The book.

    def _tap(self, value: Tensor, book: Book, *saved: Tensor) -> Tensor:
        tapped: Tensor = _Tap.apply(value, self._root, book, *saved)  # type: ignore[no-untyped-call]
        return tapped

    def _entry(self, tensor: Tensor) -> Entry:
        kept = self._entries.get(id(tensor))
        if kept is None:
            kept = self._entries[id(tensor)] = (tensor, Entry(tensor.shape, self.records))
        return kept[1]

    def _note(self, tensor: Tensor) -> None:
        self.carried |= {name for name, parameter in self.parameters.items() if parameter is tensor}

    def _by_record(self, values: Tensor, width: int) -> Tensor:
        """View (B x k, ..., width), record by record, as (B, T, width)."""
        if values.dim() < 2 or values.shape[0] % self.records:
            raise SensitivityError("a trained layer does not see the records one by one.")
        return values.reshape(self.records, -1, width)

    def _summed(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Sum (B x k, ..., *shape) over all but the record and `shape`: (B, *shape)."""
        return self._by_record(values, shape.numel()).sum(1, dtype=_sum_type(values))


def _unknown(func: Any) -> SensitivityError:
    name = getattr(func, "__name__", str(func))
    return SensitivityError(
        f"a trained parameter meets the records in {name!r}, where it has no gradient for each record."
    )


def _from(value: Tensor) -> Any:
    return getattr(value, TAG, None)


def _trained(value: Tensor) -> bool:
    return _from(value) not in (None, RECORDS)


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and _trained(value) else value


def _sum_type(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _pair(value: Any, flat: bool, neutral: int) -> tuple[int, int]:
    """Two dimensions of a convolution's setting; a flat convolution's first is neutral."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return (neutral, values[0]) if flat else (values[0], values[-1])


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs[name]


def _tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            for each in value:
                if isinstance(each, Tensor):
                    yield each


def _mark(out: Any, tag: Any, *, only_where_graph: bool = False) -> None:
    if isinstance(out, Tensor):
        if not only_where_graph or out.requires_grad:
            setattr(out, TAG, tag)
    elif isinstance(out, list | tuple):
        for each in out:
            _mark(each, tag, only_where_graph=only_where_graph)


_METHODS = "add sub mul div true_divide rsub where maximum minimum bmm baddbmm matmul cat concat stack pow".split()
_OPERATORS = ["__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__"]
_OPERATORS += ["__truediv__", "__rtruediv__", "__itruediv__", "__div__", "__rdiv__", "__matmul__", "__rmatmul__"]
_OPERATORS += ["add_", "sub_", "mul_", "div_", "masked_fill", "__pow__", "__rpow__"]
# Functions whose output has, in dimension 0, a row for each of the inputs' rows, and nothing between rows.
_ROWWISE = {getattr(torch, name) for name in _METHODS if hasattr(torch, name)}
_ROWWISE |= {F.scaled_dot_product_attention}
_ROWWISE |= {getattr(Tensor, name) for name in [*_METHODS, *_OPERATORS] if hasattr(Tensor, name)}

_RULES: dict[Any, Callable[..., Any]] = dict.fromkeys(_ROWWISE, OnePass._rowwise) | {
    F.linear: OnePass._linear,
    torch.addmm: OnePass._addmm,
    Tensor.addmm: OnePass._addmm,
    torch.matmul: OnePass._matmul,
    torch.mm: OnePass._matmul,
    Tensor.matmul: OnePass._matmul,
    Tensor.mm: OnePass._matmul,
    Tensor.__matmul__: OnePass._matmul,
    F.embedding: OnePass._embedding,
    F.layer_norm: OnePass._layer_norm,
    F.rms_norm: OnePass._rms_norm,
    F.group_norm: OnePass._group_norm,
    F.conv1d: OnePass._conv,
    F.conv2d: OnePass._conv,
}
