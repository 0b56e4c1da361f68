"""Each task's exports: what they are called, which plain code runs them, and how a card shows it.

A task that is not named here is exported all the same: its card says how to load it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from server.export.manifest import Manifest

LABEL = "print([labels[number] for number in run({example}).argmax(1).tolist()])"
LABELS = "print([[label for label, p in zip(labels, row, strict=True) if p > 0.5] for row in run({example}).sigmoid()])"
TEXTS = '["The first text.", "The second text."]'
IMAGES = '[Image.new("RGB", (32, 32))]'  # runs as it stands
SOUNDS = "[np.zeros(16000, dtype=np.float32)]"


@dataclass(frozen=True)
class Kind:
    """A task's exports.

    `said` is what such a model is, `tag` what the Hub calls its task, `plain` the module of `server.export.plain`, `roles`
    the columns whose values its function takes, in order, and `example` values for it. `graph`: whether one pass of the
    network is all that is needed, which an ONNX file holds.
    """

    said: str
    tag: str
    plain: str
    roles: tuple[str, ...]
    example: str
    use: str = LABEL
    imports: str = ""
    note: str = ""
    graph: bool = True


KINDS = {
    "text-classification": Kind("A text classifier", "text-classification", "texts", ("text", "pair"), TEXTS),
    "token-classification": Kind(
        "A tagger of words",
        "token-classification",
        "words",
        ("words",),
        '[["A", "first", "text", "."]]',
        use="print([[labels[number] for number in words.argmax(1).tolist()] for words in run({example})])",
    ),
    "question-answering": Kind(
        "A reader that answers questions by a span of a text",
        "question-answering",
        "answers",
        ("question", "context"),
        '["What is first?"], ["This is the first text."]',
        use="print(run({example}))",
    ),
    "image-classification": Kind(
        "An image classifier",
        "image-classification",
        "images",
        ("image",),
        IMAGES,
        imports="from PIL import Image\n",
        note='An image is one of Pillow: `Image.open("picture.jpg").convert("RGB")`.',
    ),
    "audio-classification": Kind(
        "A classifier of sound",
        "audio-classification",
        "sounds",
        ("audio",),
        SOUNDS,
        imports="import numpy as np\n",
        note="A clip is an array of samples, mono, at the feature extractor's `sampling_rate`.",
    ),
    "causal-lm": Kind(
        "A language model", "text-generation", "writing", ("prompt",), TEXTS, use="print(run({example}))", graph=False
    ),
    "seq2seq": Kind(
        "A model that writes a text for a text",
        "text2text-generation",
        "rewriting",
        ("source",),
        TEXTS,
        use="print(run({example}))",
        graph=False,
    ),
    "speech-to-text": Kind(
        "A model that writes down speech",
        "automatic-speech-recognition",
        "dictation",
        ("audio",),
        SOUNDS,
        use="print(run({example}))",
        imports="import numpy as np\n",
        note="A clip is an array of samples, mono, at the feature extractor's `sampling_rate`.",
        graph=False,
    ),
}


def of(manifest: Manifest) -> Kind | None:
    """Find a task's."""
    return KINDS.get(manifest.task)


def module(kind: Kind, manifest: Manifest) -> Any:
    """Import the plain code that runs an export."""
    pooled = manifest.head == "pooled" and manifest.format == "hf"  # an ONNX file holds our head too
    return import_module(f"server.export.plain.{'pooled' if pooled else kind.plain}")


def load(kind: Kind, manifest: Manifest, folder: str, model: Any) -> Callable[..., Any]:
    """Give the function from values to what the model makes of them."""
    found: Callable[..., Any] = module(kind, manifest).load(folder, model)
    return found


def use(kind: Kind, manifest: Manifest) -> str:
    """Give the card's line that runs the example."""
    line = LABELS if manifest.multi_label and kind.use == LABEL else kind.use
    return line.format(example=kind.example)
