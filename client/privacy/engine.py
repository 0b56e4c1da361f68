"""Per-record gradients, clipped and summed: the one place where Opacus is touched.

Three ways lead to a clipped sum. `one-pass` books what one backward pass leaves (`client.privacy.one_pass`); `hooks` takes
Opacus's gradients of single records; `ghost` takes Opacus's norms, and a second backward pass. `auto` is the first of one-pass and
hooks that the probe finds right. What follows is the same for all, because it is what the claim rests on: the norm over all
trained parameters of a record in float32, the clipping, the sum. The guarantee: adding or removing one record changes the
sum by at most the clipping norm in L2 norm, so that a noised sum (`client.privacy.noise`) is one Gaussian mechanism of that
sensitivity. It holds only where a record's gradient depends on that record alone; `client.privacy.probe` checks it, and the
guards here refuse what is known to break it.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from client.privacy.noise import Grid
from client.privacy.one_pass import OnePass
from shared.errors import SensitivityError
from shared.run_config import Gradients as Mode

SLACK = 1e-3  # clipping divides by norm x (1 + SLACK), so that rounding never lifts a record above the norm
METHODS: dict[Mode, tuple[Mode, ...]] = {
    "auto": ("one-pass", "hooks"),
    "one-pass": ("one-pass",),
    "hooks": ("hooks",),
    "ghost": ("ghost",),
}


@dataclass(frozen=True)
class Objective:
    """The losses of a batch: `losses(*inputs)` gives (B,), each of that record alone; every input is (B, ...)."""

    inputs: tuple[Tensor, ...]
    losses: Callable[..., Tensor]

    @property
    def records(self) -> int:
        """B: how many were drawn is private."""
        return len(self.inputs[0])

    def of(self, kept: Tensor) -> "Objective":
        """The same of the records that the mask (B,) keeps."""
        return Objective(tuple(part[kept] for part in self.inputs), self.losses)

    def run(self) -> Tensor:
        """Return the losses (B,)."""
        losses = self.losses(*self.inputs)
        if losses.shape != (self.records,):
            raise SensitivityError("the loss is not one value a record.")
        return losses


@dataclass(frozen=True)
class Clipping:
    """How a record's gradient is bounded.

    `flat` scales it down to `norm` where it is larger (Abadi et al. 2016); `normalise` scales every one
    to `norm`, with AUTO-S's small stabiliser (Bu et al. 2023, "Automatic clipping"). `scale` is what the losses were
    multiplied by, a public constant: it is divided out. Whatever it is, no record counts for more than `norm`.
    """

    norm: float
    mode: Literal["flat", "normalise"] = "flat"
    scale: float = 1.0

    def factors(self, norms: Tensor) -> Tensor:
        """Scale of each record (B,), from its gradient's norm (B,); 0 where the norm is not finite.

        Nor does a record count whose scale would be subnormal: rounded to so few digits, it could lift the record
        above the clipping norm.
        """
        if self.mode == "flat":
            factors = (self.norm / (norms * (1 + SLACK))).clamp(max=1 / self.scale)
        else:
            factors = self.norm / (norms * (1 + SLACK) + 0.01 * self.norm * self.scale)
        sound = torch.isfinite(norms) & (factors >= torch.finfo(factors.dtype).tiny)
        return torch.where(sound, factors, torch.zeros_like(norms))


class Method(Protocol):
    """One way to a clipped sum, attached to a module."""

    def add(self, objective: Objective, clipping: Clipping, sums: dict[str, Tensor]) -> Tensor:
        """Add the records' clipped gradients to `sums` in place; return their norms (B,) before clipping."""

    def per_record(self, objective: Objective) -> dict[str, Tensor]:
        """Return each parameter's gradients (B, *shape)."""

    def close(self) -> None:
        """Leave the module as it was."""


class Gradients:
    """Clips and sums the per-record gradients of `parameters` (name -> parameter, all inside `module`).

    A context manager: inside it the method is attached to `module`, and gone after it.

    Attributes
    ----------
    method
        The one in use. Under `auto` the probe settles it.
    """

    def __init__(self, module: nn.Module, parameters: dict[str, nn.Parameter], mode: Mode = "auto") -> None:
        self.parameters = parameters
        self.methods = METHODS[mode]
        self.method: Mode = self.methods[0]
        self._module = module
        self._attached: Method | None = None
        self._settings = ExitStack()

    def __enter__(self) -> Self:
        self._settings.enter_context(_full_float32())
        return self

    def __exit__(self, *_: object) -> None:
        self._detach()
        self._settings.close()

    def use(self, method: Mode) -> None:
        """Change to another method."""
        self._detach()
        self.method = method

    def add(self, objective: Objective, clipping: Clipping, sums: dict[str, Tensor], *, whole: bool = False) -> Tensor:
        """Add the records' clipped gradients to `sums` in place; return their norms (B,) before clipping.

        `whole` goes by the gradients of single records, as sums of whole numbers do.

        Raises
        ------
        SensitivityError
            Where some parameter has no gradient for each record by this method.
        """
        if whole:
            return _add_samples(self.per_record(objective), self.parameters, clipping, sums)
        with self._without_gradients():
            return self._attach().add(objective, clipping, sums)

    def per_record(self, objective: Objective) -> dict[str, Tensor]:
        """Return each parameter's gradients (B, *shape), float32 or double; errors as in `add`."""
        with self._without_gradients():
            return self._attach().per_record(objective)

    def alone(self, objective: Objective) -> dict[str, Tensor]:
        """Return the gradients of the summed losses by plain autograd: the loop that the probe compares with."""
        self._detach()
        found = torch.autograd.grad(objective.run().sum(), list(self.parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(parameter) if part is None else part.detach()
            for (name, parameter), part in zip(self.parameters.items(), found, strict=True)
        }

    def _attach(self) -> Method:
        if self._attached is None:
            kinds: dict[Mode, Callable[..., Method]] = {"one-pass": Booked, "hooks": Hooked, "ghost": Ghost}
            self._attached = kinds[self.method](self._module, self.parameters)
        return self._attached

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.close()
            self._attached = None

    @contextmanager
    def _without_gradients(self) -> Iterator[None]:
        """Begin and end with parameters that hold no gradient: what stands there is taken for this pass's."""
        self._forget()
        try:
            yield
        finally:
            self._forget()

    def _forget(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]


class Booked:
    """One forward and one backward pass, and a book."""

    def __init__(self, _: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        self._parameters = parameters

    def add(self, objective: Objective, clipping: Clipping, sums: dict[str, Tensor]) -> Tensor:
        """Add the clipped gradients; see `Gradients.add`."""
        entries = self._book(objective)
        with torch.no_grad():
            norms = torch.stack([entry.squared_norms() for entry in entries.values()]).sum(0).sqrt()
            factors, kept = clipping.factors(norms), torch.isfinite(norms)
            clean = None if bool(kept.all()) else kept
            for name in list(entries):
                kind = torch.promote_types(self._parameters[name].dtype, torch.float32)
                sums[name] = entries.pop(name).add_to(sums.get(name), factors.to(kind), clean)
        return norms

    def per_record(self, objective: Objective) -> dict[str, Tensor]:
        """Return the gradients whole; see `Gradients.per_record`."""
        entries = self._book(objective)
        with torch.no_grad():
            return {name: entries.pop(name).per_record() for name in list(entries)}

    def close(self) -> None:
        """Nothing is attached between passes."""

    def _book(self, objective: Objective) -> dict[str, Any]:
        one = OnePass(self._parameters, objective.inputs, objective.records)
        with _said_as_refusal("the one-pass engine"):
            with one:
                losses = objective.run()
                if not losses.requires_grad:
                    raise SensitivityError("the losses depend on no trained parameter.")
                one.backward(losses.sum())
            with torch.no_grad():
                return one.entries()


class Opacus:
    """Opacus's hooks, and guards against what they get wrong without a word."""

    hooks = "GradSampleHooks"  # of opacus.grad_sample

    def __init__(self, module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        from opacus import grad_sample  # a second or two that one-pass, which comes first, goes without

        self._parameters = parameters
        self._records = 0
        self._calls: dict[str, int] = {}
        self._padding = _padding_rows(module, parameters)
        self._handles = ExitStack()
        self._handles.enter_context(warnings.catch_warnings())
        # Opacus's hooks need no gradient of a layer's input, and frozen layers below have none.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        try:
            self._hooks = getattr(grad_sample, self.hooks)(module, loss_reduction="sum", strict=True)
        except NotImplementedError as error:
            self._handles.close()
            raise SensitivityError(f"this model has no per-record gradients: {str(error).splitlines()[0]}") from None
        self._handles.callback(self._hooks.cleanup)
        # After Opacus, which copies the layers that it gives to functorch, hooks and all.
        for name, part in module.named_modules():
            if not any(parameter.requires_grad for parameter in part.parameters(recurse=False)):
                continue
            if isinstance(part, nn.Embedding):
                self._handles.callback(part.register_forward_pre_hook(self._expand_positions).remove)
            self._handles.callback(part.register_forward_hook(partial(self._look, name)).remove)

    def close(self) -> None:
        """Take the hooks off."""
        self._handles.close()

    @contextmanager
    def _watching(self, records: int) -> Iterator[None]:
        self._records, self._calls = records, {}
        try:
            with _said_as_refusal("Opacus"):
                yield
        finally:
            self._records = 0

    def _expand_positions(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Give broadcast position ids (1, T) one row a record: else their gradient would count once a batch."""
        ids = inputs[0]
        if not self._records:
            return inputs
        return (
            ids.expand(self._records, -1).contiguous() if ids.dim() == 2 and ids.shape[0] == 1 else ids,
            *inputs[1:],
        )

    def _look(self, name: str, part: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        """Refuse a trained layer that is called twice, or on something that Opacus would not read record by record."""
        if not self._records:
            return
        self._calls[name] = self._calls.get(name, 0) + 1
        shape = inputs[0].shape if inputs and isinstance(inputs[0], Tensor) else ()
        if len(shape) < 2 or shape[0] != self._records:
            raise SensitivityError(
                f"layer {name!r} does not see one row a record: a record could count for more than the clipping norm."
            )
        if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not inputs[0].is_contiguous():
            raise SensitivityError(f"layer {name!r} sees its input in another order than Opacus reads it.")
        if self._calls[name] > 1:
            raise SensitivityError(
                f"layer {name!r} is called twice in one pass; per-record gradients are not sure there."
            )


class Hooked(Opacus):
    """Opacus's gradients of single records."""

    def add(self, objective: Objective, clipping: Clipping, sums: dict[str, Tensor]) -> Tensor:
        """Add the clipped gradients; see `Gradients.add`."""
        return _add_samples(self.per_record(objective), self._parameters, clipping, sums)

    def per_record(self, objective: Objective) -> dict[str, Tensor]:
        """Return the gradients whole; see `Gradients.per_record`."""
        with self._watching(objective.records):
            objective.run().sum().backward()  # type: ignore[no-untyped-call]
        return {name: self._sample(name, parameter, objective.records) for name, parameter in self._parameters.items()}

    def _sample(self, name: str, parameter: nn.Parameter, records: int) -> Tensor:
        sample = getattr(parameter, "grad_sample", None)
        if not isinstance(sample, Tensor) or sample.shape != (records, *parameter.shape):
            raise SensitivityError(
                f"parameter {name!r} has no gradient for each record; train another part of the model."
            )
        if name in self._padding:
            sample[:, self._padding[name]] = 0.0
        return sample if sample.dtype == torch.float64 else sample.float()


class Ghost(Opacus):
    """Opacus's norms, then a second backward pass of the weighted losses."""

    hooks = "GradSampleHooksFastGradientClipping"

    def add(self, objective: Objective, clipping: Clipping, sums: dict[str, Tensor]) -> Tensor:
        """Add the clipped gradients; see `Gradients.add`."""
        if self._padding:
            raise SensitivityError("Opacus counts an embedding's padding row in the norm, and autograd not in the sum.")
        with self._watching(objective.records):
            losses = objective.run()
            losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
            norms: Tensor = self._hooks.get_norm_sample()
            if norms.shape != losses.shape:
                raise SensitivityError("Opacus's norms are not one a record.")
            finite = torch.isfinite(norms)
            self._hooks.disable_hooks()
            try:
                for parameter in self._parameters.values():
                    parameter.grad = None
                if not bool(finite.all()):  # a zero weight times a NaN is a NaN: run the others again
                    self._records = 0
                    losses = objective.of(finite).run() if bool(finite.any()) else losses[:0]
                factors = clipping.factors(norms)[finite].to(losses.dtype)
                (factors * losses).sum().backward()  # type: ignore[no-untyped-call]
            finally:
                self._hooks.enable_hooks()
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                total = _sum_of(name, self._parameters, sums)
                total += parameter.grad.to(total.dtype)
        return norms

    def per_record(self, _: Objective) -> dict[str, Tensor]:
        """Raise: norms are all that this method has."""
        raise SensitivityError("hardware.gradients='ghost' has no gradients of single records; use 'auto'.")


class ClippedSum:
    """The running sum of clipped per-record gradients of one step.

    Errors name layers and parameters and never a number of records: how many were drawn is private.
    """

    def __init__(self, gradients: Gradients, clipping: Clipping, *, whole: bool = False) -> None:
        self.clipping, self._whole = clipping, whole
        self.dropped = 0  # records whose gradient was not finite: counted here, and never sent
        self._gradients = gradients
        self._sums: dict[str, Tensor] = {}  # made when there is something to add: a backward pass has freed memory then

    def add(self, objective: Objective) -> Tensor:
        """Add the clipped gradients of a batch; return the norm (B,) that each record contributed, for the probe."""
        norms = self._gradients.add(objective, self.clipping, self._sums, whole=self._whole)
        finite = torch.isfinite(norms)
        self.dropped += objective.records - int(finite.sum())
        return torch.where(finite, norms, 0.0) * self.clipping.factors(norms)

    def sums(self) -> dict[str, Tensor]:
        """Return the clipped sum, not noised: it must not leave this process."""
        parameters = self._gradients.parameters
        return {name: _sum_of(name, parameters, self._sums) for name in parameters}


class RoundedSum:
    """The same for discrete noise: every record's clipped gradient is rounded to a grid, and whole numbers are summed.

    Sums of whole numbers are exact in any order. Each record's gradient is made whole for it, which takes memory; it is
    computed in floating point beside its neighbours', whose number a processor's rounding may show in a last step.
    """

    def __init__(self, gradients: Gradients, clipping: Clipping, grid: Grid) -> None:
        self.clipping, self.dropped = clipping, 0
        self._gradients, self._grid = gradients, grid
        self._sums = {name: torch.zeros_like(value, dtype=torch.int64) for name, value in gradients.parameters.items()}

    def add(self, objective: Objective) -> Tensor:
        """Add the rounded gradients of a batch; return the norm (B,) of each before its rounding."""
        samples = self._gradients.per_record(objective)
        norms = _norms(samples)
        factors, finite = self.clipping.factors(norms), torch.isfinite(norms)
        self.dropped += objective.records - int(finite.sum())
        for name in list(samples):
            self._sums[name] += self._grid.rounded_sum(samples.pop(name), factors)
        return torch.where(finite, norms, 0.0) * factors

    def sums(self) -> dict[str, Tensor]:
        """Return the sum in steps of the grid, int64, not noised: it must not leave this process."""
        return self._sums


class PlainSum:
    """The running sum of gradients as autograd gives it: no record is bounded. For runs that promise nothing."""

    dropped = 0  # a record whose gradient is not finite cannot be told from the others

    def __init__(self, gradients: Gradients, scale: float = 1.0) -> None:
        self._parameters, self._scale = gradients.parameters, scale
        self._forget()

    def add(self, objective: Objective) -> None:
        """Add the gradients of a batch to what the parameters hold."""
        (objective.run().sum() / self._scale).backward()  # type: ignore[no-untyped-call]

    def sums(self) -> dict[str, Tensor]:
        """Return the sum, and let the parameters hold it no more."""
        found = {name: value.grad for name, value in self._parameters.items() if value.grad is not None}
        self._forget()
        return {name: _sum_of(name, self._parameters, found) for name in self._parameters}

    def _forget(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None


def _sum_of(name: str, parameters: dict[str, nn.Parameter], sums: dict[str, Tensor]) -> Tensor:
    """Return a parameter's running sum, zeros at first; float32, or double where the model is."""
    if name not in sums:
        kind = torch.promote_types(parameters[name].dtype, torch.float32)
        sums[name] = torch.zeros_like(parameters[name], dtype=kind, requires_grad=False)
    return sums[name]


def _add_samples(
    samples: dict[str, Tensor], parameters: dict[str, nn.Parameter], clipping: Clipping, sums: dict[str, Tensor]
) -> Tensor:
    """Clip gradients of single records (B, *shape) and add them to `sums`; return their norms (B,) before clipping."""
    norms = _norms(samples)
    factors, finite = clipping.factors(norms), torch.isfinite(norms)
    for name, sample in samples.items():
        kept = sample if bool(finite.all()) else torch.where(finite.view(-1, *[1] * (sample.dim() - 1)), sample, 0.0)
        total = _sum_of(name, parameters, sums)
        total += torch.tensordot(factors, kept, dims=1).to(total.dtype)
    return norms


def _norms(samples: dict[str, Tensor]) -> Tensor:
    """Return the norm (B,) of each record's gradient over all parameters."""
    each = [torch.linalg.vector_norm(sample.reshape(len(sample), -1), dim=1) for sample in samples.values()]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(each), dim=0)
    return norms


@contextmanager
def _said_as_refusal(who: str) -> Iterator[None]:
    """Raise what a model and a method make of each other as a refusal of one line; memory's end is no such thing."""
    try:
        yield
    except (SensitivityError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, AttributeError, TypeError, NotImplementedError, LookupError) as error:
        said = str(error).strip().splitlines()
        raise SensitivityError(
            f"{who} cannot give this model's per-record gradients ({type(error).__name__}: {said[0] if said else ''})."
        ) from error


def _padding_rows(module: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, int]:
    """Return the row of each trained embedding that autograd gives no gradient, and Opacus does."""
    found: dict[str, int] = {}
    for name, parameter in parameters.items():
        users = [part for part in module.modules() if any(own is parameter for own in part.parameters(recurse=False))]
        rows = [part.padding_idx for part in users if isinstance(part, nn.Embedding) and part.padding_idx is not None]
        if rows and len(users) > 1:
            raise SensitivityError(f"parameter {name!r} is shared, and one of its uses leaves out a padding row.")
        if rows:
            found[name] = rows[0]
    return found


def train_only(module: nn.Module | Mapping[str, nn.Parameter], names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Let the named parameters of a module, and no others, have gradients; return them, in the module's order."""
    wanted = set(names)
    every = module if isinstance(module, Mapping) else dict(module.named_parameters())
    for name, parameter in every.items():
        if parameter.requires_grad != (name in wanted):
            parameter.requires_grad_(name in wanted)
    return {name: parameter for name, parameter in every.items() if name in wanted}


@contextmanager
def _full_float32() -> Iterator[None]:
    """Keep TF32 off: ten bits of a product are too few for a norm."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution
