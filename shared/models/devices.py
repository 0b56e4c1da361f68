"""Where a model runs, and in which precision its forward pass."""

import torch

from shared.errors import ModelError


def pick_device(wanted: str) -> torch.device:
    """Return the device that `auto`, `cpu`, `cuda` or `cuda:N` names.

    Raises
    ------
    ModelError
        Where the machine has no such device.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ModelError(f"device={wanted!r} is not a device; use auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device={wanted!r} is not on this machine, which has {torch.cuda.device_count()} CUDA devices; use auto or cpu."
        )
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context of a forward pass: bfloat16 or float16 where asked for, bfloat16 where `auto` finds that it is quick.

    A CPU is quick at it with matrix tiles (AMX), a GPU from Ampere on. Norms, sums and noise are float32
    in any case.
    """
    if precision == "auto":
        quick = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else torch.cpu._is_amx_tile_supported()
        )
    else:
        quick = precision != "float32"
    kind = torch.float16 if precision == "float16" else torch.bfloat16
    return torch.autocast(device.type, dtype=kind, enabled=quick)
