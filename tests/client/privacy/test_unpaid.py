"""Answers that were begun and never charged tell a little for nothing: only a few follow one another."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client.privacy import unpaid
from client.privacy.engine import Gradients
from client.privacy.ledger import Ledger, Question
from shared import metrics
from shared.accounting import Release
from shared.errors import DataError, RefusedError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
FORK = multiprocessing.get_context("fork")
ROUND = Release(0.032, 1.0, 32)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(unpaid, "MOST", 3)
    return tmp_path / "ledger.db"


def opened(path: Path) -> Ledger:
    return Ledger.open(path, dataset="notes", delta=1e-5, max_epsilon=100.0)


def asked(number: int, run: str = "run") -> Question:
    return Question(run, f"{run}/{number}/train", "d", number, "train", "train")


def begin(path: Path, number: int, error: BaseException | None = None, run: str = "run") -> None:
    """Begin an answer, and charge it unless there is an error."""
    question = asked(number, run)
    with opened(path) as ledger, ledger.reserve(question, ROUND):
        if error is not None:
            raise error
        ledger.charge(question, ROUND, lambda *_: b"reply")


def die(path: Path, number: int) -> None:
    def work() -> None:
        with opened(path) as ledger, ledger.reserve(asked(number, f"run-{number}"), ROUND):
            os.kill(os.getpid(), signal.SIGKILL)

    child = FORK.Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def fail(path: Path, number: int) -> None:
    with pytest.raises(MemoryError):
        begin(path, number, MemoryError("of a machine"), f"run-{number}")


@pytest.mark.parametrize("lose", [die, fail])
def test_after_a_few_no_other_is_begun_whatever_the_run_until_a_day_has_passed(
    path: Path, lose: Callable[[Path, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        lose(path, number)
    with pytest.raises(DataError, match=r"last 3 answers of dataset 'notes' were begun and never charged"):
        begin(path, 1, run="another")
    monkeypatch.setattr(unpaid, "LATELY", 0.0)
    begin(path, 1, run="another")
    with opened(path) as ledger:
        assert len(ledger.spends()) == 1


def test_a_charge_begins_the_count_anew(path: Path) -> None:
    for number in range(1, 4):
        fail(path, 2 * number)
        die(path, 2 * number + 1)
        begin(path, number)


def test_refusals_rest_on_public_values_and_do_not_count(path: Path) -> None:
    for number in range(5):
        with pytest.raises(RefusedError):
            begin(path, number, RefusedError("a probe's, say"))
    begin(path, 1)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_batch_that_fits_no_memory_is_tried_a_few_times_only(
    path: Path, kind: str, new_desk: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator chooses the batch: how large a one fails is how many records of a length there are."""
    desk, tries, right = new_desk(), [], Gradients.add

    def full(*_: Any, **__: Any) -> None:
        tries.append(1)
        raise torch.OutOfMemoryError

    def full_of_records(self: Gradients, objective: Any, *rest: Any, **named: Any) -> Any:
        return full() if objective.records > 3 else right(self, objective, *rest, **named)

    monkeypatch.setattr(Gradients, "add", full_of_records)
    monkeypatch.setattr(metrics, "cells", full)
    for number in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            getattr(desk, kind)(run=f"run-{number}")
    with pytest.raises(DataError, match="never charged"):
        getattr(desk, kind)(run="run-3")
    assert (len(tries), desk.spent()) == (3, 0)
