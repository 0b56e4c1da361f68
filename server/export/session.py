"""An ONNX file, called as transformers' classes are; this code stands in the cards of exports to ONNX."""

from types import SimpleNamespace

import onnxruntime
import torch


class Session:
    """Tensors by name in, logits out."""

    def __init__(self, file: str) -> None:
        self.session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        self.inputs = [each.name for each in self.session.get_inputs()]
        self.outputs = [each.name for each in self.session.get_outputs()]

    def __call__(self, **batch: torch.Tensor) -> SimpleNamespace:
        """Run it on a batch."""
        found = self.session.run(None, {name: batch[name].numpy() for name in self.inputs})
        return SimpleNamespace(
            **{name: torch.from_numpy(array) for name, array in zip(self.outputs, found, strict=True)}
        )
