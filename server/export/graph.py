"""An export as one ONNX file, for onnxruntime: any number of records, of any length where records have one; or its int8 form.

In int8 the weights of products and of embeddings are whole numbers of eight bits; what is computed on is rounded as it
comes (dynamic quantisation), so that no data is needed to make it.
"""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared.errors import ModelError
from shared.models import LoadedModel, Network, Pooled
from shared.models.sources import first_line
from shared.tasks.base import Batch

if TYPE_CHECKING:
    from server.export.session import Session

FILE = "model.onnx"
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
QUANTISED = ("MatMul", "Gather")  # products and embeddings; a convolution of eight bits is not known on every processor
LARGEST = 1_500_000_000  # bytes of weights inside of the file, which can hold 2 GB


def check_packages() -> None:
    """Refuse where what writes and runs ONNX is not installed, before any work.

    Raises
    ------
    ModelError
        Naming what is missing.
    """
    from importlib.util import find_spec

    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"ONNX needs the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}; pip install 'moonflower[onnx]'."
        )


class _Pass(nn.Module):
    """One pass of a network, its inputs by place and its outputs as a tuple, as the exporter takes them."""

    def __init__(self, network: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.inputs, self.outputs = network, inputs, outputs

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        found = self.network(**dict(zip(self.inputs, values, strict=True)))
        return (found,) if isinstance(found, Tensor) else tuple(getattr(found, name) for name in self.outputs)


def pooled(encoder: nn.Module, model: LoadedModel) -> Pooled:
    """Put our head on an exported encoder."""
    head = model.module.head
    whole = Pooled(encoder, head.in_features, head.out_features, model.module.feature_scale)
    whole.head.load_state_dict(head.state_dict())
    return whole.eval()


def write(file: Path, network: nn.Module, batch: Batch, outputs: tuple[str, ...], *, lengths: bool) -> None:
    """Write one pass of `network` on a batch like this one.

    Parameters
    ----------
    batch
        Inputs by name, of at least two records: what is 1 in it would be 1 for good.
    lengths
        Whether the second axis of each input may have any length.

    Raises
    ------
    ModelError
        Where the network cannot be written as ONNX.
    """
    import onnxscript  # noqa: F401 - the exporter's own, which it says less clearly

    names, size = tuple(batch), sum(value.nbytes for value in network.parameters())
    every = torch.export.Dim("batch")
    length = torch.export.Dim("length", min=2)
    shape = {0: every, 1: length} if lengths else {0: every}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's remarks on itself
            made = torch.onnx.export(
                _Pass(network, names, outputs),
                tuple(batch.values()),
                input_names=list(names),
                output_names=list(outputs),
                dynamic_shapes={"values": tuple(dict(shape) for _ in names)},
                dynamo=True,
                verbose=False,
            )
            if made is None:
                raise ModelError("the exporter gave no ONNX program.")
            made.save(str(file), external_data=size > LARGEST)
    except Exception as error:  # torch's exporter's, which have no common kind
        if isinstance(error, ModelError | OSError):
            raise
        raise ModelError(
            f"this model cannot be written as ONNX: {_last_line(error)}; export it with --format hf."
        ) from error
    finally:
        logger.setLevel(level)


def quantise(file: Path) -> tuple[int, int]:
    """Make an ONNX file's weights int8; return the bytes before and after."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before, whole = file.stat().st_size, file.with_name("float32.onnx")
    file.rename(whole)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends a preparation, which changes nothing here
    try:
        quantize_dynamic(whole, file, weight_type=QuantType.QInt8, op_types_to_quantize=list(QUANTISED))
    finally:
        root.setLevel(level)
    whole.unlink()
    return before, file.stat().st_size


def session(file: Path) -> "Session":
    """Open an ONNX file.

    Raises
    ------
    ModelError
        Where onnxruntime is not installed, or the file is none.
    """
    check_packages()
    from server.export.session import Session

    try:
        return Session(str(file))
    except Exception as error:  # onnxruntime's own, which have no common kind
        raise ModelError(f"{file} cannot be loaded: {first_line(error)}") from None


class Run(Network):
    """An ONNX file in the place of a run's network, to be scored as that is."""

    def __init__(self, session: "Session", tensor: bool) -> None:
        super().__init__()
        self._run, self._tensor = session, tensor
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)  # tells the device and the precision

    def forward(self, **inputs: Tensor) -> Any:
        """Return what the run's network does: logits alone, or a class of transformers' outputs."""
        found = self._run(**inputs)
        return found.logits if self._tensor else found


def two(batch: Mapping[str, Tensor]) -> Batch:
    """Put a record beside itself."""
    return {name: torch.cat([value, value]) for name, value in batch.items()}


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("(Refer")]
    cause = error.__cause__
    if cause is not None and str(cause).strip():
        return str(cause).strip().splitlines()[0]
    return lines[0] if lines else type(error).__name__
