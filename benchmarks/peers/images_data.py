"""The records of site_rounds.py: scikit-learn's digits, enlarged to 28 x 28 and moved, dealt out to sites by a seed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from cnn import LABELS, SIDE, Cnn

TEST = 300  # public test records, of digits that no site has


@dataclass(frozen=True)
class Digits:
    """Images (N, 28, 28, 3), and labels (N,)."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


def make(work: Path, sites: int, each: int) -> Digits:
    """Write the sites' records, `each` a site, and the first weights; return the test records."""
    from sklearn.datasets import load_digits

    draw = np.random.default_rng(0)
    found = load_digits()
    large = found.images.repeat(3, axis=1).repeat(3, axis=2)  # 24 x 24
    order = draw.permutation(len(large))
    test, train = order[:TEST], order[TEST:]
    held = _moved(large, found.target, draw.choice(train, sites * each), draw)
    np.save(work / "images.npy", held.images)
    np.save(work / "labels.npy", held.labels)
    np.save(work / "starts.npy", np.arange(sites + 1) * each)
    torch.manual_seed(0)
    network = Cnn()
    for part in network.modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.xavier_uniform_(part.weight)
    torch.save(network.state_dict(), work / "initial.pt")
    return _moved(large, found.target, test, draw)


def _moved(
    large: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int64],
    chosen: npt.NDArray[np.int64],
    draw: np.random.Generator,
) -> Digits:
    """Lay the chosen digits somewhere on 28 x 28, grey as three colours."""
    images = np.zeros((len(chosen), SIDE, SIDE), dtype=np.uint8)
    for row, number in enumerate(chosen):
        top, left = draw.integers(0, SIDE - large.shape[1] + 1, size=2)
        images[row, top : top + 24, left : left + 24] = large[number] * 15.9
    assert labels.max() < LABELS
    return Digits(images[..., None].repeat(3, axis=3), labels[chosen].astype(np.int64))
