"""Trainable parameters as named arrays: what a checkpoint holds and what travels.

torch is imported by what touches a module, so that whoever only reads messages does without it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import nn

    Parameters = nn.Module | Mapping[str, nn.Parameter]  # a walk through a network's modules, or one made before

Arrays = dict[str, npt.NDArray[np.float32]]
Packed = npt.NDArray[np.uint8]  # (bytes,): a site's update, as `shared.compression` packs it
Update = Arrays | Packed  # a site's, as it travels


def read(source: "Parameters", names: Iterable[str]) -> Arrays:
    """Copy the named parameters out of a module, float32, in the order of `names`."""
    import torch

    parameters = _named(source)
    return {name: parameters[name].detach().to("cpu", torch.float32).numpy().copy() for name in names}


def write(target: "Parameters", arrays: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Set a module's parameters that `arrays` names, each of the same shape, and leave the others."""
    import torch

    parameters = _named(target)
    with torch.no_grad():
        for name, array in arrays.items():
            own = array if array.flags.writeable else array.copy()  # torch warns of what a message holds
            parameters[name].copy_(torch.from_numpy(own))


def _named(source: "Parameters") -> Mapping[str, "nn.Parameter"]:
    return source if isinstance(source, Mapping) else dict(source.named_parameters())


def difference(after: Arrays, before: Arrays) -> Arrays:
    """Return `after - before` for the names of `after`."""
    return {name: after[name] - before[name] for name in after}


def same_shapes(arrays: Mapping[str, npt.NDArray[np.float32]], expected: Mapping[str, npt.NDArray[np.float32]]) -> bool:
    """Whether both hold the same names with the same shapes."""
    return {name: array.shape for name, array in arrays.items()} == {
        name: array.shape for name, array in expected.items()
    }


def nbytes(arrays: Mapping[str, npt.NDArray[np.float32]]) -> int:
    """Size of the values in bytes."""
    return sum(array.nbytes for array in arrays.values())


def digest(arrays: Mapping[str, npt.NDArray[np.float32]]) -> str:
    """SHA-256 over names, shapes and little-endian values, in the order of the names; hexadecimal."""
    state = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], dtype="<f4", order="C")
        state.update(f"{name}\0{array.shape}\0".encode())
        state.update(array.data)
    return state.hexdigest()
