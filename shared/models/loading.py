"""Load a run's model, the same on every machine for the same configuration, ready to be trained.

Dropout is off: under privacy the noise regularises, and the probe needs a function.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers.utils import logging as transformers_logging

from shared import tasks
from shared.arrays import Arrays, digest
from shared.arrays import read as read_arrays
from shared.errors import ConfigError, ModelError
from shared.models import quantised, trainable
from shared.models.networks import HEAD, Native, Network, Pooled, Whole
from shared.models.sources import from_pretrained, locate
from shared.run_config import RunConfig
from shared.tasks.base import BUCKET, Batch, Task

FEW = 4  # tokens of a record that is only to go through
SHORT = 512  # tokens up to which plain attention is quicker on a CPU than torch's fused one, backwards by half


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be trained: its module in train mode, and the names of what is trained and sent.

    `exchanged` is `trainable` and, for LoRA, A where it is frozen: the coordinator chooses it, so no site has to
    repeat its random draw or its singular vectors to the bit. `head` are those of `trainable` that a phase of the head
    alone trains; where the task has no head, there are none.
    """

    module: Network
    task: Task
    processor: Any
    trainable: tuple[str, ...]
    exchanged: tuple[str, ...]
    head: tuple[str, ...]
    base_digest: str  # of every parameter that is not exchanged

    def names(self, phase: str) -> tuple[str, ...]:
        """What a phase trains: the whole trainable part, or before and after it the head alone."""
        return self.trainable if phase == "training" else self.head

    def cached(self, names: tuple[str, ...]) -> bool:
        """Whether training these needs but features, which are computed once."""
        return self.task.features and all(name.startswith(HEAD) for name in names)

    def outputs(self, batch: Batch) -> Any:
        """Run the network on a batch (B, ...) of one row a unit."""
        return self.module(**self.inputs(batch))

    def inputs(self, batch: Batch) -> Batch:
        """What of a batch the network takes; sounds and images in its own precision, which is double in the probe."""
        kind = next(self.module.parameters()).dtype
        given = {name: batch[name] for name in self.task.inputs if name in batch}
        return {name: value.to(kind) if value.is_floating_point() else value for name, value in given.items()}

    def arrays(self) -> Arrays:
        """Copy of the exchanged arrays."""
        return read_arrays(self.parameters, self.exchanged)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by name, looked up once: they stay the same objects, wherever they are moved."""
        return dict(self.module.named_parameters())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the exchanged arrays."""
        return {name: tuple(self.parameters[name].shape) for name in self.exchanged}


def load(config: RunConfig) -> LoadedModel:
    """Load the run's model on the CPU.

    Raises
    ------
    ConfigError
        Where the task's settings do not make one.
    ModelError
        Where the model cannot be found, its weights are not the pinned ones, its code is not part of
        transformers, or nothing of it would be trained.
    """
    task = tasks.of(config)
    folder = locate(config.model)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        settings = _settings(folder, config, task)
        processor = from_pretrained(
            getattr(transformers, task.processor), folder, config.model.name, **task.processor_options
        )
        module = _network(folder, settings, config, task)
        _check_apart(module, config.model.name)
        task.fit(module.encoder, processor)
        trainable.adapt(module, config.model, _head(module, task))
    if config.hardware.checkpointing:
        _checkpoint(module.encoder, config.model.name)
    names = trainable.choose(
        module, config.model, _head(module, task), lambda: _try_out(module, task, processor, config.model.name)
    )
    head = tuple(name for name in names if name.startswith(_head(module, task) or "\0"))
    if not head and config.phases.keys() - {"training"}:
        raise ConfigError(
            f"{' and '.join(sorted(config.phases.keys() - {'training'}))} train the head alone, and {task.name} has none; "
            "set their rounds to 0."
        )
    module.train()
    every = [name for name, _ in module.named_parameters()]
    exchanged = tuple(name for name in every if name in names or ".lora_A." in name)
    base = [name for name in every if name not in exchanged]
    loaded = LoadedModel(module, task, processor, names, exchanged, head, digest(read_arrays(module, base)))
    if config.model.base == "4bit":
        quantised.pack(module.encoder, {name.removeprefix("encoder.") for name in exchanged}, config.model.name)
    _check_inputs(loaded, config)
    return loaded


def _settings(folder: str, config: RunConfig, task: Task) -> Any:
    settings = from_pretrained(transformers.AutoConfig, folder, config.model.name)
    for name, value in settings.to_dict().items():
        if isinstance(value, float) and "drop" in name:
            setattr(settings, name, 0.0)
    if not torch.cuda.is_available() and config.task.max_length <= SHORT:
        settings._attn_implementation = "eager"
    settings._experts_implementation = "eager"  # grouped products know no double, in which the probe computes
    if task.model == "native":
        labels = config.task.labels
        settings.id2label, settings.label2id = dict(enumerate(labels)), {name: n for n, name in enumerate(labels)}
        settings.num_labels = len(labels)
    task.adjust(settings)
    return settings


def _network(folder: str, settings: Any, config: RunConfig, task: Task) -> Network:
    name = config.model.name
    auto = transformers.AutoModel if task.model == "pooled" else getattr(transformers, task.auto)
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    if task.model == "native":
        options["ignore_mismatched_sizes"] = True  # another number of labels: a new last layer
    encoder, found = from_pretrained(auto, folder, name, config=settings, **options)
    _check_loaded(encoder, found, name, task)
    for part in encoder.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0  # some classes read a rate of 0 in their settings as none given, and take their own
    if task.model == "pooled":
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # the head pools by itself; an unused parameter would get no gradient
        return Pooled(encoder, settings.hidden_size, len(config.task.labels), config.model.feature_scale)
    if task.model == "native":
        return Native(encoder, len(config.task.labels), config.model.feature_scale)
    return Whole(encoder)


def _check_loaded(encoder: Any, found: Any, name: str, task: Task) -> None:
    """Refuse a model that lacks weights of its pretrained part: transformers would draw them at random."""
    inner = f"{getattr(encoder, 'base_model_prefix', '')}."
    mismatched = [key[0] for key in found.get("mismatched_keys", ())]
    missing = sorted(key for key in [*found["missing_keys"], *mismatched] if "pooler" not in key)
    if task.model == "native" and hasattr(encoder, inner.removesuffix(".")):
        missing = [key for key in missing if key.startswith(inner)]
    elif task.model == "native":  # no part of its own is the pretrained one: what is new is so in whole
        lost = set(missing)
        parts = {key.partition(".")[0] for key in encoder.state_dict()}
        new = {part for part in parts if all(key in lost for key in encoder.state_dict() if key.startswith(f"{part}."))}
        missing = [key for key in missing if new == parts or key.partition(".")[0] not in new]
    elif task.head:
        missing = [key for key in missing if not key.startswith(f"{task.head}.")]
    if missing:
        raise ModelError(
            f"model.name={name!r} lacks weights: {missing[0]!r} and {len(missing) - 1} more are not in its file."
        )


def _check_apart(module: Network, name: str) -> None:
    """Refuse what lets a record's gradient depend on its neighbours: batch normalisation, and experts of limited room.

    The probe would refuse the first, and less plainly. The second it cannot see: its batches are too small to crowd an expert.
    """
    found = [place for place, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if found:
        raise ModelError(
            f"model.name={name!r} has batch normalisation ({found[0].removeprefix('encoder.')!r} and {len(found) - 1} more), which "
            "mixes the records of a batch, so that clipping bounds none of them; use a model with layer or group normalisation, "
            "such as ViT, Swin or ConvNeXt."
        )
    crowded = [place for place, part in module.named_modules() if hasattr(part, "expert_capacity")]
    if crowded:
        raise ModelError(
            f"model.name={name!r} has experts with room for so many tokens of a batch ({crowded[0].removeprefix('encoder.')!r} and "
            f"{len(crowded) - 1} more): whether a record's tokens get theirs may depend on its neighbours, so that clipping bounds "
            "none of them; use a model without such a limit."
        )


def _head(module: Network, task: Task) -> str | None:
    """How the names of the head's parameters begin."""
    if not isinstance(module, Whole):
        return HEAD
    return f"encoder.{task.head}." if task.head else None


@torch.no_grad()
def _try_out(module: Network, task: Task, processor: Any, name: str) -> None:
    """Run the network on one short made-up record."""
    record = task.made_up(FEW, np.random.default_rng(0).random, processor)
    batch = task.collate([record], task.width(record), processor)
    try:
        module(**{name: batch[name] for name in task.inputs if name in batch})
    except (IndexError, RuntimeError, ValueError):
        raise ModelError(f"{name} does not take records of {task.name}; use a model for it.") from None


@torch.no_grad()
def _check_inputs(model: LoadedModel, config: RunConfig) -> None:
    """Refuse a model that some record could break: a site whose records decide whether it fails tells of them."""
    task, settings, name = model.task, config.task, config.model.name
    tokenizer = getattr(model.processor, "tokenizer", model.processor)
    if hasattr(tokenizer, "get_vocab"):
        embeddings = model.module.encoder.get_input_embeddings()  # type: ignore[operator]
        highest = max(tokenizer.get_vocab().values(), default=0)
        if highest >= embeddings.num_embeddings:
            raise ModelError(
                f"model.name={name!r} has {embeddings.num_embeddings} embeddings and its tokenizer gives token "
                f"{highest}; use a model whose tokenizer belongs to it."
            )
    widest = task.widest(model.processor)
    width = task.width(widest)
    try:
        model.outputs(task.collate([widest], width, model.processor))
    except (IndexError, RuntimeError, ValueError):
        raise ModelError(
            f"task.max_length={settings.max_length}, padded to {' and '.join(map(str, width))} tokens, is more than {name} takes; "
            f"lower task.max_length, to a multiple of {BUCKET}."
            if width
            else f"{name} does not take records of {task.name}; use a model for it."
        ) from None


def _checkpoint(encoder: Any, name: str) -> None:
    try:
        encoder.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError:
        raise ModelError(
            f"hardware.checkpointing=true, but {name} cannot compute its activations anew; set it to false."
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' report of the parts we drop (its pooler) and its progress bars off the screen."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def shapes(arrays: Arrays) -> str:
    """Names and shapes as canonical JSON, for a first comparison between coordinator and site."""
    return json.dumps({name: list(array.shape) for name, array in sorted(arrays.items())})
