"""What every task tells: which columns a record has, how it is kept and batched, its loss, and how it is scored.

The record is the unit. Everything here that pads or groups is a function of one record alone; a loss is one value a
record; and a score is post-processing of counts to which each record adds a vector of bounded norm.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.errors import ConfigError
from shared.metrics import Counts, Score
from shared.run_config import Loss

if TYPE_CHECKING:
    from shared.examples import Examples
    from shared.models import LoadedModel
    from shared.run_config import Hardware, RunConfig

Encoded = dict[str, npt.NDArray[Any]]  # what is kept of one record, or of one chunk of it
Chunks = list[Encoded]  # of one record: rows of the network that count as one, at least one
Width = tuple[int, ...]  # what the padded axes of a record are padded to
Batch = dict[str, Tensor]  # records side by side, (B, ...) each
Uniform = Callable[[int], npt.NDArray[np.float64]]  # so many numbers in [0, 1)

# What each gives is in `shared.record_kinds`: an image is a `shared.media.Image` (.open() gives a PIL image, RGB), audio a
# `shared.media.Clip` (.samples(rate) gives float32 (T,), one channel), answers {"text": (..), "answer_start": (..)}, and
# messages a tuple of {"role", "content"}.
Kind = Literal["text", "label", "labels", "words", "tags", "answers", "image", "audio", "messages"]
BUCKET = 16  # tokens


@dataclass(frozen=True)
class Column:
    """A column of a record: what it holds (see `shared.records`), and whether every record must have it."""

    kind: Kind
    needed: bool = True


@dataclass(frozen=True)
class Measured:
    """What records add to the counts: for each, the flat `cells` (B, m), all different, and the `amounts` (B, m).

    A record's amounts have an L2 norm of at most the task's `sensitivity`; whoever sums them clips to it.
    """

    cells: npt.NDArray[np.int64]
    amounts: npt.NDArray[np.float64]


class Task(ABC):
    """One thing that a model can learn to do.

    Attributes
    ----------
    name
        What `task.name` says.
    columns
        Role -> column, of the records. A site maps roles to the columns of its own file.
    model
        How the network is put together: `pooled` is our own head on the mean of an encoder's last hidden states;
        `native` is transformers' class with its last linear layer apart, as head; `whole` is that class as it is.
    auto
        Name of transformers' class for the last two.
    head
        Of a `whole` model: the name of its last layer, where that can be trained alone.
    processor, processor_options
        Name of transformers' class for what makes numbers of a record.
    inputs
        Names of a batch that the network takes; the others are for the loss.
    axes
        How many axes of a record are padded: 0, 1, or 2 (the input's and the target's).
    features
        Whether a head's input is one vector a record, which is computed once while the encoder stands still.
    chunks
        Whether a long record is cut in several rows, which count as one.
    classifies
        Whether the labels are the network's outputs.
    augments
        Whether `augmented` changes records at random.
    """

    name: ClassVar[str]
    columns: ClassVar[Mapping[str, Column]]
    model: Literal["pooled", "native", "whole"] = "native"
    auto: ClassVar[str] = ""
    head: ClassVar[str] = ""
    processor: ClassVar[str] = "AutoTokenizer"
    processor_options: ClassVar[Mapping[str, Any]] = {}
    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")
    axes: ClassVar[int] = 1
    features: ClassVar[bool] = False
    chunks: ClassVar[bool] = False
    classifies: ClassVar[bool] = True
    weighable: ClassVar[bool] = False
    augments: ClassVar[bool] = False

    def __init__(self, config: "RunConfig") -> None:
        self.config, self.settings = config, config.task
        self.bins = config.evaluation.confidence_bins  # of a score; the coordinator counts public records in finer ones
        if self.classifies and len(self.settings.labels) < 2:
            raise ConfigError(
                f"task.labels={list(self.settings.labels)}: {self.name} needs at least two; list all that a record can have."
            )
        if not self.classifies and self.settings.labels:
            raise ConfigError(f"task.labels={list(self.settings.labels)}: {self.name} has no labels; leave them out.")
        if config.loss != Loss() and not self.weighable:
            raise ConfigError(f"[loss] is for tasks that classify records, and {self.name} does not; leave it out.")
        if config.augmentation.multiplicity and not self.augments:
            raise ConfigError(
                f"augmentation.multiplicity={config.augmentation.multiplicity}: {self.name} has no random changes of records; "
                "set it to 0."
            )

    def adjust(self, settings: Any) -> None:  # noqa: B027 - most tasks have nothing to change
        """Change the model's configuration, as transformers read it, before the model is made."""

    def fit(self, encoder: Any, processor: Any) -> None:  # noqa: B027 - most tasks have nothing to change
        """Take from the loaded network and processor what the task needs of them, or change them; adapters come later.

        Raises
        ------
        ModelError
            Where they are not for this task.
        """

    # Records

    def fault(self, values: Mapping[str, Any]) -> str | None:  # noqa: ARG002 - of a subclass
        """Say what is wrong with a record whose columns are each right by themselves."""
        return None

    @abstractmethod
    def encode(self, values: Mapping[str, Any], processor: Any) -> Encoded | Chunks:
        """Make what is kept of one record: arrays, of which the first axis may differ from record to record.

        A task with `chunks` may cut a long record, each chunk a row for the network (not where features are kept). Its
        loss is their mean; `measure` gets all of a record's chunks together, in order, and gives it one vector.

        What it gives follows from the record, `self.settings`, plain values that are the task's own, and the processor: by
        these it is found again in a site's cache.
        """

    @abstractmethod
    def stand_in(self, values: Mapping[str, Any]) -> Encoded:
        """What is kept of a record that the run's processor cannot take: nobody outside may notice that there is one."""

    @abstractmethod
    def width(self, encoded: Encoded) -> Width:
        """What the record is padded to, `axes` numbers, from its own lengths alone."""

    @abstractmethod
    def collate(self, records: Sequence[Encoded], width: Width, processor: Any) -> Batch:
        """Put records side by side, padded to `width`; on the CPU."""

    def augmented(self, encoded: Encoded, uniform: Uniform, processor: Any) -> Encoded:  # noqa: ARG002 - of a subclass
        """Change a record at random, by `config.augmentation`: what it shows stays, and so does its width."""
        return encoded

    def targets_of(self, fields: Mapping[str, Any], device: torch.device) -> Tensor:
        """All rows' labels, of a task whose features are kept."""
        values = np.asarray(fields["labels"].values) if fields else np.zeros(0, dtype=np.int64)
        return torch.from_numpy(values).to(device)

    # Training

    @abstractmethod
    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Return (B,), double: each record's own loss, whatever the others are."""

    def objective(self, outputs: Any, batch: Batch, loss: Loss, weights: Tensor | None) -> Tensor:  # noqa: ARG002 - of a subclass
        """Return (B,), double: what training minimises of each record; `weights` are the labels' that a request gives."""
        return self.losses(outputs, batch)

    # Scores

    @property
    @abstractmethod
    def cells(self) -> tuple[int, ...]:
        """Shape of the counts."""

    @property
    def sensitivity(self) -> float:
        """L2 norm that one record's vector of amounts has at most."""
        return 1.0

    @abstractmethod
    def measure(self, outputs: Any, batch: Batch) -> Measured:
        """Place records in the counts, each once."""

    @abstractmethod
    def scores(self, counts: Counts, noise: float) -> list[Score]:
        """Scores of counts (`cells`), each with Gaussian noise of deviation `noise`; the most telling one first."""

    def public_scores(
        self,
        model: "LoadedModel",  # noqa: ARG002 - of a subclass, as the others
        values: Sequence[Mapping[str, Any]],  # noqa: ARG002
        examples: "Examples",  # noqa: ARG002
        hardware: "Hardware",  # noqa: ARG002
    ) -> list[Score]:
        """Scores of public records that counts cannot tell, as of what the model writes: the coordinator's alone.

        `values` are the records as they were read, `examples` the same encoded.
        """
        return []

    # Made-up records, for the probe

    @abstractmethod
    def made_up(self, length: int, uniform: Uniform, processor: Any) -> Encoded:
        """A record of the given length (where records have one), made of random numbers."""

    def unlikely(self, outputs: Any, batch: Batch) -> dict[str, npt.NDArray[Any]]:  # noqa: ARG002 - of a subclass
        """Targets that the network holds for unlikely, by field: where it is sure of them, there is no gradient."""
        return {}

    @abstractmethod
    def widest(self, processor: Any) -> Encoded:
        """The largest record that there can be, of the highest values that the processor gives."""

    def padded(self, length: int) -> Width:
        """Width of records padded to `length`."""
        return (length,) * self.axes


def bucket(length: int) -> int:
    """Length that a record's axis is padded to: the next multiple of 16."""
    return max(1, -(-length // BUCKET)) * BUCKET


def pad(arrays: Sequence[npt.NDArray[Any]], width: int, value: float = 0) -> Tensor:
    """Stack arrays (T_i, ...) as (B, width, ...), filled up with `value`."""
    first = arrays[0]
    filled = np.full((len(arrays), width, *first.shape[1:]), value, dtype=first.dtype)
    for row, array in enumerate(arrays):
        filled[row, : len(array)] = array
    return torch.from_numpy(filled)


def mask(arrays: Sequence[npt.NDArray[Any]], width: int) -> Tensor:
    """(B, width): 1 where an array has a value, 0 where it is filled up."""
    lengths = torch.tensor([len(array) for array in arrays])
    return (torch.arange(width) < lengths.unsqueeze(1)).long()


def per_record(losses: Tensor, mask: Tensor) -> Tensor:
    """Mean (B,) of losses (B, T) over the places that `mask` (B, T) keeps; 0 where it keeps none."""
    weights = mask.to(losses.dtype)
    return (losses * weights).sum(1) / weights.sum(1).clamp_min(1)


def shares(values: npt.NDArray[np.float64]) -> Measured:
    """Place (B, m) numbers in [0, 1] in m cells and a 1 in one more, all over sqrt(m + 1): sums of them give means."""
    rows, kinds = values.shape
    amounts = np.concatenate([np.clip(np.nan_to_num(values), 0, 1), np.ones((rows, 1))], axis=1) / math.sqrt(kinds + 1)
    return Measured(np.tile(np.arange(kinds + 1), (rows, 1)), amounts)
