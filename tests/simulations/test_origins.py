"""Virtual sites' own records: tables and folders of every kind, and what a run's folder holds of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest

from client import data, site
from client.site import Site
from server.history.store import History
from server.job import load
from shared import records, tasks
from shared.errors import ConfigError, DataError
from simulations import origins, prepare, scenario
from simulations.scenario import Scenario

RENAMED = {"id": "key", "text": "body", "label": "kind"}


@pytest.fixture
def history(moonflower_home: Path) -> Any:
    with History.open("sqlite://") as opened:
        yield opened


@pytest.fixture
def folder(tiny_scenario: Path, tmp_path: Path) -> Path:
    """Give a copy of the tiny scenario's folder."""
    shutil.copytree(tiny_scenario.parent, tmp_path / "data")
    return tmp_path / "data"


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def renamed(folder: Path, write: Callable[[Path, list[dict[str, Any]]], None]) -> None:
    """Write all files anew, under other columns and labels."""
    for name in ("north", "south", "west", "test"):
        rows = [{RENAMED[column]: value for column, value in row.items()} for row in rows_of(folder, name)]
        (folder / f"{name}.jsonl").unlink()
        write(folder / name, [row | {"kind": row["kind"][:3]} for row in rows])


def as_csv(place: Path, rows: list[dict[str, Any]]) -> None:
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    place.with_suffix(".csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def as_parquet(place: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place.with_suffix(".parquet"))


def sites_of(run: str) -> list[Site]:
    return [site.load(Path(str(node["site"]))) for node in prepare.nodes(run).values()]


@pytest.mark.parametrize("write", [as_csv, as_parquet])
def test_tables_with_columns_and_labels_of_their_own_are_copied_and_read(
    write: Callable[[Path, list[dict[str, Any]]], None], folder: Path, history: History
) -> None:
    wanted = {name: [(row["text"], row["label"]) for row in rows_of(folder, name)] for name in ("north", "test")}
    renamed(folder, write)
    settings = {"data.columns": RENAMED, "data.label_names": {"neg": "negative", "pos": "positive"}}
    read = scenario.load(str(folder / "tiny.toml"), settings)
    run = prepare.prepare(read, history)
    shutil.rmtree(folder)  # the run has its own
    task, north = tasks.of(read.run_config()), sites_of(run)[0]
    found = [(each.values["text"], each.values["label"]) for each in data.read(north.dataset, task)]
    assert found == wanted["north"]
    test_set = load(prepare.run_folder(run)).test_set
    assert test_set is not None
    test = [(each.values["text"], each.values["label"]) for each in records.read(test_set, task, identified=False)]
    assert test == wanted["test"]


def test_a_row_at_fault_is_named_in_its_own_file_and_leaves_nothing(
    folder: Path, history: History, moonflower_home: Path
) -> None:
    for name in ("south", "test"):
        rows = rows_of(folder, name)
        whole = (folder / f"{name}.jsonl").read_text(encoding="utf-8")
        text = "".join(json.dumps(row | ({"label": "odd"} if at == 4 else {})) + "\n" for at, row in enumerate(rows))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=rf"{name}\.jsonl, row 5: 'label' holds the label 'odd'"):
            prepare.prepare(scenario.load(str(folder / "tiny.toml"), {}), history)
        (folder / f"{name}.jsonl").write_text(whole, encoding="utf-8")
    assert not (moonflower_home / "runs").exists()


def test_a_site_without_records_or_with_two_files_is_named(folder: Path) -> None:
    def opened() -> None:
        origins.of(scenario.load(str(folder / "tiny.toml"), {}))

    shutil.copyfile(folder / "north.jsonl", folder / "north.csv")
    with pytest.raises(DataError, match=r"north\.jsonl and .*north\.csv are both there; keep one"):
        opened()
    (folder / "north.csv").unlink()
    (folder / "north.jsonl").unlink()
    with pytest.raises(DataError, match=r"holds no records of 'north'; data.folder needs, for each site"):
        opened()


def test_columns_are_of_a_folder_alone(tiny_scenario: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.columns and data\.label_names need source='folder'"):
        scenario.load("vader", {"data.columns": {"text": "body"}})


def images(folder: Path) -> Scenario:
    """Lay out two sites of images, and a test set in a table, and return their scenario."""
    for number in range(44):
        name = ("north", "south")[number % 2] if number < 40 else "."
        label = ("bad", "good")[number // 2 % 2] if number < 40 else ""
        place = folder / name / label / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(place)
    rows = [{"image": f"{number}.png", "label": "good"} for number in range(40, 44)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Scenario.model_validate(
        {
            "name": "images",
            "model": {"name": "any", "trainable": "head"},
            "task": {"name": "image-classification", "labels": ["bad", "good"]},
            "training": {"rounds": 1, "batch_size": 4},
            "data": {"source": "folder", "folder": str(folder)},
            "sites": [{"name": "north", "records": 20}, {"name": "south", "records": 20}],
        }
    )


def test_images_stay_where_they_are_and_a_test_set_of_them_is_copied_whole(tmp_path: Path) -> None:
    read = images(tmp_path / "data")
    origin = origins.of(read)
    for folder in ("run", "site"):
        (tmp_path / folder).mkdir()
    assert origin.units("north", prepare._dataset(read, read.sites[0])) == 20
    assert origin.lay_out("north", tmp_path / "site") == (tmp_path / "data" / "north").resolve()
    assert list((tmp_path / "site").iterdir()) == []
    origin.lay_out_test(tmp_path / "run")
    shutil.rmtree(tmp_path / "data")
    task = tasks.of(read.run_config())
    found = records.read(tmp_path / "run" / "test", task, identified=False)
    assert [np.asarray(each.values["image"].open())[0, 0, 0] for each in found] == [40, 41, 42, 43]
    assert {each.values["label"] for each in found} == {"good"}
