"""The network of site_rounds.py as a class of transformers, so that a run can name a folder of it like any other model.

Importing this module makes transformers know the class: each process that loads the model imports it first.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.modeling_outputs import ImageClassifierOutput

sys.path.append(str(Path(__file__).parent / "peers"))

from cnn import LABELS, SIDE, Trunk


class SmallCnnConfig(transformers.PretrainedConfig):
    """Its sizes are fixed."""

    model_type = "small-cnn"


class SmallCnnForImageClassification(transformers.PreTrainedModel):
    """`cnn.Cnn`: a trunk, and a last layer."""

    config_class = SmallCnnConfig
    base_model_prefix = "cnn"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: SmallCnnConfig) -> None:
        super().__init__(config)
        self.cnn, self.classifier = Trunk(), torch.nn.Linear(128, config.num_labels)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """All weights come from a file."""

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> ImageClassifierOutput:
        """Return logits (B, labels)."""
        return ImageClassifierOutput(logits=self.classifier(self.cnn(pixel_values)))


transformers.AutoConfig.register(SmallCnnConfig.model_type, SmallCnnConfig)
transformers.AutoModelForImageClassification.register(SmallCnnConfig, SmallCnnForImageClassification)


def make_model(folder: Path, weights: Path) -> Path:
    """Write a model's folder with these weights, and give it."""
    network = SmallCnnForImageClassification(SmallCnnConfig(num_labels=LABELS))
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    transformers.ViTImageProcessorPil(size=size).save_pretrained(folder)
    return folder
