"""Per-record gradients, clipped, summed, noised: the one place where Opacus is touched.

Opacus's hooks give each record's gradient. Everything after that is here, because it is what the claim
rests on: the norm over all trained parameters of a record in float32, the clipping, the sum, noise from
the operating system's entropy, and division by the public expected batch. The guarantee: adding or
removing one record changes the sum by at most `clipping_norm` in L2 norm, so the noised sum is one
Gaussian mechanism of that sensitivity. It holds only where a record's gradient depends on that record
alone; `client.privacy.probe` checks it, and the guards here refuse what is known to break it.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from client.privacy.randomness import Keystream
from shared.errors import SensitivityError

SLACK = 1e-3  # clipping divides by norm x (1 + SLACK), so that rounding never lifts a record above the norm

Forward = Callable[[], Tensor]  # () -> losses (B,), one a record, each of that record alone


@dataclass(frozen=True)
class Clipping:
    """How a record's gradient is bounded.

    `flat` scales it down to `norm` where it is larger (Abadi et al. 2016); `normalise` scales every one
    to `norm`, with AUTO-S's small stabiliser (Bu et al. 2023, "Automatic clipping").
    """

    norm: float
    mode: Literal["flat", "normalise"] = "flat"

    def factors(self, norms: Tensor) -> Tensor:
        """Scale of each record (B,), from its gradient's norm (B,); 0 where the norm is not finite.

        Nor does a record count whose scale would be subnormal: rounded to so few digits, it could lift the record
        above the clipping norm.
        """
        if self.mode == "flat":
            factors = (self.norm / (norms * (1 + SLACK))).clamp(max=1.0)
        else:
            factors = self.norm / (norms * (1 + SLACK) + 0.01 * self.norm)
        sound = torch.isfinite(norms) & (factors >= torch.finfo(factors.dtype).tiny)
        return torch.where(sound, factors, torch.zeros_like(norms))


class PerRecordGradients:
    """Gives each record's gradient of `parameters` (name -> parameter, all inside `module`).

    A context manager: Opacus is attached to `module` inside it, and gone after it.
    """

    def __init__(self, module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self._module = module
        self._records = 0
        self._calls: dict[str, int] = {}
        self._padding = {  # rows that autograd gives no gradient, and Opacus does
            name: part.padding_idx
            for part in module.modules()
            if isinstance(part, nn.Embedding) and part.padding_idx is not None
            for name, parameter in parameters.items()
            if parameter is part.weight
        }
        self._handles = ExitStack()

    def __enter__(self) -> Self:
        self._handles.enter_context(warnings.catch_warnings())
        # Opacus's hooks need no gradient of a layer's input, and frozen layers below have none.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        try:
            hooks = GradSampleHooks(self._module, loss_reduction="sum", strict=True)
        except NotImplementedError as error:
            self._handles.close()
            raise SensitivityError(f"this model has no per-record gradients: {str(error).splitlines()[0]}") from None
        self._handles.callback(hooks.cleanup)
        # After Opacus, which copies the layers that it gives to functorch, hooks and all.
        for name, part in self._module.named_modules():
            if not any(parameter.requires_grad for parameter in part.parameters(recurse=False)):
                continue
            if isinstance(part, nn.Embedding):
                self._handles.callback(part.register_forward_pre_hook(self._expand_positions).remove)
            self._handles.callback(part.register_forward_hook(partial(self._look, name)).remove)
        self._hooks = hooks
        return self

    def __exit__(self, *_: object) -> None:
        self._handles.close()

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Plain autograd for a while: for the loop that the probe compares with."""
        self._hooks.disable_hooks()
        self._records = 0
        try:
            yield
        finally:
            self._hooks.enable_hooks()

    def of(self, forward: Forward, records: int) -> dict[str, Tensor]:
        """Return (records, *shape) for each parameter, float32.

        Raises
        ------
        SensitivityError
            Where a trained layer does not see one row a record or is called twice, or a parameter gets no
            gradient.
        """
        self._records, self._calls = records, {}
        try:
            losses = forward()
            if losses.shape != (records,):
                raise SensitivityError("the loss is not one value a record.")
            losses.sum().backward()  # type: ignore[no-untyped-call]
            return {name: self._sample(name, parameter) for name, parameter in self.parameters.items()}
        finally:
            self._records = 0
            for parameter in self.parameters.values():
                parameter.grad = None
                parameter.grad_sample = None  # type: ignore[attr-defined]

    def _sample(self, name: str, parameter: nn.Parameter) -> Tensor:
        sample = getattr(parameter, "grad_sample", None)
        if not isinstance(sample, Tensor) or sample.shape != (self._records, *parameter.shape):
            raise SensitivityError(
                f"parameter {name!r} has no gradient for each record; train another part of the model."
            )
        if name in self._padding:
            sample[:, self._padding[name]] = 0.0
        return sample.float()

    def _expand_positions(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Give broadcast position ids (1, T) one row a record: else their gradient would count once a batch."""
        ids = inputs[0]
        if not self._records:
            return inputs
        return (
            ids.expand(self._records, -1).contiguous() if ids.dim() == 2 and ids.shape[0] == 1 else ids,
            *inputs[1:],
        )

    def _look(self, name: str, _: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        """Refuse a trained layer that is called twice, or on something whose first dimension is not the batch."""
        if not self._records:
            return
        self._calls[name] = self._calls.get(name, 0) + 1
        shape = inputs[0].shape if inputs and isinstance(inputs[0], Tensor) else ()
        if len(shape) < 2 or shape[0] != self._records:
            raise SensitivityError(
                f"layer {name!r} does not see one row a record: a record could count for more than the clipping norm."
            )
        if self._calls[name] > 1:
            raise SensitivityError(
                f"layer {name!r} is called twice in one pass; per-record gradients are not sure there."
            )


class ClippedSum:
    """The running sum of clipped per-record gradients of one step.

    Errors name layers and parameters and never a number of records: how many were drawn is private.
    """

    def __init__(self, gradients: PerRecordGradients, clipping: Clipping) -> None:
        self.clipping = clipping
        self.dropped = 0  # records whose gradient was not finite: counted here, and never sent
        self._gradients = gradients
        self._sums = {
            name: torch.zeros_like(value, dtype=torch.float32) for name, value in gradients.parameters.items()
        }

    def add(self, forward: Forward, records: int) -> Tensor:
        """Add the clipped gradients of the `records` records whose losses `forward` gives.

        Returns the norm (records,) that each contributed, for the probe.
        """
        samples = self._gradients.of(forward, records)
        norms = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples.values()]).norm(dim=0)
        factors = self.clipping.factors(norms)
        finite = torch.isfinite(norms)
        self.dropped += records - int(finite.sum())
        for name, sample in samples.items():
            kept = (
                sample if bool(finite.all()) else torch.where(finite.view(-1, *[1] * (sample.dim() - 1)), sample, 0.0)
            )
            self._sums[name] += torch.tensordot(factors, kept, dims=1)
        return torch.where(finite, norms, 0.0) * factors

    def sums(self) -> dict[str, Tensor]:
        """Return the clipped sum, not noised: it must not leave this process."""
        return self._sums

    def noised_mean(self, noise_multiplier: float, divisor: float, randomness: Keystream) -> dict[str, Tensor]:
        """Return (sum + noise) / divisor, the noise of deviation `noise_multiplier * clipping.norm`.

        `divisor` is the public expected batch, never the number of records drawn.
        """
        noised = {}
        for name, total in self._sums.items():
            if noise_multiplier > 0:
                noise = torch.from_numpy(randomness.normal(total.numel())).view(total.shape)
                total = (total.cpu().double() + noise_multiplier * self.clipping.norm * noise).float().to(total.device)
            noised[name] = total / divisor
        return noised


def train_only(module: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Let the named parameters of `module`, and no others, have gradients; return them."""
    wanted = set(names)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in wanted)
    return {name: parameter for name, parameter in module.named_parameters() if name in wanted}
