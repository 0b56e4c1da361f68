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

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from client.privacy import origins, taps
from client.privacy.book import Entry, sum_type
from shared.errors import SensitivityError

Book = Callable[..., None]  # (gradient of the output, *what the tap saved)


class _Tap(torch.autograd.Function):
    """The identity; books the gradient that comes back through it, with what was saved."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, _: Tensor, book: Book, *saved: Tensor) -> Tensor:
        ctx.book = book
        ctx.save_for_backward(*saved)
        return value.detach()  # an alias that may be modified in place, as the value could have been

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # where checkpointed, this runs the forward pass again
        gradient = gradients[0].contiguous()  # once, for the book and for what comes behind
        with torch.no_grad(), torch._C.DisableTorchFunction():
            ctx.book(gradient, *saved)
        return (gradient if ctx.needs_input_grad[0] else None, None, None, *[None] * len(saved))


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

    def __enter__(self) -> Self:
        origins.mark(list(self._inputs), origins.RECORDS)
        origins.mark(list(self.parameters.values()), origins.PARAMETER)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for parameter in self.parameters.values():
            origins.unmark(parameter)

    def backward(self, total: Tensor) -> None:
        """Run the backward pass of the summed losses inside this mode.

        `Tensor.backward` and `torch.autograd.backward` are functions that a mode looks at, and is off meanwhile: what a
        checkpoint computes anew would not be tapped.
        """
        _engine_run_backward((total,), (torch.ones_like(total),), False, False, (), True, True)

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
        found = {name: self.entry(parameter) for name, parameter in self.parameters.items()}
        leaves = {id(parameter) for parameter in self.parameters.values()}
        derived = [(tensor, entry) for tensor, entry in self._entries.values() if id(tensor) not in leaves]
        for tensor, entry in derived:
            self._carry(tensor, entry.per_record(), found)
        self._entries = {}
        return found

    def _carry(self, tensor: Tensor, gradients: Tensor, found: dict[str, Entry]) -> None:
        """Carry per-record gradients (B, *tensor.shape) of a derived tensor on to the parameters behind it."""
        wanted = list(self.parameters.values())
        with taps.slow_without_a_word():
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
        for value in origins.tensors(args, kwargs):
            origin = origins.of(value)
            records |= origin is origins.RECORDS
            trained |= origin not in (None, origins.RECORDS)
        if trained and records and torch.is_grad_enabled():
            rule = taps.RULES.get(func)
            out = rule(self, func, *args, **kwargs) if rule is not None else taps.other(self, func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        if records:
            origins.mark(out, origins.RECORDS)
        elif trained:
            place = self._looked_up(*args, **kwargs) if func is F.embedding else None
            origins.mark(out, place or origins.PARAMETER, only_where_graph=True)
        return out

    def _looked_up(self, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> origins.LookedUp | None:
        """Keep where rows come from, if from a parameter itself: they are booked as rows, not as a whole table."""
        table = next((parameter for parameter in self.parameters.values() if parameter is weight), None)
        return None if table is None else origins.LookedUp(table, input)

    # What the taps need.

    def tap(self, value: Tensor, book: Book, *saved: Tensor) -> Tensor:
        """Return `value`, with a tap that books its gradient beside what was saved."""
        tapped: Tensor = _Tap.apply(value, self._root, book, *saved)  # type: ignore[no-untyped-call]
        return tapped

    def entry(self, tensor: Tensor) -> Entry:
        """Return the book of a parameter, or of a tensor computed from parameters."""
        kept = self._entries.get(id(tensor))
        if kept is None:
            kept = self._entries[id(tensor)] = (tensor, Entry(tensor.shape, self.records, tensor.device))
        return kept[1]

    def note(self, tensor: Tensor) -> None:
        """Report a parameter whose gradients were made whole."""
        self.carried |= {name for name, parameter in self.parameters.items() if parameter is tensor}

    def by_record(self, values: Tensor, width: int) -> Tensor:
        """View (B x k, ..., width), record by record, as (B, T, width)."""
        if values.dim() < 2 or values.shape[0] % self.records:
            raise SensitivityError("a trained layer does not see the records one by one.")
        return values.reshape(self.records, -1, width)

    def summed(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Sum (B x k, ..., *shape) over all but the record and `shape`: (B, *shape)."""
        return self.by_record(values, shape.numel()).sum(1, dtype=sum_type(values))
