"""What is kept of records: units of several records, records of several rows, on a disk and back."""

from pathlib import Path

import numpy as np
import pytest

from shared import tasks
from shared.examples import Examples
from shared.run_config import RunConfig
from shared.tasks.base import Chunks, Encoded, Task

CONFIG = {"model": {"name": "any"}, "task": {"name": "question-answering"}, "training": {"rounds": 1, "batch_size": 1}}


def row(length: int, number: int) -> Encoded:
    return {"input_ids": np.full(length, number, dtype=np.int32), "first": np.asarray(number)}


@pytest.fixture
def task() -> Task:
    return tasks.of(RunConfig.model_validate(CONFIG))


@pytest.fixture
def units() -> list[list[Encoded | Chunks]]:
    """A person with two records, of which the second has three rows; one with a record of one row; one with two rows."""
    return [[row(2, 0), [row(4, 1), row(4, 2), row(1, 3)]], [row(3, 4)], [[row(4, 5), row(2, 6)]]]


def test_rows_of_a_record_lie_together_and_records_of_a_unit(task: Task, units: list[list[Encoded | Chunks]]) -> None:
    examples = Examples.of(task, None, units)
    assert (len(examples), len(examples.records) - 1, examples.rows) == (3, 4, 7)
    assert [list(examples.rows_of(unit)) for unit in range(3)] == [[0, 1, 2, 3], [4], [5, 6]]
    assert [list(examples.of_record(number)) for number in range(4)] == [[0], [1, 2, 3], [4], [5, 6]]
    assert [int(examples.row(number)["first"]) for number in range(7)] == list(range(7))


def test_what_is_written_is_what_is_read(tmp_path: Path, task: Task, units: list[list[Encoded | Chunks]]) -> None:
    for number, kept in enumerate((units, [units[1]])):  # with chunks, and without
        folder = tmp_path / str(number)
        folder.mkdir()
        examples = Examples.of(task, None, kept)
        examples.save(folder)
        opened = Examples.open(task, None, folder)
        assert opened.units.tolist() == examples.units.tolist()
        assert opened.records.tolist() == examples.records.tolist()
        for place in range(examples.rows):
            assert opened.row(place)["input_ids"].tolist() == examples.row(place)["input_ids"].tolist()


def test_the_first_units_have_their_own_records_alone(task: Task, units: list[list[Encoded | Chunks]]) -> None:
    examples = Examples.of(task, None, units).first(2)
    assert (len(examples), examples.rows, examples.records.tolist()) == (2, 5, [0, 1, 4, 5])
