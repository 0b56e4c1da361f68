"""The guide names every task, with its columns and its class."""

from importlib import import_module
from pathlib import Path

import pytest

from shared import tasks

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "tasks.md"
FILES = Path(tasks.__file__).parent.glob("*.py")
NAMES = sorted(file.stem.replace("_", "-") for file in FILES if "\n@register\n" in file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_the_guide_has_a_row_of_each_task(name: str) -> None:
    import_module(f"shared.tasks.{name.replace('-', '_')}")
    kind = tasks._REGISTERED[name]
    row = next(line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |"))
    assert kind.auto in row
    assert all(f"`{role}`" in row for role in kind.columns)
