"""What an exported folder is: `moonflower.json`, which `moonflower predict` and `moonflower explain` read."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from server.export import weights
from server.export.base import Base
from server.export.source import Source
from shared.errors import ModelError
from shared.tasks.base import Task

FILE = "moonflower.json"


@dataclass(frozen=True)
class Manifest:
    """What the folder holds, and how a record becomes numbers; nothing of the exporting machine.

    `form` is merged or adapter, `format` hf, onnx or int8; `head` is how the network is put together (`Task.model`),
    `auto` transformers' class for it. `thresholds` are those of the labels above which a record has one.
    """

    task: str
    form: str
    format: str
    head: str
    auto: str
    processor: str
    inputs: tuple[str, ...]
    labels: tuple[str, ...]
    multi_label: bool
    thresholds: tuple[float, ...]
    max_length: int
    max_target_length: int
    base: str | None  # its name on the Hub, where it has one
    run: str
    round: int

    @classmethod
    def of(cls, source: Source, task: Task, form: str, format: str, base: Base, inputs: tuple[str, ...]) -> "Manifest":
        """Describe an export, whose network takes `inputs`."""
        settings = source.config.task
        return cls(
            task=task.name,
            form=form,
            format=format,
            head=task.model,
            auto=weights.auto(task),
            processor=task.processor,
            inputs=inputs,
            labels=settings.labels,
            multi_label=settings.multi_label,
            thresholds=source.thresholds,
            max_length=settings.max_length,
            max_target_length=settings.max_target_length,
            base=base.hub,
            run=source.run.id,
            round=source.round.number,
        )

    def write(self, folder: Path) -> None:
        """Write it into an export."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest:
    """Read an exported folder's.

    Raises
    ------
    ModelError
        Where it is none.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder; name one that `moonflower export` wrote.")
    try:
        values: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return Manifest(**{**values, **lists})
    except FileNotFoundError:
        raise ModelError(f"{folder} is no exported model: it has no {FILE}; `moonflower export` writes one.") from None
    except (OSError, ValueError, TypeError, AttributeError):
        raise ModelError(f"{folder / FILE} cannot be read; export the model anew.") from None
