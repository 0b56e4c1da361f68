"""What a model learns to do, one module a task.

A task is a subclass of `shared.tasks.base.Task` in a module of its name (`text-classification` in
`text_classification.py`); the module is loaded when a run names it. `register` makes one known that lies elsewhere.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from shared.errors import ConfigError

if TYPE_CHECKING:
    from shared.run_config import RunConfig
    from shared.tasks.base import Task

_HELPERS = ("base", "classification", "hearing", "tokens")  # modules here that are no task
_REGISTERED: dict[str, type["Task"]] = {}


def register(kind: type["Task"]) -> type["Task"]:
    """Make a task known under its name; a class decorator."""
    _REGISTERED[kind.name] = kind
    return kind


def names() -> list[str]:
    """Names of the tasks that can be asked for."""
    found = {module.name.replace("_", "-") for module in iter_modules(__path__) if module.name not in _HELPERS}
    return sorted(found | _REGISTERED.keys())


def of(config: "RunConfig") -> "Task":
    """Return the run's task.

    Raises
    ------
    ConfigError
        Where there is none of that name, or its settings do not make one.
    """
    name = config.task.name
    if name not in names():
        raise ConfigError(f"task.name={name!r} is not a task; use one of {', '.join(names())}.")
    if name not in _REGISTERED:
        import_module(f"{__name__}.{name.replace('-', '_')}")
    return _REGISTERED[name](config)
