"""What all sides of site_rounds.py share: the network, its input, and one site's local work in plain PyTorch.

The network is pfl-research's `simple_cnn` (two convolutions of 32 and 64, pooling, 128 hidden units; 1.2 million parameters on
28 x 28), without its dropout, because Moonflower trains without. Only torch and numpy are imported: the peers have
environments of their own.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE, LABELS = 28, 10
BATCH, RATE = 10, 0.1  # of the local steps, as pfl-research's configuration has them


class Trunk(nn.Module):
    """Everything but the last layer: images (B, 3, 28, 28) to (B, 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3)
        self.hidden = nn.Linear(64 * ((SIDE - 4) // 2) ** 2, 128)

    def forward(self, images: Tensor) -> Tensor:
        """Compute with the colours last, which convolutions and pooling on a CPU are quickest with."""
        images = images.contiguous(memory_format=torch.channels_last)
        found = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(images)))), 2)
        return F.relu(self.hidden(found.flatten(1)))


class Cnn(nn.Module):
    """The whole: images to logits (B, 10). The names of its parameters are the same on all sides."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn, self.classifier = Trunk(), nn.Linear(128, LABELS)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.classifier(self.cnn(images))
        return logits


def initial(work: Path) -> Cnn:
    """Return the network with the weights that all sides begin with."""
    network = Cnn()
    network.load_state_dict(torch.load(work / "initial.pt", weights_only=True))
    return network


def pixels(images: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> Tensor:
    """Turn bytes (N, 28, 28, 3) into what the network reads (N, 3, 28, 28), from -1 to 1."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


class Records:
    """The records of all sites, mapped into memory; those of site i lie from `starts[i]` to `starts[i + 1]`."""

    def __init__(self, work: Path) -> None:
        self._images = np.load(work / "images.npy", mmap_mode="r")
        self._labels = np.load(work / "labels.npy")
        self._starts = np.load(work / "starts.npy")

    def __len__(self) -> int:
        """How many sites there are."""
        return len(self._starts) - 1

    def of(self, site: int) -> tuple[Tensor, Tensor]:
        """Return a site's images and labels, ready for the network."""
        own = slice(self._starts[site], self._starts[site + 1])
        return pixels(self._images[own]), torch.from_numpy(self._labels[own])


def ended(work: Path, side: str, time: float) -> None:
    """Note when a round of a side ended, by the system's clock."""
    with (work / f"{side}.times").open("a", encoding="utf-8") as file:
        file.write(f"{time:.6f}\n")
