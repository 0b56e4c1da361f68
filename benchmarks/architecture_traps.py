"""Small modules that break per-record gradients, each in one way, and some whose records are coupled.

Rows of the sensitivity matrix beside the architectures of benchmarks/architectures.py. Some are what a library's model
does somewhere inside, here alone; some are what users write. Where records lie in another order, or a layer's rows are
not so many for each record, a gradient can be booked on the wrong record: such a cell is right or refused, never
wrong. What couples records (a batch's statistics, a loss over the batch, room for so many tokens) has no per-record
gradient at all: those are marked `coupled`, and a cell that accepts them is a fault.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from architecture_tasks import CHANNELS, LABELS, PADDING, SIDE, VOCABULARY, Architecture, images, texts
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
        return self._losses(self.head(self.backbone(*batch[:-1])), batch[-1])

    def _losses(self, guesses: Tensor, labels: Tensor) -> Tensor:
        """Return (B,), of guesses (B, LABELS)."""
        return nn.functional.cross_entropy(guesses, labels, reduction="none")


class Words(nn.Module):
    """An embedding, a linear layer, and the mean over each record's own tokens; what is between them is the trap."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.linear = nn.Embedding(VOCABULARY, WIDTH, padding_idx=PADDING), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return (B, WIDTH)."""
        weight = mask.unsqueeze(-1).to(self.linear.weight.dtype)
        return (self._mix(self.words(ids), mask) * weight).sum(1) / weight.sum(1)

    def _mix(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return (B, T, WIDTH), of hidden (B, T, WIDTH) and mask (B, T)."""
        raise NotImplementedError


# -- right or refused ------------------------------------------------------------------------------------------


class FlattenedTokens(Words):
    """Tokens of all records in one dimension, as OPT's feed-forward has them."""

    def _mix(self, hidden: Tensor, _: Tensor) -> Tensor:
        return torch.tanh(self.linear(hidden.flatten(0, 1))).view_as(hidden)


class TokensFirst(Words):
    """Tokens before the batch, as XLNet has them."""

    def _mix(self, hidden: Tensor, _: Tensor) -> Tensor:
        return torch.tanh(self.linear(hidden.transpose(0, 1))).transpose(0, 1)


class WithoutPadding(Words):
    """Only the tokens that are not padding, one after the other."""

    def _mix(self, hidden: Tensor, mask: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        out[mask == 1] = torch.tanh(self.linear(hidden[mask == 1]))
        return out


class TwoTexts(Words):
    """Two texts of each record, all first ones before all second ones, as sentence pairs are often encoded."""

    def _mix(self, hidden: Tensor, _: Tensor) -> Tensor:
        first, second = torch.tanh(self.linear(torch.cat([hidden, hidden.flip(2)]))).chunk(2)
        return first * second


class SortedByLength(Words):
    """Records in another order inside, as packed sequences are."""

    def _mix(self, hidden: Tensor, mask: Tensor) -> Tensor:
        order = mask.sum(1).argsort(stable=True)
        return torch.tanh(self.linear(hidden[order]))[order.argsort()]


class Recurrent(Words):
    """A recurrent layer, whose weights are used at each token."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def _mix(self, hidden: Tensor, _: Tensor) -> Tensor:
        out: Tensor = self.recurrent(self.linear(hidden))[0]
        return out


class PositionTable(Words):
    """A bias of (T, T) from an embedding without a batch: of the batch's size where there are as many records as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(8, 1)

    def _mix(self, hidden: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(hidden.shape[1])
        bias = self.bias((places[:, None] - places).abs().clamp(max=7)).squeeze(-1)  # (T, T)
        scores = (hidden @ hidden.transpose(1, 2) / 4 + bias).masked_fill(mask[:, None] == 0, -1e9)
        out: Tensor = self.linear(scores.softmax(-1) @ hidden)
        return out


class WeightUsedTwice(Words):
    """An embedding whose weight is also a linear layer's, by hand."""

    def _mix(self, hidden: Tensor, _: Tensor) -> Tensor:
        guess = nn.functional.linear(torch.tanh(self.linear(hidden)), self.words.weight).softmax(-1)
        return hidden + guess @ self.words.weight


class InPlace(Words):
    """A layer whose output is changed where it lies, as wav2vec's padding is."""

    def _mix(self, hidden: Tensor, mask: Tensor) -> Tensor:
        out = self.linear(hidden)
        out[mask == 0] = 0.0
        return torch.tanh(out)


class TiedHead(nn.Module):
    """A language model of one layer whose output head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH, padding_idx=PADDING)
        self.backbone = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
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
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, WIDTH)."""
        hidden = self.first(pixels.to(self.linear.weight.dtype).contiguous(memory_format=torch.channels_last))
        hidden = self.second(torch.tanh(hidden).transpose(2, 3))
        out: Tensor = self.linear(torch.tanh(hidden.permute(0, 2, 3, 1)))
        return out.mean((1, 2))


class Windows(nn.Module):
    """Windows of an image in the batch's dimension: each record's together, as in Swin, or each place's."""

    def __init__(self, places_first: bool) -> None:
        super().__init__()
        self.places_first = places_first
        self.linear = nn.Linear(CHANNELS * 16, WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, WIDTH)."""
        pixels = pixels.to(self.linear.weight.dtype)
        windows = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        if self.places_first:
            windows = windows.transpose(0, 1)
        hidden = torch.tanh(self.linear(windows.flatten(0, 1))).view(*windows.shape[:2], WIDTH)
        return hidden.mean(0 if self.places_first else 1)


# -- must be refused -------------------------------------------------------------------------------------------


class Normalised(nn.Module):
    """Batch normalisation: a record's features depend on its neighbours'."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(CHANNELS * SIDE * SIDE, WIDTH), nn.BatchNorm1d(WIDTH, momentum=0.0)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, WIDTH); a single record has no variance, and goes with a twin."""
        hidden = self.linear(pixels.to(self.linear.weight.dtype).flatten(1))
        out: Tensor = self.norm(torch.cat([hidden, hidden]))
        return out[: len(pixels)]


class Contrasted(Head):
    """A loss over the batch: each record against the others, as CLIP is pretrained."""

    def _losses(self, guesses: Tensor, labels: Tensor) -> Tensor:
        alike = nn.functional.normalize(guesses, dim=1) @ nn.functional.normalize(guesses, dim=1).T
        return super()._losses(guesses, labels) + alike.logsumexp(1)


class Averaged(Head):
    """The mean over the batch: a record's gradient depends on how many others there are."""

    def _losses(self, guesses: Tensor, labels: Tensor) -> Tensor:
        return super()._losses(guesses, labels) / len(guesses)


class Crowded(Words):
    """Experts with room for so many tokens of a batch: whether a token gets its expert depends on the others."""

    def __init__(self, room: int = 8) -> None:
        super().__init__()
        self.room = room
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def _mix(self, hidden: Tensor, mask: Tensor) -> Tensor:
        weight = self.linear(hidden)[..., :2].softmax(-1)  # (B, T, 2)
        chosen = nn.functional.one_hot(weight.argmax(-1), 2) * mask.unsqueeze(-1)
        place = chosen.flatten(0, 1).cumsum(0).view_as(chosen)
        taken = (chosen * (place <= self.room)).to(hidden.dtype) * weight
        for i, each in enumerate(self.experts):
            hidden = hidden + torch.tanh(each(hidden)) * taken[..., i : i + 1]
        return hidden


class Quantised(Words):
    """Activations rounded on a scale that the largest of the batch sets."""

    def _mix(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.linear(hidden))
        scale = (hidden * mask.unsqueeze(-1)).abs().max().detach() / 7
        return hidden + ((hidden / scale).round() * scale - hidden).detach()


class PaddingCounted(Words):
    """The mean over padding too: a record's features depend on the longest beside it."""

    def forward(self, ids: Tensor, _: Tensor) -> Tensor:
        """Return (B, WIDTH)."""
        return torch.tanh(self.linear(self.words(ids))).mean(1)


# -- the rows --------------------------------------------------------------------------------------------------


def _build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().train()


def _trap(name: str, make: Callable[[], nn.Module], note: str, records: Any = texts) -> Architecture:
    return Architecture(name, "trap", partial(_build, make), records, note)


def _coupled(name: str, make: Callable[[], nn.Module], note: str, records: Any = texts) -> Architecture:
    return Architecture(name, "trap", partial(_build, make), records, f"must be refused: {note}", coupled=True)


TRAPS: tuple[Architecture, ...] = (
    _trap("flattened tokens", lambda: Head(FlattenedTokens()), "tokens of all records in one dimension"),
    _trap("tokens first", lambda: Head(TokensFirst()), "tokens before the batch"),
    _trap("without padding", lambda: Head(WithoutPadding()), "rows by the number of tokens"),
    _trap("two texts", lambda: Head(TwoTexts()), "all first texts before all second ones"),
    _trap("sorted by length", lambda: Head(SortedByLength()), "records in another order inside"),
    _trap("recurrent", lambda: Head(Recurrent()), "weights used at each token"),
    _trap("position table", lambda: Head(PositionTable()), "a bias (T, T), with as many records as tokens"),
    _trap("weight used twice", lambda: Head(WeightUsedTwice()), "F.linear on an embedding's weight"),
    _trap("tied head", TiedHead, "the embedding is the output head", partial(texts, labels=False)),
    _trap("in place", lambda: Head(InPlace()), "a layer's output changed where it lies"),
    _trap("channels last", lambda: Head(Permuted()), "Conv2d on strides that are not its own", images),
    _trap("windows", lambda: Head(Windows(places_first=False)), "windows in the batch's dimension", images),
    _trap("windows, places first", lambda: Head(Windows(places_first=True)), "the same, records interleaved", images),
    _coupled("batch norm", lambda: Head(Normalised()), "the batch's mean and variance", images),
    _coupled("in-batch loss", lambda: Contrasted(FlattenedTokens()), "each record against the others"),
    _coupled("mean over the batch", lambda: Averaged(FlattenedTokens()), "the loss is divided by the batch"),
    _coupled("crowded experts", lambda: Head(Crowded()), "room for so many tokens of a batch"),
    _coupled("quantised", lambda: Head(Quantised()), "the batch's largest activation sets the scale"),
    _coupled("padding counted", lambda: Head(PaddingCounted()), "the longest beside it sets the mean"),
)
