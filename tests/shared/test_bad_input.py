"""Every mistake in a data set is an error that names the file and the row, in the very words of the guide."""

from pathlib import Path

import pytest
from bad_input import MISTAKES, Mistake, said, table

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
