"""What a site keeps of its encoded records: found again, never trusted where anything has changed, and nobody else's."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from kept import tokens

from client import data, digests
from client.digests import Digests
from client.encoded import Writer
from client.resident import Resident
from client.site import Site
from shared.errors import DataError, EngineError
from shared.examples import Examples

Desks = Callable[..., Any]


def entries(site: Site) -> list[Path]:
    """Return what the cache holds of the site's data set."""
    return sorted((site.cache / site.dataset.id).iterdir())


def parts(desk: Any, resident: Resident | None = None) -> data.Parts:
    """Return the parts as a process of its own would have them."""
    found: data.Parts = (resident or Resident()).parts(desk.site, desk.config)
    return found


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("a record was read")


def test_a_later_process_reads_no_record_again(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = parts(desk)
    monkeypatch.setattr("shared.records.each", refuse)
    again = parts(desk)
    assert tokens(again.train) == tokens(first.train)
    assert tokens(again.validation) == tokens(first.validation)
    assert isinstance(again.train.fields["input_ids"].values, np.memmap)


def test_the_cache_is_the_owners_alone(desk: Any) -> None:
    parts(desk)
    for place in (desk.site.cache, desk.site.cache / desk.site.dataset.id, *entries(desk.site)):
        assert place.stat().st_mode & 0o077 == 0
    for opened in (desk.site.cache, desk.site.cache / desk.site.dataset.id):
        opened.chmod(0o750)
        with pytest.raises(DataError, match=r"cache=.* is not this user's alone.* chmod 700"):
            parts(desk)
        opened.chmod(0o700)
    assert parts(desk)


@pytest.mark.parametrize(
    "changed", ["file", "max_length", "labels", "columns", "validation", "key", "tokenizer", "code"]
)
def test_anything_that_decides_what_is_kept_makes_it_anew(
    changed: str, new_desk: Desks, new_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = new_desk()
    parts(desk)
    before = entries(desk.site)
    dataset: dict[str, Any] = {}
    match changed:
        case "file":
            desk.write([row | {"text": "the film was really grim"} for row in desk.rows()])
        case "max_length":
            desk.config = new_config(task={"max_length": 16})
        case "labels":
            dataset = {"labels": ("good", "bad")}
        case "columns":
            desk.write([{**row, "body": row["text"]} for row in desk.rows()])
            parts(desk)
            before = entries(desk.site)
            dataset = {"columns": {"text": "body"}}
        case "validation":
            dataset = {"validation": 0.3}
        case "key":
            desk.site.split_key.write_bytes(bytes(32))
        case "tokenizer":
            monkeypatch.setattr(data, "_processor_digest", lambda _: "another")
        case "code":
            monkeypatch.setattr(data, "version", lambda _: "another")
    desk.site = desk.site.model_copy(update={"dataset": desk.site.dataset.model_copy(update=dataset)})
    found = parts(desk)
    assert set(entries(desk.site)) - set(before)
    rows = desk.validation_rows()
    assert len(found.validation) == len(rows)


def test_entries_of_what_the_file_held_before_are_removed_and_few_of_the_rest_are_kept(
    new_desk: Desks, new_config: Callable[..., Any]
) -> None:
    desk = new_desk()
    for length in (8, 12, 16, 20, 24):
        desk.config = new_config(task={"max_length": length})
        parts(desk)
    assert len(entries(desk.site)) == 3
    (desk.site.cache / desk.site.dataset.id / ".new-dead").mkdir()
    os.utime(desk.site.cache / desk.site.dataset.id / ".new-dead", (0, 0))
    desk.write(desk.rows()[1:])
    parts(desk)
    assert len(entries(desk.site)) == 1


def test_a_folder_that_is_no_entry_is_left_alone(desk: Any) -> None:
    """Whoever names the data's own folder as the cache loses nothing."""
    theirs = desk.site.cache / desk.site.dataset.id / "images"
    for made in (theirs.parents[1], theirs.parent, theirs):
        made.mkdir(mode=0o700)
    (theirs / "1.png").write_bytes(b"1")
    parts(desk)
    assert (theirs / "1.png").exists()


@pytest.mark.parametrize("damage", ["a byte", "an end", "a file", "the list", "an array more"])
def test_a_damaged_entry_is_made_anew(damage: str, desk: Any) -> None:
    whole = tokens(parts(desk).train)
    (entry,) = entries(desk.site)
    array = entry / "train" / "input_ids.values.npy"
    match damage:
        case "a byte":
            held = bytearray(array.read_bytes())
            held[-1] ^= 1
            array.write_bytes(held)
        case "an end":
            array.write_bytes(array.read_bytes()[:-4])
        case "a file":
            array.unlink()
        case "the list":
            (entry / "entry.json").write_text("{", encoding="utf-8")
        case "an array more":
            np.save(entry / "train" / "more.values.npy", np.zeros(3))
    assert tokens(parts(desk).train) == whole


def test_a_file_that_changes_while_it_is_read_is_refused(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = data.read

    def slowly(*args: Any) -> Any:
        for number, record in enumerate(reading(*args)):
            if number == 3:
                desk.write(desk.rows()[:-1])
            yield record

    monkeypatch.setattr(data, "read", slowly)
    with pytest.raises(DataError, match="has changed while it was read"):
        parts(desk)
    assert entries(desk.site) == []


def test_a_cache_that_cannot_be_written_is_named(desk: Any) -> None:
    desk.site = desk.site.model_copy(update={"cache": desk.site.dataset.path})
    with pytest.raises(DataError, match=r"cache=.* cannot be used: .*\(site.toml, cache\)"):
        parts(desk)


def test_a_process_keeps_one_version_of_a_site_and_of_its_features(desk: Any) -> None:
    resident = desk.resident
    for number in range(3):
        desk.write(desk.rows()[number:])
        found = resident.parts(desk.site, desk.config)
        resident.features(desk.site, "train", found.train, desk.config, desk.start())
    assert len(resident._parts) == len(resident._features._kept) == 1


def test_a_warm_start_imports_no_datasets(desk: Any) -> None:
    parts(desk)
    program = (
        "import sys\nfrom pathlib import Path\nfrom client import site\nfrom client.resident import Resident\n"
        "from shared.run_config import RunConfig\nfrom shared import records\nrecords.each = None\n"
        "found = Resident().parts(site.load(Path(sys.argv[1])), RunConfig.model_validate_json(sys.argv[2]))\n"
        "print(len(found.train), {'datasets', 'pyarrow.parquet'} & sys.modules.keys())\n"
    )
    command = [sys.executable, "-c", program, str(desk.site.dataset.path.parent / "site.toml"), desk.config.as_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == [str(len(parts(desk).train)), "set()\n"]


# -- files that records name ----------------------------------------------------------------------------------------


def test_an_image_that_a_record_names_is_part_of_what_was_read(tmp_path: Path) -> None:
    kept = Digests()
    file = tmp_path / "a.png"
    PIL.Image.new("RGB", (2, 2)).save(file)
    before = kept.each([file])
    PIL.Image.new("RGB", (2, 2), "red").save(file)
    assert kept.each([file]) != before


def test_the_digest_of_a_folder_is_of_names_and_bytes(tmp_path: Path) -> None:
    def digest() -> str:
        return Digests().of(tmp_path)

    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "a").write_bytes(b"1")
    seen = {digest()}
    (tmp_path / ".hidden").write_bytes(b"1")
    assert digest() in seen
    (tmp_path / "good" / "a").write_bytes(b"2")
    seen.add(digest())
    (tmp_path / "good" / "a").rename(tmp_path / "good" / "b")
    seen.add(digest())
    (tmp_path / "bad").mkdir()
    (tmp_path / "good" / "b").rename(tmp_path / "bad" / "b")
    seen.add(digest())
    assert len(seen) == 4
    with pytest.raises(DataError, match="cannot be read"):
        Digests().of(tmp_path / "nothing")


def test_a_file_that_stands_as_it_stood_is_not_read_again_but_a_fresh_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    digest = digests.hashlib.file_digest
    monkeypatch.setattr(digests.hashlib, "file_digest", lambda *args: read.append(1) or digest(*args))
    file, kept = tmp_path / "a", Digests()
    file.write_bytes(b"1")
    kept.of(file)
    kept.of(file)
    assert len(read) == 2  # just written: another write in the same tick would not show
    monkeypatch.setattr(digests.time, "time", lambda now=time.time: now() + 10)
    for _ in range(3):
        kept.of(file)
    assert len(read) == 3
    file.write_bytes(b"2")
    assert kept.of(file) == Digests().of(file)


# -- the arrays -----------------------------------------------------------------------------------------------------


class Plain:
    """What the writer asks of a task."""

    name, chunks = "plain", True


def written(folder: Path, records: list[tuple[str, Any]]) -> Examples:
    folder.mkdir()
    with Writer(folder, Plain()) as writer:
        for unit, encoded in records:
            writer.add(unit, encoded)
    return Examples.open(Plain(), None, folder)


def row(number: int) -> dict[str, Any]:
    """Return a row of its own length and its own values."""
    return {
        "ids": np.full(number % 4, number, dtype=np.int32),
        "pixels": np.full((number % 3, 2), number, np.uint8),
    } | {"labels": np.asarray(number)}


def same(one: Examples, other: Examples) -> bool:
    assert (one.units == other.units).all()
    assert (one.records == other.records).all()
    assert one.fields.keys() == other.fields.keys()
    for number in range(one.rows):
        for name, array in one.row(number).items():
            assert array.dtype == other.row(number)[name].dtype
            assert np.array_equal(array, other.row(number)[name])
    return True


def test_what_is_written_is_what_would_be_held_in_memory(tmp_path: Path) -> None:
    """Units in the order in which they first come, with all their records, and a record's chunks together."""
    records = [("a", row(1)), ("b", [row(2), row(3)]), ("a", row(4)), ("c", row(5)), ("b", row(6)), ("a", [row(7)])]
    units = [[record for unit, record in records if unit == name] for name in "abc"]
    assert same(written(tmp_path / "mixed", records), Examples.of(Plain(), None, units))
    alone = [(str(number), row(number)) for number in range(9)]
    assert same(written(tmp_path / "alone", alone), Examples.single(Plain(), None, [each for _, each in alone]))


def test_a_part_without_records_opens(tmp_path: Path) -> None:
    found = written(tmp_path / "none", [])
    assert (len(found), found.rows, found.fields) == (0, 0, {})


def test_rows_without_a_value_open(tmp_path: Path) -> None:
    found = written(tmp_path / "empty", [("a", {"ids": np.zeros(0, dtype=np.int32)})])
    assert (len(found), found.row(0)["ids"].shape) == (1, (0,))


def test_a_task_without_chunks_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plain, "chunks", False)
    with pytest.raises(EngineError, match="cuts records in chunks"):
        written(tmp_path / "cut", [("a", [row(1), row(2)])])


@pytest.mark.parametrize("other", [{"ids": np.zeros((2, 3))}, {"ids": np.asarray(1)}, {"labels": np.zeros(2)}])
def test_arrays_that_are_not_alike_are_an_error_and_never_mixed_up(tmp_path: Path, other: dict[str, Any]) -> None:
    with pytest.raises(EngineError):
        written(tmp_path / "mixed", [("a", {"ids": np.zeros((3, 2))}), ("b", other)])


def test_the_list_names_only_arrays(desk: Any) -> None:
    parts(desk)
    (entry,) = entries(desk.site)
    listed = json.loads((entry / "entry.json").read_text(encoding="utf-8"))["files"]
    assert {file.relative_to(entry).as_posix() for file in entry.rglob("*") if file.is_file()} == {
        *listed,
        "entry.json",
    }
    assert all(name.endswith(".npy") for name in listed)
