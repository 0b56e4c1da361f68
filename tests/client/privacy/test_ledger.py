import math
import multiprocessing
import os
import resource
import sqlite3
import stat
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from client.privacy.ledger import Ledger, Part, Question
from shared import accounting, ledger_chain
from shared.accounting import Release
from shared.errors import ConfigError, DatabaseError, MoonflowerError, PolicyError, RetryError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
FORK = multiprocessing.get_context("fork")  # real processes that start in a millisecond
ROUND = Release(0.032, 1.0, 32)
SCORES = Release(1.0, 20.0, 1)
NO_NOISE = Release(0.032, 0.0, 1)
DELTA = 1e-5


def opened(path: Path, *, dataset: str = "notes", max_epsilon: float = 8.0, **more: Any) -> Ledger:
    return Ledger.open(path, dataset=dataset, delta=more.pop("delta", DELTA), max_epsilon=max_epsilon, **more)


def asked(
    number: int,
    *,
    run: str = "run",
    request: str = "",
    digest: str = "d",
    kind: str = "train",
    part: Part = "train",
) -> Question:
    return Question(run, request or f"{kind}-{number}", digest, number, kind, part)


def answer(
    ledger: Ledger,
    number: int,
    *,
    release: Release = ROUND,
    reply: bytes = b"",
    state: bytes | None = None,
    allow_unbounded: bool = False,
    **question: Any,
) -> bytes:
    """Charge without a reservation: what a charge promises, it promises by itself."""
    reply = reply or f"reply {number}".encode()
    return ledger.charge(asked(number, **question), release, lambda *_: reply, state, allow_unbounded=allow_unbounded)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site" / "ledger.db"


def test_a_charge_is_there_after_reopening_with_its_reply_and_state(path: Path) -> None:
    with opened(path) as ledger:
        assert ledger.recall(asked(1)) is None
        assert answer(ledger, 1, state=b"optimiser") == b"reply 1"
    with opened(path) as ledger:
        assert ledger.recall(asked(1)) == b"reply 1"
        assert ledger.state("run", "train") == b"optimiser"
        assert ledger.state("run", "evaluate") is None
        (spend,) = ledger.spends()
    assert (spend.number, spend.question, spend.release) == (1, asked(1), ROUND)
    assert timedelta(0) <= datetime.now(UTC) - spend.at < timedelta(minutes=1)
    assert spend.previous == ledger_chain.NO_HEAD


def test_only_the_owner_can_read_the_ledger(path: Path) -> None:
    previous = os.umask(0)
    try:
        with opened(path) as ledger:
            with ledger.reserve(asked(1), ROUND):
                files = [file.name for file in path.parent.iterdir()]
                modes = {file.suffix: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
            answer(ledger, 1)
    finally:
        os.umask(previous)
    assert sorted(modes) == [".count", ".db", ".db-shm", ".db-wal", ".owner"]
    assert len(files) == 5
    assert set(modes.values()) == {0o600}
    path.chmod(0o644)
    opened(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_a_disk_that_another_machine_may_write_to_is_refused(
    path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = [("/", "ext4"), (str(path.parent.parent), kind), (f"{path.parent}x", "ext4")]
    monkeypatch.setattr(
        "psutil.disk_partitions", lambda **_: [SimpleNamespace(mountpoint=at, fstype=of) for at, of in mounts]
    )
    with pytest.raises(DatabaseError, match=rf"file system of several machines \({kind}\)"):
        opened(path)
    assert not path.exists()
    mounts.append((str(path.parent), "ext4"))
    opened(path).close()


def test_commits_reach_the_disk_before_a_charge_returns(path: Path) -> None:
    with opened(path) as ledger:
        pragmas = {p: ledger._connection.execute(f"PRAGMA {p}").fetchone()[0] for p in ("synchronous", "journal_mode")}
    assert pragmas == {"synchronous": 2, "journal_mode": "wal"}  # 2 is FULL: one sync a commit


# -- retries ------------------------------------------------------------------------------------------------


def test_a_retry_resends_the_same_bytes_and_spends_nothing(path: Path) -> None:
    with opened(path) as ledger:
        answer(ledger, 1, reply=b"first noise", state=b"one")
        assert answer(ledger, 1, reply=b"second noise", state=b"two") == b"first noise"
        assert ledger.recall(asked(1)) == b"first noise"
        assert len(ledger.spends()) == 1
        assert ledger.state("run", "train") == b"one"


def test_the_same_id_with_another_content_is_refused(path: Path) -> None:
    with opened(path) as ledger:
        answer(ledger, 1)
        with pytest.raises(RetryError, match=r"'train-1'.*digest d, .*now comes as 'train' with other"):
            ledger.recall(asked(1, digest="other"))
        with pytest.raises(RetryError, match="'evaluate'"):
            ledger.recall(asked(1, request="train-1", kind="evaluate"))
        with pytest.raises(RetryError):
            answer(ledger, 1, digest="other")
        assert len(ledger.spends()) == 1


def test_a_superseded_request_is_refused_whether_it_was_answered_or_not(path: Path) -> None:
    with opened(path) as ledger:
        for number in (1, 3):
            answer(ledger, number)
        for number in (1, 2):
            with pytest.raises(RetryError, match=f"round {number}.*superseded: round 3"):
                ledger.recall(asked(number))
            with pytest.raises(RetryError):
                answer(ledger, number)
        assert [spend.question.round for spend in ledger.spends()] == [1, 3]
        # Another kind, run or dataset has its own number.
        answer(ledger, 2, kind="evaluate", part="validation", release=SCORES)
        answer(ledger, 1, run="next run")
    with opened(path, dataset="scans", apart_from=["notes"]) as other:
        assert other.recall(asked(1)) is None


def test_only_the_newest_replies_are_kept_but_every_spend_is(path: Path) -> None:
    with opened(path, max_epsilon=50.0) as ledger:
        for number in range(1, 21):
            answer(ledger, number, reply=bytes(200_000), state=bytes(200_000))
        kept = ledger._connection.execute("SELECT count(*) FROM replies").fetchone()[0]
        assert (kept, len(ledger.spends())) == (1, 20)
    assert path.stat().st_size < 1_500_000


def test_a_later_attempt_may_ask_for_the_last_round_again_and_pays_for_it(path: Path) -> None:
    with opened(path) as ledger:
        answer(ledger, 1, request="attempt-1-round-1")
        answer(ledger, 1, request="attempt-2-round-1", reply=b"again")
        assert ledger.recall(asked(1, request="attempt-1-round-1")) == b"reply 1"
        assert ledger.recall(asked(1, request="attempt-2-round-1")) == b"again"
        assert ledger.run_releases("run", "train") == [ROUND, ROUND]
        answer(ledger, 2)
        with pytest.raises(RetryError, match="superseded"):
            ledger.recall(asked(1, request="attempt-1-round-1"))


def test_the_thousandth_round_is_charged_as_quickly_as_the_first(path: Path) -> None:
    """In processor time, which other programs do not lengthen; a charge takes 1.3 ms of it, reading the past again 22."""
    with opened(path, max_epsilon=1e6) as ledger:
        ledger._connection.execute("PRAGMA synchronous = OFF")
        for number in range(1, 1001):
            answer(ledger, number)
        began = time.process_time()
        for number in range(1001, 1011):
            answer(ledger, number)
        assert (time.process_time() - began) / 10 < 0.012
    began = time.process_time()
    opened(path, max_epsilon=1e6).close()  # this one reads and verifies all of it
    assert time.process_time() - began < 0.5


# -- the budget ---------------------------------------------------------------------------------------------


def test_charges_stop_before_the_limit_and_the_error_says_what_is_left(path: Path) -> None:
    with opened(path, max_epsilon=4.0) as ledger:
        budget, price = accounting.rdp_budget(4.0, DELTA, ledger.order), accounting.rdp(ROUND, ledger.order)
        fits = math.floor(budget / price)
        for number in range(1, fits + 1):
            answer(ledger, number)
        with pytest.raises(PolicyError) as refusal:
            answer(ledger, fits + 1)
        assert len(ledger.spends()) == fits > 2
        assert ledger.lifetime_epsilon("train") <= 4.0
        assert ledger.planned_epsilon("train") < ledger.lifetime_epsilon("train")
        assert ledger.recall(asked(fits + 1)) is None
    message = str(refusal.value)
    assert "\n" not in message
    for part in (
        "'notes'",
        "'train'",
        "limit of 4 ",
        "delta=1e-05",
        "[privacy] max_epsilon",
        f"{price:.4g} asked",
        "left",
    ):
        assert part in message


def test_the_parts_of_a_dataset_have_a_budget_each_and_the_larger_is_its_epsilon(path: Path) -> None:
    with opened(path) as ledger:
        assert ledger.lifetime_epsilon() == 0.0
        answer(ledger, 1)
        answer(ledger, 1, kind="evaluate", part="validation", release=SCORES)
        train, validation = ledger.lifetime_epsilon("train"), ledger.lifetime_epsilon("validation")
        assert 0 < validation < train == ledger.lifetime_epsilon()
        assert ledger.run_releases("run", "validation") == [SCORES]
        assert ledger.planned_epsilon("validation") == accounting.epsilon([SCORES], DELTA)


def test_the_budget_is_the_datasets_over_all_runs_and_no_other_datasets(path: Path) -> None:
    with opened(path) as ledger:
        for run in ("first", "second"):
            answer(ledger, 1, run=run)
        assert ledger.run_epsilon("second", "train", DELTA) == accounting.epsilon([ROUND], DELTA)
        assert ledger.planned_epsilon("train") == accounting.epsilon([ROUND, ROUND], DELTA)
        spent = ledger.lifetime_epsilon()
        assert spent == accounting.rdp_to_epsilon(2 * accounting.rdp(ROUND, ledger.order), ledger.order, DELTA)
    with opened(path, dataset="scans", apart_from=["notes"]) as other:
        assert (other.lifetime_epsilon(), other.spends()) == (0.0, [])
    with opened(path) as ledger:
        assert ledger.lifetime_epsilon() == spent


def test_a_plan_that_will_not_fit_is_refused_before_it_starts(path: Path) -> None:
    with opened(path, max_epsilon=8.0) as ledger:
        ledger.check_plan([ROUND] * 20, "train")
        with pytest.raises(PolicyError, match=r"planned run would take .* above the limit of 8"):
            ledger.check_plan([ROUND] * 60, "train")
        for number in range(1, 21):
            answer(ledger, number)
        with pytest.raises(PolicyError):
            ledger.check_plan([ROUND] * 20, "train")
        ledger.check_plan([ROUND] * 20, "validation")
        with pytest.raises(PolicyError, match="no noise"):
            ledger.check_plan([ROUND, NO_NOISE], "validation")
        ledger.check_plan([NO_NOISE], "validation", allow_unbounded=True)


def test_a_release_without_noise_needs_the_sites_word_and_ends_the_promise(path: Path) -> None:
    with opened(path) as ledger:
        with pytest.raises(PolicyError, match=r"no noise.*'notes'.*allow_non_private"):
            answer(ledger, 1, release=NO_NOISE)
        answer(ledger, 1, release=NO_NOISE, allow_unbounded=True)
        assert ledger.lifetime_epsilon() == ledger.planned_epsilon("train") == math.inf
        assert ledger.run_epsilon("run", "train", DELTA) == math.inf
        with pytest.raises(PolicyError, match="gone for ever"):
            answer(ledger, 2)
        answer(ledger, 2, allow_unbounded=True)
        answer(ledger, 1, kind="evaluate", part="validation", release=SCORES)
    with opened(path, max_epsilon=1000.0) as ledger:
        assert ledger.lifetime_epsilon("train") == math.inf
        assert ledger.lifetime_epsilon("validation") < math.inf


def test_the_sites_word_for_non_private_runs_does_not_lift_the_limit_of_private_ones(path: Path) -> None:
    with opened(path) as ledger, pytest.raises(PolicyError, match="max_epsilon"):
        answer(ledger, 1, release=Release(0.032, 1.0, 100_000), allow_unbounded=True)


def test_a_new_limit_holds_from_its_opening(path: Path) -> None:
    with opened(path, max_epsilon=8.0) as ledger:
        answer(ledger, 1)
    with opened(path, max_epsilon=1.0) as ledger, pytest.raises(PolicyError, match="limit of 1 "):
        answer(ledger, 2)
    with opened(path, max_epsilon=8.0) as ledger:
        assert ledger.order == accounting.best_order(8.0, DELTA)
        answer(ledger, 2)


def test_delta_and_order_are_fixed_for_the_life_of_a_dataset(path: Path) -> None:
    opened(path).close()
    with pytest.raises(ConfigError, match=r"delta=1e-06 .*'notes'.* opened with delta=1e-05 and order=4"):
        opened(path, delta=1e-6)
    with pytest.raises(ConfigError, match=r"order=7 .* order=4"):
        opened(path, order=7)
    opened(path, order=4).close()
    opened(path, max_epsilon=1.0).close()  # its best order would be another one
    with opened(path, dataset="scans", delta=1e-6, order=7) as other:
        assert (other.delta, other.order) == (1e-6, 7)


def test_settings_out_of_range_are_refused_before_a_file_is_made(path: Path) -> None:
    for wrong in ({"delta": 1.0}, {"max_epsilon": 0.0}, {"max_epsilon": math.nan}):
        with pytest.raises(ConfigError):
            opened(path, **wrong)  # type: ignore[arg-type]
    assert not path.exists()
    with pytest.raises(ConfigError, match="order=1"):
        opened(path, order=1)


# -- what may happen to the file ----------------------------------------------------------------------------

WITH_MORE_NOISE = (
    "dataset, number, run, round, kind, part, request, digest, mechanism, 9.0, sampling_rate, steps, at, previous, row"
)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE spends SET noise_multiplier = 9",
        "DELETE FROM spends",
        "UPDATE datasets SET delta = 0.1",
        "DELETE FROM datasets",
        "INSERT OR REPLACE INTO spends SELECT id, FIELDS FROM spends",
        "REPLACE INTO spends SELECT id + 1, FIELDS FROM spends",
        "REPLACE INTO spends SELECT id + 1, FIELDS WITH ANOTHER number FROM spends",
        "REPLACE INTO spends SELECT id + 1, FIELDS WITH ANOTHER request FROM spends",
        "REPLACE INTO datasets SELECT id, account, 0.1, rdp_order, opened_at FROM datasets",
    ],
)
def test_what_was_spent_cannot_be_changed(path: Path, statement: str) -> None:
    with opened(path) as ledger:
        answer(ledger, 1)
        before = ledger.spends()
    for name in ("number", "request"):
        other = WITH_MORE_NOISE.replace(f", {name}", f", {name} || 1")
        statement = statement.replace(f"FIELDS WITH ANOTHER {name}", other)
    statement = statement.replace("FIELDS", WITH_MORE_NOISE)
    connection = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"), connection:
        connection.execute(statement)
    connection.close()
    with opened(path) as ledger:
        assert ledger.spends() == before
        assert ledger.delta == DELTA


def with_other_content(path: Path) -> None:
    path.write_bytes(b"This is a letter, not a database. " * 100)


def as_an_empty_file(path: Path) -> None:
    path.touch()


def as_another_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE patients (name TEXT)")
    connection.close()


def of_version(number: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        opened(path).close()
        connection = sqlite3.connect(path)
        connection.execute(f"PRAGMA user_version = {number}")
        connection.close()

    return make


def read_only(path: Path) -> None:
    opened(path).close()
    with path.open("r+b") as file:  # SQLite's own mark for "a newer SQLite may write this"; binds root too
        file.seek(18)
        file.write(b"\x03")


def as_a_folder(path: Path) -> None:
    path.mkdir()


def with_only_its_log(path: Path) -> None:
    Path(f"{path}-wal").write_bytes(b"frames")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (with_other_content, "file is not a database"),
        (as_an_empty_file, "not a Moonflower ledger"),
        (as_another_database, "not a Moonflower ledger"),
        (of_version(1), "version 1, and this Moonflower reads version 2"),
        (of_version(3), "version 3, and this Moonflower reads version 2"),
        (read_only, "readonly"),
        (as_a_folder, "is a folder, not a ledger"),
        (with_only_its_log, "is missing, but not .*ledger.db-wal"),
    ],
)
def test_a_bad_file_is_one_clear_line_and_stays_as_it_was(
    path: Path, damage: Callable[[Path], None], says: str
) -> None:
    path.parent.mkdir()
    damage(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(DatabaseError, match=says) as failure:
        opened(path)
    assert "\n" not in str(failure.value)
    assert str(path) in str(failure.value)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatabaseError, match="cannot be used"):
        opened(tmp_path / "file" / "ledger.db")


def test_a_failed_creation_leaves_nothing_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", fail)
    with pytest.raises(DatabaseError, match="no links here"):
        opened(path)
    assert list(path.parent.iterdir()) == []


def test_a_full_database_loses_nothing(path: Path) -> None:
    with opened(path) as ledger:
        answer(ledger, 1, state=b"one")
        pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
        ledger._connection.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(DatabaseError, match="full"):
            answer(ledger, 2, reply=bytes(1_000_000), state=b"two")
        assert ledger.recall(asked(1)) == b"reply 1"
        assert ledger.state("run", "train") == b"one"
        assert len(ledger.spends()) == 1
        ledger._connection.execute(f"PRAGMA max_page_count = {pages + 1000}")
        answer(ledger, 2, reply=bytes(1_000_000), state=b"two")
        assert len(ledger.spends()) == 2


def test_a_charge_that_fails_halfway_leaves_nothing(path: Path) -> None:
    with opened(path) as ledger:
        ledger._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
        with pytest.raises(DatabaseError, match="too big"):  # its spend and its reply are written by then
            answer(ledger, 1, state=bytes(1_000_000))
        assert ledger.spends() == []
        assert answer(ledger, 1, reply=b"second try") == b"second try"


def test_a_kernel_that_refuses_to_write_more_loses_nothing(path: Path) -> None:
    def fill(report: Any) -> None:
        ledger = opened(path)
        answer(ledger, 1, state=b"one")
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, most))
        try:
            answer(ledger, 2, reply=bytes(1_000_000), state=b"two")
            report.put("was charged")
        except MoonflowerError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            answer(ledger, 3, state=b"three")
            report.put(f"{type(error).__name__}: {error}")

    report = FORK.SimpleQueue()
    child = FORK.Process(target=fill, args=(report,))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert report.get().startswith("DatabaseError: The ledger")
    with opened(path) as ledger:
        assert [spend.question.round for spend in ledger.spends()] == [1, 3]
        assert ledger.state("run", "train") == b"three"


def test_a_writer_that_keeps_the_lock_is_waited_for_then_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.privacy.ledger_file._BUSY_SECONDS", 0.2)
    with opened(path) as ledger:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseError, match="locked"):
            answer(ledger, 1)
        other.execute("ROLLBACK")
        other.close()
        answer(ledger, 1)


# -- several processes at once (their deaths are in test_kills.py) ------------------------------------------


def together(count: int, work: Callable[[int, Any], Any]) -> list[Any]:
    """Run `work(index, gate)` in as many processes at once, and return what each returns or raises."""
    gate, results = FORK.Barrier(count, timeout=30), FORK.Queue()

    def run(index: int) -> None:
        try:
            results.put((index, work(index, gate)))
        except Exception as error:
            results.put((index, error))

    children = [FORK.Process(target=run, args=(index,)) for index in range(count)]
    for child in children:
        child.start()
    outcomes = dict(results.get(timeout=40) for _ in children)
    for child in children:
        child.join(20)
    return [outcomes[index] for index in range(count)]


def test_a_ledger_that_another_process_makes_meanwhile_is_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exists = Path.exists
    charged = []

    def missing_but_made_right_after(self: Path) -> bool:
        if self != path:
            return exists(self)
        monkeypatch.setattr(Path, "exists", exists)
        with opened(path) as first:
            charged.append(answer(first, 1))
        return False

    monkeypatch.setattr(Path, "exists", missing_but_made_right_after)
    with opened(path) as second:
        assert [answer(second, 1, reply=b"another")] == charged
        assert len(second.spends()) == 1


def test_processes_that_spend_at_once_never_exceed_the_budget_together(tmp_path: Path) -> None:
    for attempt in range(8):
        path = tmp_path / f"{attempt}.db"

        def spend(index: int, gate: Any, path: Path = path) -> int:
            with opened(path, max_epsilon=3.0) as ledger:  # creation races too
                gate.wait()
                number = 0
                try:
                    while True:
                        number += 1
                        answer(ledger, number, run=f"run-{index}")
                except PolicyError:
                    return number - 1

        counts = together(4, spend)
        with opened(path, max_epsilon=3.0) as ledger:
            budget, price = (
                accounting.rdp_budget(3.0, DELTA, ledger.order),
                accounting.rdp(ROUND, ledger.order),
            )
            assert sum(counts) == len(ledger.spends()) == math.floor(budget / price)
            assert ledger.lifetime_epsilon() <= 3.0


def test_processes_that_answer_the_same_request_send_the_same_bytes(tmp_path: Path) -> None:
    for attempt in range(8):
        path = tmp_path / f"{attempt}.db"

        def reply(index: int, gate: Any, path: Path = path) -> bytes:
            with opened(path) as ledger:
                gate.wait()
                return answer(ledger, 1, reply=f"noise of {index}".encode(), state=str(index).encode())

        sent = together(3, reply)
        assert len(set(sent)) == 1
        with opened(path) as ledger:
            assert len(ledger.spends()) == 1
            assert sent[0] == f"noise of {ledger.state('run', 'train').decode()}".encode()  # type: ignore[union-attr]


def test_of_processes_with_differing_requests_under_one_id_one_wins(tmp_path: Path) -> None:
    def reply(index: int, gate: Any) -> bytes:
        with opened(tmp_path / "ledger.db") as ledger:
            gate.wait()
            return answer(ledger, 1, digest=f"digest-{index}")

    outcomes = together(3, reply)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["RetryError", "RetryError", "bytes"]
