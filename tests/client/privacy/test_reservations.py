"""What a round may cost is held while it is computed, against every other run, and given back when nothing came of it."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from client.privacy.ledger import Ledger, Part, Question
from shared import accounting
from shared.accounting import Release
from shared.errors import BudgetError, DatabaseError, PolicyError, RefusedError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
FORK = multiprocessing.get_context("fork")
ROUND = Release(0.032, 1.0, 32)
DELTA = 1e-5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def opened(path: Path, rounds: int = 2, dataset: str = "notes") -> Ledger:
    """Open a ledger whose budget holds that many of `ROUND` and a half."""
    order = 4
    limit = accounting.rdp_to_epsilon((rounds + 0.5) * accounting.rdp(ROUND, order), order, DELTA)
    return Ledger.open(path, dataset=dataset, delta=DELTA, max_epsilon=limit, order=order)


def asked(number: int, run: str = "run", part: Part = "train", digest: str = "d") -> Question:
    return Question(run, f"{run}/{number}/{part}", digest, number, part, part)


def charge(ledger: Ledger, question: Question, release: Release = ROUND) -> bytes:
    return ledger.charge(question, release, lambda number, head: f"{number} after {head[:8]}".encode())


def test_what_is_reserved_is_held_against_every_other_run(path: Path) -> None:
    with opened(path) as ledger, opened(path) as other:
        with ledger.reserve(asked(1), ROUND), other.reserve(asked(1, "second"), ROUND):
            with pytest.raises(BudgetError, match=r"reserved by rounds under way") as refusal:
                ledger.check_plan([ROUND], "train")
            assert "\n" not in str(refusal.value)
            third = asked(1, "third")
            with pytest.raises(BudgetError), other.reserve(third, ROUND):
                pytest.fail("it was computed")
            with pytest.raises(BudgetError):
                charge(other, third)  # nor can it be charged without a reservation
            ledger.check_plan([ROUND] * 2, "validation")  # the other part has its own
            charge(ledger, asked(1))
            charge(other, asked(1, "second"))
        assert len(ledger.spends()) == 2
        assert ledger.reservations() == []


def test_a_reservation_holds_the_budget_until_the_reply_is_charged(path: Path) -> None:
    """A limit that falls meanwhile, or a rival without a reservation, cannot take it away unseen."""
    with opened(path, rounds=1) as ledger, opened(path, rounds=1) as rival:
        with ledger.reserve(asked(1), ROUND):
            with pytest.raises(BudgetError):
                charge(rival, asked(1, "rival"))
            assert charge(ledger, asked(1)) == b"1 after 00000000"
        assert [spend.question.run for spend in rival.spends()] == ["run"]


def test_what_was_charged_is_no_longer_reserved_and_what_failed_is_given_back(path: Path) -> None:
    with opened(path) as ledger:
        with ledger.reserve(asked(1), ROUND):
            (held,) = ledger.reservations()
            assert (held.question, held.release, held.alive) == (asked(1), ROUND, True)
            charge(ledger, asked(1))
            assert ledger.reservations() == []
        with pytest.raises(RuntimeError), ledger.reserve(asked(2), ROUND):
            raise RuntimeError("out of memory")
        assert ledger.reservations() == []
        with pytest.raises(KeyboardInterrupt), ledger.reserve(asked(2), ROUND):
            raise KeyboardInterrupt
        with ledger.reserve(asked(2), ROUND):
            pass
        charge(ledger, asked(2))
        assert len(ledger.spends()) == 2
    assert [file.suffix for file in path.parent.iterdir() if file.suffix == ".owner"] == []


def test_a_refused_round_is_given_back_by_the_whole_site(desk: Any) -> None:
    arrays = desk.start()
    arrays.pop(next(iter(arrays)))
    for ask in (desk.train, desk.evaluate):
        with pytest.raises(RefusedError, match="arrays"):
            ask(1, arrays)
    with desk.ledger() as ledger:
        assert ledger.reservations() == []
        assert ledger.spends() == []


def test_one_question_asked_twice_at_once_is_reserved_once(path: Path) -> None:
    with opened(path, rounds=1) as ledger, opened(path, rounds=1) as other:
        with ledger.reserve(asked(1), ROUND), other.reserve(asked(1), ROUND):
            assert charge(other, asked(1)) == charge(ledger, asked(1))
            assert ledger.reservations() == []
        assert len(ledger.spends()) == 1


def test_many_runs_at_once_hold_no_more_than_the_budget(path: Path) -> None:
    with ExitStack() as stack:
        ledgers = [stack.enter_context(opened(path, rounds=5)) for _ in range(9)]
        taken = 0
        for number, ledger in enumerate(ledgers):
            try:
                stack.enter_context(ledger.reserve(asked(1, f"run-{number}"), ROUND))
                taken += 1
            except BudgetError:
                continue
        assert taken == 5
        for number in range(taken):
            charge(ledgers[number], asked(1, f"run-{number}"))
        assert ledgers[-1].lifetime_epsilon() <= ledgers[-1].max_epsilon
    with opened(path, rounds=5) as ledger:
        assert len(ledger.spends()) == 5


def test_a_release_without_noise_that_is_only_reserved_does_not_lift_the_limit(path: Path) -> None:
    none = Release(0.032, 0.0, 32)
    with opened(path, rounds=1) as ledger, opened(path, rounds=1) as other:
        with ledger.reserve(asked(1), none, allow_unbounded=True), pytest.raises(BudgetError):
            other.check_plan([ROUND] * 2, "train", allow_unbounded=True)
        with pytest.raises(PolicyError, match="no noise"), ledger.reserve(asked(1), none):
            pytest.fail("it was computed")


# -- whoever made it may die -------------------------------------------------------------------------------------


def process(work: Callable[[Any], None]) -> Any:
    """Start a process that reports when it holds its reservation, and then waits to be killed."""
    ready = FORK.Event()

    def run() -> None:
        work(ready)

    child = FORK.Process(target=run)
    child.start()
    assert ready.wait(20)
    return child


def hold(path: Path, question: Question) -> Callable[[Any], None]:
    def work(ready: Any) -> None:
        with opened(path, rounds=1) as ledger, ledger.reserve(question, ROUND):
            ready.set()
            signal.pause()

    return work


def test_a_living_process_keeps_its_reservation_and_a_dead_one_loses_it(path: Path) -> None:
    child = process(hold(path, asked(1)))
    with opened(path, rounds=1) as ledger:
        assert [held.alive for held in ledger.reservations()] == [True]
        with pytest.raises(BudgetError), ledger.reserve(asked(1, "other"), ROUND):
            pytest.fail("it was computed")
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert [held.alive for held in ledger.reservations()] == [False]
    with opened(path, rounds=1) as ledger:
        assert ledger.reservations() == []
        assert [file for file in path.parent.iterdir() if file.suffix == ".owner"] == []
        with ledger.reserve(asked(1, "other"), ROUND):
            charge(ledger, asked(1, "other"))


def test_a_request_that_is_asked_again_takes_its_dead_reservation_over(path: Path) -> None:
    child = process(hold(path, asked(1)))
    with opened(path, rounds=1) as ledger:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        with ledger.reserve(asked(1), ROUND):  # in a ledger that was open all the time
            charge(ledger, asked(1))
        assert ledger.reservations() == []


def test_a_stopped_process_is_not_a_dead_one(path: Path) -> None:
    child = process(hold(path, asked(1)))
    os.kill(child.pid, signal.SIGSTOP)
    with opened(path, rounds=1) as ledger:
        assert [held.alive for held in ledger.reservations()] == [True]
    os.kill(child.pid, signal.SIGKILL)
    child.join()


def test_a_ledger_that_is_moved_without_its_owners_files_gives_back_what_they_held(path: Path, tmp_path: Path) -> None:
    child = process(hold(path, asked(1)))
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    moved = tmp_path / "elsewhere" / "ledger.db"
    moved.parent.mkdir()
    for suffix in ("", "-wal", "-shm", ".count"):
        Path(f"{path}{suffix}").rename(f"{moved}{suffix}")
    with opened(moved, rounds=1) as ledger:
        assert ledger.reservations() == []


def test_where_an_owner_cannot_be_asked_its_reservation_stands(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = process(hold(path, asked(1)))
    os.kill(child.pid, signal.SIGKILL)
    child.join()

    def refuse(*_: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr("client.privacy.ledger_owner.fcntl.flock", refuse)
    with opened(path, rounds=1) as ledger:
        assert [held.alive for held in ledger.reservations()] == [True]


def test_a_reservation_that_cannot_be_written_is_one_line_and_nothing_is_computed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.privacy.ledger_file._BUSY_SECONDS", 0.2)
    with opened(path) as ledger, opened(path) as other:
        other._connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseError, match="locked"), ledger.reserve(asked(1), ROUND):
            pytest.fail("it was computed")
        other._connection.execute("ROLLBACK")
        assert ledger.reservations() == []
