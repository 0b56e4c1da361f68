"""Every mistake in a data set is an error that names the file and the row, in the very words of the guide."""

from pathlib import Path

import pytest
from bad_input import MISTAKES, Mistake, said, table

from shared import tasks
from shared.record_kinds import KINDS
from shared.run_config import RunConfig

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "data.md"


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_a_mistake_is_said_as_the_guide_has_it(mistake: Mistake, tmp_path: Path) -> None:
    text = said(mistake, tmp_path)
    assert "\n" not in text
    assert text.endswith(".")
    assert f"| {mistake.what} | `{text}` |" in GUIDE.read_text(encoding="utf-8")


def test_the_guide_has_these_mistakes_and_no_others() -> None:
    assert len({mistake.what for mistake in MISTAKES}) == len(MISTAKES)
    assert table() in GUIDE.read_text(encoding="utf-8")


def test_every_kind_of_column_has_a_mistake() -> None:
    """Of a task that has it."""
    kinds = {"labels"}  # of a task of many labels
    for name in {mistake.task for mistake in MISTAKES}:
        labels = {"labels": ["O", "B-x", "I-x"]} if name.endswith("classification") else {}
        values = {
            "model": {"name": "any"},
            "task": {"name": name, **labels},
            "training": {"rounds": 1, "batch_size": 1},
        }
        columns = tasks.of(RunConfig.model_validate(values)).columns.values()
        kinds |= {column.kind for column in columns}
    assert kinds == set(KINDS)
