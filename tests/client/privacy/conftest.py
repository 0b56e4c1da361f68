"""Bugs, planted in the project's own code."""

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest


@pytest.fixture(scope="session")
def planted() -> Callable[..., AbstractContextManager[None]]:
    """Plant a bug as an edit: a function of the project has `new` in its text for `old`, which must stand there once.

    `names` are modules that the new text needs besides. At the end of the context the function is as before.
    """

    @contextmanager
    def plant(function: Callable[..., Any], old: str, new: str, **names: Any) -> Iterator[None]:
        text = textwrap.dedent(inspect.getsource(function))
        assert text.count(old) == 1, f"{function.__qualname__} has changed: plant the bug anew"
        module = sys.modules[function.__module__]
        made: dict[str, Any] = {}
        code = compile(text.replace(old, new), f"<{function.__qualname__}, edited>", "exec")
        exec(code, vars(module), made)  # noqa: S102 - the edited function, in its own module's names
        *path, name = function.__qualname__.split(".")
        owner: Any = module
        for part in path:
            owner = getattr(owner, part)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, made[name])
            for word, value in names.items():
                patch.setattr(module, word, value, raising=False)
            yield

    return plant
