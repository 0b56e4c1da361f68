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
from shared.errors import DataError
from shared.run_config import Task

TASK = Task(labels=("bad", "good"))
ROW = {"id": "1", "text": "a good film", "label": "good"}


def read(folder: Path, *lines: str, **more: Any) -> list[data.Record]:
    path = folder / "records.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return data.read(Dataset(**({"id": "notes", "path": path, "records": 10, "labels": ("bad", "good")} | more)), TASK)


def test_records_are_read_in_order_with_their_labels_numbered_as_the_task_does(tmp_path: Path) -> None:
    rows = [ROW, {"id": 2, "text": " the book ", "label": "bad", "more": None}]
    assert read(tmp_path, *(json.dumps(row) for row in rows)) == [
        data.Record("1", "a good film", 1),
        data.Record("2", " the book ", 0),
    ]
    columns = {"id_column": "key", "text_column": "note", "label_column": "kind"}
    row = json.dumps({"key": "k", "note": "n", "kind": "bad"})
    assert read(tmp_path, row, **columns) == [data.Record("k", "n", 0)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "not a JSON object"),
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        (json.dumps({"id": "2", "label": "bad"}), "column 'text' is missing"),
        (json.dumps(ROW | {"id": "2", "text": "  "}), "'text' is empty"),
        (json.dumps(ROW | {"id": "2", "text": 5}), "'text' is empty"),
        (json.dumps(ROW | {"id": "2", "label": "ugly"}), "label 'ugly' is not one of the declared"),
        (json.dumps(ROW), "id '1' stands twice"),
        (json.dumps(ROW | {"id": 1}), "id '1' stands twice"),
        (json.dumps(ROW | {"id": None}), "neither text nor a whole number"),
        (json.dumps(ROW | {"id": 1.0}), "neither text nor a whole number"),
        (json.dumps(ROW | {"id": "2", "text": "\ud800"}), "surrogate"),
        (json.dumps(ROW | {"id": "\ud800"}), "surrogate"),
    ],
)
def test_a_row_at_fault_is_named_by_its_number(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(DataError, match=f"row 2: .*{said}") as fault:
        read(tmp_path, json.dumps(ROW), line)
    assert "\n" not in str(fault.value)


def test_a_file_that_is_none_or_empty_or_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no records"):
        read(tmp_path)
    (tmp_path / "records.jsonl").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "records.jsonl", tmp_path / "nothing", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            data.read(Dataset(id="notes", path=path, records=10, labels=("bad", "good")), TASK)
    with pytest.raises(DataError, match="cannot be read"):
        data.file_digest(tmp_path / "nothing")


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x1c", "\x0c", "\r"])
def test_a_text_may_hold_what_other_languages_call_a_line_end(tmp_path: Path, end: str) -> None:
    row = json.dumps(ROW | {"text": f"one{end}two"}, ensure_ascii=False)
    assert read(tmp_path, row)[0].text == f"one{end}two"


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
    with pytest.raises(DataError, match="row 1: label 'good' is not one of the declared"):
        read(tmp_path, json.dumps(ROW), labels=("bad",))
