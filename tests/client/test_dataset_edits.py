"""The table of docs/guides/ledger.md, row by row: what an edit of a data set does to its account."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from client import site
from shared.errors import BudgetError, DataError, MoonflowerError

Row = dict[str, Any]
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "ledger.md"


def declare(desk: Any, **changes: Any) -> None:
    """Change site.toml's [dataset], between two runs."""
    dataset = desk.site.dataset.model_copy(update=changes)
    file = desk.site.ledger.with_name("site.toml")
    site.save(desk.site.model_copy(update={"dataset": dataset}), file)
    desk.site = site.load(file)


def add(desk: Any) -> None:
    desk.write([*desk.rows(), *({"id": f"new-{n}", "text": "a fine book", "label": "good"} for n in range(40))])


def remove(desk: Any) -> None:
    desk.write(desk.rows()[::2])


def remove_and_add_again(desk: Any) -> None:
    rows = desk.rows()
    desk.write(rows[::2])
    desk.write(rows)


def replace_all(desk: Any) -> None:
    desk.write([{"id": f"other-{n}", "text": "a dull song", "label": "bad"} for n in range(100)])


def correct(desk: Any) -> None:
    desk.write([row | {"label": "good"} for row in desk.rows()])


def move(desk: Any) -> None:
    declare(desk, path=desk.site.dataset.path.rename(desk.site.dataset.path.with_name("moved.jsonl")))


def declare_another_size(desk: Any) -> None:
    declare(desk, records=90)


def rename(desk: Any) -> None:
    declare(desk, id="notes-2027")


def rename_with_the_sites_word(desk: Any) -> None:
    declare(desk, id="notes-2027", shares_no_records_with=(desk.site.dataset.id,))


def change_the_ids(desk: Any) -> None:
    declare(desk, columns={"id": "text"})


def declare_persons(desk: Any) -> None:
    declare(desk, unit_column="text", persons=100, records=None)
    desk.config = desk.config.model_copy(update={"privacy": desk.config.privacy.model_copy(update={"unit": "person"})})


INHERITED, OWN = "all its spends", "an account of its own"
TABLE: dict[str, tuple[Callable[[Any], None], str | type[MoonflowerError]]] = {
    "records added": (add, INHERITED),
    "records removed": (remove, INHERITED),
    "records removed and added again": (remove_and_add_again, INHERITED),
    "every record replaced": (replace_all, INHERITED),
    "a text or a label corrected": (correct, INHERITED),
    "the file moved or renamed": (move, INHERITED),
    "another declared size": (declare_another_size, INHERITED),
    "a new id, without a word": (rename, DataError),
    "a new id, and the site's word that no record is shared": (rename_with_the_sites_word, OWN),
    "another split key, share, id column or unit column": (change_the_ids, DataError),
    "a unit column where there was none, or none where there was one": (declare_persons, MoonflowerError),
}


def edited(new_desk: Callable[..., Any], row: str) -> tuple[Any, float]:
    """Return a site whose data set was trained on, then edited, and the epsilon that it had spent."""
    desk = new_desk()
    desk.train()
    with desk.ledger() as ledger:
        spent = ledger.lifetime_epsilon("train")
    TABLE[row][0](desk)
    return desk, spent


@pytest.mark.parametrize("row", [row for row, (_, result) in TABLE.items() if result == INHERITED])
def test_an_edit_of_the_records_inherits_all_spends_and_refunds_nothing(new_desk: Callable[..., Any], row: str) -> None:
    desk, spent = edited(new_desk, row)
    with desk.ledger() as ledger:
        assert ledger.lifetime_epsilon("train") == spent > 0
    desk.train(run="next")
    with desk.ledger() as ledger:
        assert [spend.question.run for spend in ledger.spends()] == ["run", "next"]
        assert ledger.lifetime_epsilon("train") > spent


def test_an_exhausted_data_set_stays_exhausted_whatever_is_removed_or_added(new_desk: Callable[..., Any]) -> None:
    desk = new_desk(site={"privacy": {"max_epsilon": 8.0}})
    with suppress(BudgetError):
        for number in range(50):
            desk.train(run=f"run-{number}")
    assert 0 < desk.spent() < 50
    for change in (remove, add, replace_all, declare_another_size, move):
        change(desk)
        with pytest.raises(BudgetError):
            desk.train(run=f"after-{change.__name__}")


@pytest.mark.parametrize("row", [row for row, (_, result) in TABLE.items() if isinstance(result, type)])
def test_an_edit_that_could_give_a_record_two_budgets_is_refused(new_desk: Callable[..., Any], row: str) -> None:
    desk, _ = edited(new_desk, row)
    error = TABLE[row][1]
    assert isinstance(error, type)
    for ask in (desk.join, desk.train, desk.evaluate):
        with pytest.raises(error) as refusal:
            ask(run="next")
    assert "\n" not in str(refusal.value)
    if row == "a new id, without a word":
        assert "shares_no_records_with = ['notes-of-clinic']" in str(refusal.value)


def test_a_new_id_with_the_sites_word_has_an_account_of_its_own_and_the_old_one_keeps_its_spends(
    new_desk: Callable[..., Any],
) -> None:
    desk, spent = edited(new_desk, "a new id, and the site's word that no record is shared")
    assert desk.spent() == 0
    desk.train(run="next")
    assert desk.spent() == 1
    declare(desk, id="notes-of-clinic", shares_no_records_with=("notes-2027",))
    with desk.ledger() as ledger:
        assert ledger.lifetime_epsilon("train") == spent
    declare(desk, shares_no_records_with=())  # both have spent: each needs the word
    with pytest.raises(DataError, match="'notes-2027', which has spent"):
        desk.train(run="back")


def test_a_new_id_needs_no_word_where_nothing_was_spent(new_desk: Callable[..., Any]) -> None:
    desk = new_desk()
    desk.join()
    declare(desk, id="notes-2027")
    desk.train()


@pytest.mark.parametrize("row", TABLE)
def test_the_guide_has_the_row(row: str) -> None:
    assert any(line.startswith(f"| {row} |") for line in GUIDE.read_text(encoding="utf-8").splitlines())
