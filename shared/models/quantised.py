"""A frozen base in four bits a weight: NormalFloat4 with a scale for every 64 weights (Dettmers et al. 2023, "QLoRA").

Only linear layers that stand still are packed, after everything else has been made of the weights as the file has them: the
digest that coordinator and sites compare, LoRA's singular vectors, an adapter's names. Norms, embeddings, biases and all
that is trained stay float32, and what is computed is as precise as it is without. bitsandbytes packs and unpacks.
"""

import logging
import sys
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import wrap_torch_function

from shared.errors import ModelError
from shared.models import places

BLOCK = 64  # weights that share a scale


class _Product(torch.autograd.Function):
    """x W', of a packed W: it is unpacked for the forward pass and again for the backward pass, and not kept between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "Packed") -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer: Packed = ctx.layer
        return gradients[0] @ layer.weight(gradients[0].dtype), None


@wrap_torch_function(lambda x, layer: (x,))  # noqa: ARG005 - the function's own arguments
def packed_linear(x: Tensor, layer: "Packed") -> Tensor:
    """Return x W' (..., out) of x (..., in); a function that the one-pass engine sees, as it sees torch's own."""
    out: Tensor = _Product.apply(x, layer)  # type: ignore[no-untyped-call]
    return out


class Packed(nn.Module):
    """A frozen linear layer in four bits a weight; its bias is as it was."""

    packed: Tensor
    scales: Tensor
    levels: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        from bitsandbytes import functional as four_bit

        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        # In rows of one block: on a CPU, bitsandbytes 0.50 takes blocks that reach over two rows for others.
        values = linear.weight.detach().flatten()
        values = F.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
        packed, state = four_bit.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
        self.register_buffer("packed", packed)
        self.register_buffer("scales", state.absmax)
        self.register_buffer("levels", state.code)

    def weight(self, kind: torch.dtype) -> Tensor:
        """Return the weight (out, in)."""
        from bitsandbytes import functional

        four_bit: Any = functional  # partly typed, and not always installed
        state = four_bit.QuantState(
            absmax=self.scales.float(),
            shape=torch.Size((self.scales.numel(), BLOCK)),
            code=self.levels.float(),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=torch.float32,
        )
        values: Tensor = four_bit.dequantize_4bit(self.packed, state).flatten()
        values = values[: self.out_features * self.in_features]
        return values.view(self.out_features, self.in_features).to(kind)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) of x (..., in), in the precision of the forward pass."""
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and x.is_floating_point() else x
        out = packed_linear(x, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)


@contextmanager
def installed_code_only() -> Iterator[None]:
    """Import bitsandbytes in here.

    Where the package `kernels` is installed, bitsandbytes would fetch compiled code from a hub and run it; a site runs the code
    that is installed on it, and no other.
    """
    advice = logging.getLogger("bitsandbytes")  # to install just that package
    level = advice.level
    advice.setLevel(logging.ERROR)
    try:
        with _hidden("kernels"):
            yield
    finally:
        advice.setLevel(level)


def apart_from_peft() -> AbstractContextManager[None]:
    """Import peft in here: it would bring bitsandbytes along, seconds before anything is trained, and nothing of ours needs that.

    What is packed is packed by `pack`, in layers that peft does not know.
    """
    return _hidden("bitsandbytes")


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Make a package one that cannot be found, unless it was imported before."""
    known = package in sys.modules
    if not known:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if not known:
            del sys.modules[package]


def pack(encoder: nn.Module, moving: Collection[str], name: str) -> None:
    """Pack the linear layers of `encoder` whose weights are not in `moving` (names inside it) nor used elsewhere.

    Raises
    ------
    ModelError
        Where bitsandbytes is missing, or there is no such layer.
    """
    try:
        with installed_code_only():
            import bitsandbytes  # noqa: F401
    except ImportError:
        raise ModelError(
            "model.base='4bit' needs bitsandbytes, which is not installed; `pip install moonflower[quantised]`, or set "
            "model.base='float32'."
        ) from None
    used: dict[int, int] = {}
    for part in encoder.modules():
        for parameter in part.parameters(recurse=False):
            used[id(parameter)] = used.get(id(parameter), 0) + 1
    found = [
        place
        for place in places.linear(encoder)
        if type(part := encoder.get_submodule(place)) is nn.Linear
        and f"{place}.weight" not in moving
        and used[id(part.weight)] == 1
    ]
    if not found:
        raise ModelError(f"model.base='4bit': {name} has no linear layer that stands still; set it to 'float32'.")
    for place in found:
        linear = encoder.get_submodule(place)
        assert isinstance(linear, nn.Linear)  # noqa: S101 - as it was found
        parent, _, own = place.rpartition(".")
        setattr(encoder.get_submodule(parent), own, Packed(linear))
