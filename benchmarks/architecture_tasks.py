"""Made-up records, and what a module computes from a batch of them, for the rows of the sensitivity matrix.

Records have different lengths where the model takes a mask. The batches are chosen for what has gone wrong elsewhere: as
many records as tokens, a single record, and padding that a record has only beside longer ones. A module's forward takes
a batch and returns losses (B,), each of that record alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Record = dict[str, Tensor]  # one record, without a batch dimension
Batch = tuple[Tensor, ...]  # what a module's forward takes, each (B, ...), padded to the longest

VOCABULARY, PADDING, LABELS, SIDE, CHANNELS = 53, 1, 3, 16, 3
LENGTHS = (7, 5, 6, 4, 7, 3, 5, 6, 9, 4, 8)  # tokens of the records
BATCHES = ((0, 1, 2, 3, 4, 5, 6), (7,), (8, 9, 10))  # seven of at most seven tokens; one alone; three
TOKENS = ("input_ids", "attention_mask", "decoder_input_ids", "targets")  # what is padded to a width in tokens
FILLERS = {"input_ids": PADDING, "decoder_input_ids": PADDING, "targets": -100}  # others are padded with 0


@dataclass(frozen=True)
class Architecture:
    """One row of the matrix."""

    name: str
    family: str  # encoder, decoder, encoder-decoder, vision, audio, trap
    build: Callable[[], nn.Module]  # forward(*batch) -> losses (B,); float32, train mode, random weights
    examples: Callable[[Sequence[int], torch.Generator], list[Record]]  # one record of each length, in tokens
    note: str = ""  # what makes it hard
    coupled: bool = False  # its records depend on one another: every cell must be refused


def collate(records: Sequence[Record], width: int = 0) -> Batch:
    """Put records side by side, padded to the longest, and tokens to `width` at least; one alone is not padded."""
    return tuple(_stack(name, [record[name] for record in records], width) for name in records[0])


def _stack(name: str, values: list[Tensor], width: int) -> Tensor:
    if len({value.shape for value in values}) > 1 or (name in TOKENS and len(values[0]) < width):
        longest = max(len(value) for value in values)
        longest = max(longest, width) if name in TOKENS else longest
        padded = [nn.functional.pad(value, (0, longest - len(value)), value=FILLERS.get(name, 0)) for value in values]
        return torch.stack(padded)
    return torch.stack(values)


# -- records -------------------------------------------------------------------------------------------------


def texts(lengths: Sequence[int], generator: torch.Generator, labels: bool = True) -> list[Record]:
    """Token ids, their mask, and a label."""
    records = []
    for length in lengths:
        ids = _tokens(length, generator)
        record = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        records.append({**record, "label": _label(generator)} if labels else record)
    return records


def pairs(lengths: Sequence[int], generator: torch.Generator) -> list[Record]:
    """A text, and another of a length of its own to be generated."""
    records = texts(lengths, generator, labels=False)
    for number, record in enumerate(records):
        targets = _tokens(lengths[(number + 3) % len(lengths)], generator)
        record |= {"decoder_input_ids": torch.cat([torch.tensor([2]), targets[:-1]]), "targets": targets}
    return records


def images(lengths: Sequence[int], generator: torch.Generator, side: int = SIDE) -> list[Record]:
    """Pixels and a label."""
    return [
        {"pixels": torch.randn(CHANNELS, side, side, generator=generator), "label": _label(generator)} for _ in lengths
    ]


def sounds(lengths: Sequence[int], generator: torch.Generator) -> list[Record]:
    """Samples of a wave, of different lengths, their mask and a label."""
    records = []
    for length in lengths:
        wave = torch.randn(40 + 30 * length, generator=generator)
        mask = torch.ones(len(wave), dtype=torch.long)
        records.append({"values": wave, "heard": mask, "label": _label(generator)})
    return records


def spectrograms(lengths: Sequence[int], generator: torch.Generator, shape: tuple[int, int]) -> list[Record]:
    """Log-mel features of one shape, and a label."""
    return [{"pixels": torch.randn(*shape, generator=generator), "label": _label(generator)} for _ in lengths]


def transcripts(lengths: Sequence[int], generator: torch.Generator) -> list[Record]:
    """Log-mel features of one length, and a text of a length of its own."""
    records = []
    for length in lengths:
        targets = _tokens(length, generator)
        decoder_input = torch.cat([torch.tensor([2]), targets[:-1]])
        features = torch.randn(8, 24, generator=generator)
        records.append({"input_features": features, "decoder_input_ids": decoder_input, "targets": targets})
    return records


def _tokens(length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=generator)


def _label(generator: torch.Generator) -> Tensor:
    return torch.randint(LABELS, (), generator=generator)


# -- what a module computes from a batch -----------------------------------------------------------------------


class Classifier(nn.Module):
    """A backbone, the mean of its last hidden states over each record's own tokens, and a new linear head."""

    def __init__(self, backbone: Any, width: int) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.head = nn.Linear(width, LABELS)

    def features(self, *inputs: Tensor) -> Tensor:
        """Return (B, width)."""
        ids, mask = inputs
        return _mean(self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state, mask)

    def forward(self, *batch: Tensor) -> Tensor:
        """Return losses (B,)."""
        return nn.functional.cross_entropy(self.head(self.features(*batch[:-1])), batch[-1], reduction="none")


class ImageClassifier(Classifier):
    """The same on pixels or a spectrogram; a feature map's places are its tokens."""

    def features(self, *inputs: Tensor) -> Tensor:
        """Return (B, width)."""
        hidden: Tensor = self.backbone(inputs[0].to(self.head.weight.dtype)).last_hidden_state
        return hidden.flatten(2).mean(2) if hidden.dim() == 4 else hidden.mean(1)


class SpeechClassifier(Classifier):
    """The same on a wave; the mask of the samples becomes one of the frames."""

    def features(self, *inputs: Tensor) -> Tensor:
        """Return (B, width)."""
        wave, mask = inputs
        hidden = self.backbone(wave.to(self.head.weight.dtype), attention_mask=mask).last_hidden_state
        return _mean(hidden, self.backbone._get_feature_vector_attention_mask(hidden.shape[1], mask))


class LanguageModel(nn.Module):
    """A causal language model; a record's loss is the mean over its own tokens. Its head is its own."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return losses (B,)."""
        logits = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return _token_loss(logits[:, :-1], input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100))


class Translator(nn.Module):
    """An encoder-decoder; a record's loss is the mean over its own targets."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, targets: Tensor) -> Tensor:
        """Return losses (B,)."""
        output = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids, use_cache=False
        )
        return _token_loss(output.logits, targets)


class Transcriber(Translator):
    """The same from sound."""

    def forward(self, input_features: Tensor, decoder_input_ids: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        """Return losses (B,)."""
        features = input_features.to(next(self.parameters()).dtype)
        output = self.backbone(input_features=features, decoder_input_ids=decoder_input_ids, use_cache=False)
        return _token_loss(output.logits, targets)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def _token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return losses.sum(1) / (targets != -100).sum(1)
