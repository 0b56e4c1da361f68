"""Reading, checking and splitting a site's records."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import data
from client.site import Dataset, Site, split_key
from shared import tasks
from shared.errors import DataError
from shared.records import Record
from shared.run_config import RunConfig
from shared.tasks.base import Task

ROW = {"id": "1", "text": "a good film", "label": "good"}


def task() -> Task:
    run = {"model": {"name": "any"}, "task": {"labels": ["bad", "good"]}, "training": {"rounds": 1, "batch_size": 1}}
    return tasks.of(RunConfig.model_validate(run))


def read(folder: Path, *lines: str, **more: Any) -> list[Record]:
    path = folder / "records.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    declared = {"id": "notes", "path": path, "records": 10, "labels": ("bad", "good")}
    return list(data.read(Dataset(**(declared | more)), task()))


def test_records_are_read_in_order_by_the_sites_own_columns(tmp_path: Path) -> None:
    rows = [ROW, {"id": 2, "text": " the book ", "label": "bad", "more": None}]
    assert read(tmp_path, *(json.dumps(row) for row in rows)) == [
        Record("1", "1", {"text": "a good film", "label": "good"}),
        Record("2", "2", {"text": " the book ", "label": "bad"}),
    ]
    more: dict[str, Any] = {"columns": {"id": "key", "text": "note", "label": "kind"}, "label_names": {"0": "bad"}}
    more |= {"unit_column": "who", "persons": 10, "records": None}
    row = json.dumps({"key": "k", "note": "n", "kind": 0, "who": "p"})
    assert read(tmp_path, row, **more) == [Record("k", "p", {"text": "n", "label": "bad"})]


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x1c", "\x0c", "\r"])
def test_a_text_may_hold_what_other_languages_call_a_line_end(tmp_path: Path, end: str) -> None:
    row = json.dumps(ROW | {"text": f"one{end}two"}, ensure_ascii=False)
    assert read(tmp_path, row)[0].values["text"] == f"one{end}two"


# -- the split ------------------------------------------------------------------------------------------------


@given(st.text(), st.binary(min_size=32, max_size=32), st.floats(0.01, 0.5))
def test_a_record_is_in_the_larger_validation_part_wherever_it_is_in_the_smaller(
    record: str, key: bytes, share: float
) -> None:
    if data.is_validation(record.encode("utf-8", "ignore").decode(), key, share):
        assert data.is_validation(record.encode("utf-8", "ignore").decode(), key, min(1.0, share * 1.5))


def test_the_split_keeps_the_declared_share_and_follows_the_key() -> None:
    ids = [f"record-{number}" for number in range(20_000)]
    kept = {key: {i for i in ids if data.is_validation(i, bytes([key]) * 32, 0.2)} for key in (1, 2)}
    for part in kept.values():
        assert abs(len(part) / 20_000 - 0.2) < 0.015  # five deviations
    assert abs(len(kept[1] & kept[2]) / 20_000 - 0.04) < 0.007  # as two independent keys do


def test_adding_or_removing_records_moves_none_and_no_record_is_in_both_parts(
    new_desk: Callable[..., Any], new_rows: Callable[..., Any]
) -> None:
    def parts(rows: list[dict[str, Any]]) -> tuple[set[str], set[str]]:
        desk.write(rows)
        found = desk.resident.parts(desk.site, desk.config)
        assert len(found.train) + len(found.validation) == len(rows)
        key = split_key(desk.site)
        validation = {row["id"] for row in rows if data.is_validation(row["id"], key, 0.2)}
        assert len(found.validation) == len(validation)
        return {row["id"] for row in rows} - validation, validation

    desk = new_desk()
    rows = new_rows(100)
    train, validation = parts(rows)
    assert validation
    for changed in (rows[::-1], rows[10:], [*new_rows(50, "newer"), *rows]):
        train_now, validation_now = parts(changed)
        assert not train_now & validation_now
        assert not train_now & validation
        assert not validation_now & train


def test_the_key_is_secret_made_once_and_never_replaced(new_site: Callable[..., Site]) -> None:
    site = new_site()
    site.split_key.unlink()
    key = split_key(site)
    assert len(key) == 32
    assert split_key(site) == key
    assert site.split_key.stat().st_mode & 0o077 == 0
    site.split_key.write_bytes(b"short")
    with pytest.raises(DataError, match="holds 5 bytes"):
        split_key(site)
    assert site.split_key.read_bytes() == b"short"


def test_two_sites_get_keys_of_their_own(new_site: Callable[..., Site]) -> None:
    keys = set()
    for name in ("north", "south"):
        site = new_site(name)
        site.split_key.unlink()
        keys.add(split_key(site))
    assert len(keys) == 2


def test_a_label_that_the_run_has_and_the_site_does_not_declare_is_at_fault_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"row 1: 'label' holds the label 'good', which is not one of the declared \['bad'\]"
    ):
        read(tmp_path, json.dumps(ROW), labels=("bad",))
