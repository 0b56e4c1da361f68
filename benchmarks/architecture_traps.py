"""Small modules that have broken per-record gradients elsewhere, each for one reason, and two that must be refused.

Rows of the sensitivity matrix beside the architectures of benchmarks/architectures.py. What couples records
(batch normalisation, a loss over the batch, capacity limits of experts) has no per-record gradient: those are marked
`coupled`, and a cell that accepts them is a fault.
"""

from collections.abc import Callable
from functools import partial

import torch
from architectures import CHANNELS, LABELS, PADDING, SIDE, VOCABULARY, Architecture, images, texts
from torch import Tensor, nn

WIDTH = 16


class Head(nn.Module):
    """A backbone that gives features (B, WIDTH) from all inputs but the label, and a linear head."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(WIDTH, LABELS)

    def forward(self, *batch: Tensor) -> Tensor:
        """Return losses (B,)."""
        return nn.functional.cross_entropy(self.head(self.backbone(*batch[:-1])), batch[-1], reduction="none")


class FlattenedTokens(nn.Module):
    """Tokens of all records in one dimension, as OPT's feed-forward has them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH, padding_idx=PADDING)
        self.inner, self.outer = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (B, WIDTH)."""
        hidden = self.words(ids)
        flat = self.outer(nn.functional.gelu(self.inner(hidden.flatten(0, 1)))).view_as(hidden)
        return pooled(hidden + flat, mask)


class TokensFirst(nn.Module):
    """Tokens before the batch, as XLNet and wav2vec's positions have them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.linear = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (B, WIDTH)."""
        return pooled(torch.tanh(self.linear(self.words(ids.T))).transpose(0, 1), mask)


class PositionTable(nn.Module):
    """A bias of (T, T) from an embedding without a batch: of the batch's size where there are as many records as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bias, self.linear = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.Embedding(8, 1),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (B, WIDTH)."""
        hidden, places = self.words(ids), torch.arange(ids.shape[1])
        bias = self.bias((places[:, None] - places).abs().clamp(max=7)).squeeze(-1)  # (T, T)
        scores = (hidden @ hidden.transpose(1, 2) / 4 + bias).masked_fill(mask[:, None] == 0, -1e9)
        return pooled(self.linear(scores.softmax(-1) @ hidden), mask)


class WeightUsedTwice(nn.Module):
    """An embedding whose weight is also a linear layer's, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.linear = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (B, WIDTH)."""
        hidden = torch.tanh(self.linear(self.words(ids)))
        guess = nn.functional.linear(hidden, self.words.weight).softmax(-1)  # (B, T, VOCABULARY)
        return pooled(hidden + guess @ self.words.weight, mask)


class TiedHead(nn.Module):
    """A language model of one layer whose output head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.backbone = nn.Embedding(VOCABULARY, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return losses (B,)."""
        logits = self.head(self.backbone(self.words(ids)))[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return (losses * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)


class Permuted(nn.Module):
    """A convolution that is fed channels last, then one fed a transposed image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(CHANNELS, 8, 3, stride=2), nn.Conv2d(8, WIDTH, 3, groups=4)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, WIDTH)."""
        hidden = self.first(pixels.to(self.mix.weight.dtype).contiguous(memory_format=torch.channels_last))
        hidden = self.second(torch.tanh(hidden).transpose(2, 3))
        return self.mix(torch.tanh(hidden.permute(0, 2, 3, 1))).mean((1, 2))


class Windows(nn.Module):
    """Windows of an image in the batch's dimension, as Swin has them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS * 16, WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, WIDTH)."""
        pixels = pixels.to(self.linear.weight.dtype)
        windows = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, CHANNELS * 16)
        return torch.tanh(self.linear(windows)).view(len(pixels), -1, WIDTH).mean(1)


class InPlace(nn.Module):
    """A layer whose output is changed where it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.linear = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (B, WIDTH)."""
        hidden = self.linear(self.words(ids))
        hidden[mask == 0] = 0.0
        return pooled(torch.tanh(hidden), mask)


class Normalised(nn.Module):
    """Batch normalisation: a record's features depend on its neighbours'."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(CHANNELS * SIDE * SIDE, WIDTH), nn.BatchNorm1d(WIDTH, momentum=0.0)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, WIDTH); a single record has no variance, and goes with a twin."""
        hidden = self.linear(pixels.to(self.linear.weight.dtype).flatten(1))
        return self.norm(torch.cat([hidden, hidden]))[: len(pixels)]


class Contrasted(Head):
    """A loss over the batch: each record against the others, as CLIP is pretrained."""

    def forward(self, *batch: Tensor) -> Tensor:
        """Return losses (B,), each of them of all records."""
        guesses = self.head(self.backbone(*batch[:-1]))
        alike = nn.functional.normalize(guesses, dim=1) @ nn.functional.normalize(guesses, dim=1).T
        return nn.functional.cross_entropy(guesses, batch[-1], reduction="none") + alike.logsumexp(1)


class Crowded(nn.Module):
    """Experts with room for so many tokens of a batch: whether a token gets its expert depends on the others."""

    def __init__(self, room: int = 8) -> None:
        super().__init__()
        self.room = room
        self.words, self.gate = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (B, WIDTH)."""
        hidden = self.words(ids)
        weight = self.gate(hidden).softmax(-1)  # (B, T, 2)
        chosen = nn.functional.one_hot(weight.argmax(-1), 2) * mask.unsqueeze(-1)
        place = chosen.flatten(0, 1).cumsum(0).view_as(chosen)
        taken = (chosen * (place <= self.room)).to(hidden.dtype) * weight
        return pooled(
            hidden + sum(torch.tanh(each(hidden)) * taken[..., i : i + 1] for i, each in enumerate(self.experts)), mask
        )


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over each record's own tokens."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def _build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().train()


def _trap(name: str, make: Callable[[], nn.Module], records: object, note: str, coupled: bool = False) -> Architecture:
    return Architecture(name, "trap", partial(_build, make), records, note, coupled)


TRAPS: tuple[Architecture, ...] = (
    _trap("flattened tokens", lambda: Head(FlattenedTokens()), texts, "tokens of all records in one dimension"),
    _trap("tokens first", lambda: Head(TokensFirst()), texts, "tokens before the batch"),
    _trap("position table", lambda: Head(PositionTable()), texts, "a bias (T, T), with as many records as tokens"),
    _trap("weight used twice", lambda: Head(WeightUsedTwice()), texts, "F.linear on an embedding's weight"),
    _trap("tied head", TiedHead, partial(texts, labels=False), "the embedding is the output head"),
    _trap("channels last", lambda: Head(Permuted()), images, "Conv2d on strides that are not its own"),
    _trap("windows", lambda: Head(Windows()), images, "windows in the batch's dimension"),
    _trap("in place", lambda: Head(InPlace()), texts, "a layer's output changed where it lies"),
    _trap("batch norm", lambda: Head(Normalised()), images, "must be refused: records are coupled", coupled=True),
    _trap(
        "in-batch loss",
        lambda: Contrasted(PositionTable()),
        texts,
        "must be refused: records are coupled",
        coupled=True,
    ),
    _trap("crowded experts", lambda: Head(Crowded()), texts, "must be refused: capacity over the batch", coupled=True),
)
