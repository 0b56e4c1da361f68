"""A ledger that was changed, or put back from an older copy, does not open; each says what is wrong and what to do."""

import json
import os
import resource
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from client.privacy import ledger_count
from client.privacy.account import Account
from client.privacy.ledger import Ledger, Question
from shared import ledger_chain
from shared.accounting import Release
from shared.errors import ConfigError, DatabaseError, DataError, NotFoundError

ROUND = Release(0.032, 1.0, 32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site" / "ledger.db"


def opened(path: Path, dataset: str = "notes", apart_from: tuple[str, ...] = ()) -> Ledger:
    return Ledger.open(path, dataset=dataset, delta=1e-5, max_epsilon=50.0, apart_from=apart_from)


def charge(path: Path, first: int, last: int, dataset: str = "notes", apart_from: tuple[str, ...] = ()) -> None:
    with opened(path, dataset, apart_from) as ledger:
        for number in range(first, last + 1):
            question = Question("run", f"run/{number}/train", "d", number, "train", "train")
            ledger.charge(question, ROUND, lambda n, head: f"{n} {head}".encode())


def refused(path: Path, dataset: str = "notes") -> str:
    """Return the one line with which both the site and the reading commands refuse; nothing is changed by it."""
    before = held(path)
    with pytest.raises(DatabaseError) as failure:
        opened(path, dataset)
    with pytest.raises(DatabaseError) as read:
        Account.read(path, dataset)
    assert str(failure.value) == str(read.value)
    assert "\n" not in str(failure.value)
    assert "is sent" not in str(failure.value)  # a reading command sends nothing anyway
    assert held(path) == before
    return str(failure.value)


def held(path: Path) -> list[object]:
    """Return the counter's bytes and the ledger's rows, without Moonflower."""
    count = ledger_count.file_of(path)
    values: list[object] = [count.exists() and count.read_bytes(), path.exists()]
    if path.exists():
        connection = sqlite3.connect(path)
        values += [connection.execute(f"SELECT * FROM {name}").fetchall() for name in ("datasets", "spends", "replies")]  # noqa: S608
        connection.close()
    return values


def tamper(path: Path, *statements: str) -> None:
    """Change the file as one who may write it can: the triggers go first."""
    connection = sqlite3.connect(path)
    for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        connection.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


# -- the chain ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("UPDATE spends SET noise_multiplier = 9 WHERE number = 2", "event 2 was edited"),
        ("UPDATE spends SET steps = 1 WHERE number = 5", "event 5 was edited"),
        ("UPDATE spends SET part = 'validation' WHERE number = 1", "event 1 was edited"),
        ("UPDATE spends SET run = 'other' WHERE number = 3", "event 3 was edited"),
        ("UPDATE spends SET mechanism = 'discrete-gaussian' WHERE number = 3", "event 3 was edited"),
        ("UPDATE spends SET row = previous WHERE number = 4", "event 4 was edited"),
        ("UPDATE datasets SET delta = 0.00002", "event 1 was edited"),
        ("UPDATE datasets SET rdp_order = 9", "event 1 was edited"),
        ("UPDATE datasets SET account = 'another'", "event 1 was edited"),
        ("DELETE FROM spends WHERE number = 3", "event 3 was dropped"),
        ("DELETE FROM spends WHERE number = 1", "event 1 was dropped"),
        ("UPDATE spends SET id = 100 WHERE number = 2", "event 2 was dropped: event 3 follows event 1"),
        ("DELETE FROM spends WHERE number = 5", "holds 4 events .* has seen 5"),
        ("DELETE FROM spends", "holds 0 events .* has seen 5"),
    ],
)
def test_whatever_is_changed_in_the_file_shows_at_the_next_opening(path: Path, change: str, says: str) -> None:
    charge(path, 1, 5)
    tamper(path, "PRAGMA foreign_keys = OFF", change)
    with pytest.raises(DatabaseError, match=says):
        Account.read(path, "notes")
    if "delta" not in change:  # the site's own delta is refused before
        refused(path)


def test_the_last_event_rewritten_with_a_digest_of_its_own_shows_by_the_counter(path: Path) -> None:
    charge(path, 1, 3)
    with Account.read(path, "notes") as account:
        export = account.export()
    event = export["events"][-1] | {"noise_multiplier": 9.0}
    row = ledger_chain.row_digest(export["dataset"], event)
    tamper(path, f"UPDATE spends SET noise_multiplier = 9, row = '{row}' WHERE number = 3")  # noqa: S608
    assert "Event 3 of dataset 'notes'" in refused(path)


def test_each_event_is_charged_with_its_number_and_the_head_before_it(path: Path) -> None:
    charge(path, 1, 3)
    with Account.read(path, "notes") as account:
        export = account.export()
        spends = account.spends()
    assert ledger_chain.verify(json.loads(json.dumps(export))) is None
    assert [event["number"] for event in export["events"]] == [1, 2, 3]
    assert [spend.previous for spend in spends] == [ledger_chain.NO_HEAD, *[spend.row for spend in spends[:-1]]]
    with opened(path) as ledger:
        kept = ledger.recall(spends[-1].question)
    assert kept == f"3 {spends[-1].previous}".encode()


# -- the counter -------------------------------------------------------------------------------------------------


def copy(path: Path, name: str) -> Path:
    """Copy the ledger, without its counter."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return Path(shutil.copy(path, path.with_name(name)))


def put_back(path: Path, older: Path) -> None:
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    shutil.copy(older, path)


def test_the_counter_follows_the_ledger(path: Path) -> None:
    charge(path, 1, 4)
    with Account.read(path, "notes") as account:
        assert ledger_count.read(path) == {"notes": ledger_count.Count(4, account.head)}
    assert ledger_count.file_of(path).stat().st_mode & 0o777 == 0o600


def test_an_older_copy_of_the_ledger_does_not_open(path: Path) -> None:
    charge(path, 1, 3)
    older = copy(path, "backup.db")
    charge(path, 4, 5)
    put_back(path, older)
    said = refused(path)
    assert "holds 3 events of dataset 'notes', and its counter has seen 5" in said
    assert "Restore the newest copy" in said


def test_an_older_copy_that_was_charged_since_does_not_open(path: Path) -> None:
    charge(path, 1, 3)
    older = copy(path, "backup.db")
    charge(path, 4, 5)
    count = ledger_count.file_of(path).read_bytes()
    put_back(path, older)
    ledger_count.file_of(path).unlink()
    Account.new_count(path, "notes")
    charge(path, 4, 6)  # at another place, say
    ledger_count.file_of(path).write_bytes(count)
    assert "Event 5 of dataset 'notes' in the ledger" in refused(path)


def test_a_ledger_that_is_gone_is_not_begun_anew(path: Path) -> None:
    charge(path, 1, 2)
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    assert "is missing, and its counter has seen 2 events" in refused(path)
    assert not path.exists()


def test_a_copy_from_before_the_account_was_opened_does_not_open(path: Path) -> None:
    opened(path, "other").close()
    older = copy(path, "backup.db")
    charge(path, 1, 2)
    put_back(path, older)
    assert "holds 0 events of dataset 'notes', and its counter has seen 2" in refused(path)


def test_a_crash_between_a_charge_and_its_counter_is_made_up_for(path: Path) -> None:
    charge(path, 1, 2)
    count = ledger_count.file_of(path).read_bytes()
    charge(path, 3, 3)
    ledger_count.file_of(path).write_bytes(count)
    Account.read(path, "notes").close()  # a counter may lag
    assert ledger_count.read(path)["notes"].number == 2
    opened(path).close()
    assert ledger_count.read(path)["notes"].number == 3


def test_a_counter_is_never_lowered(path: Path) -> None:
    charge(path, 1, 2)
    with pytest.raises(DatabaseError, match="has seen 2 events"):
        ledger_count.write(path, "notes", ledger_count.Count(1, "x"))


def damaged(text: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(text)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (Path.unlink, "holds 2 events of dataset 'notes', and its counter .* none"),
        (damaged(""), "is not a ledger's counter"),
        (damaged("[]"), "is not a ledger's counter"),
        (damaged('{"format": "moonflower-ledger-count", "version": 9}'), "is not a ledger's counter"),
        (damaged('{"format": "moonflower-ledger-count", "version": 1, "datasets": {}}'), "counter .* none"),
    ],
)
def test_a_counter_that_is_lost_or_broken_stops_the_site(path: Path, damage: Callable[[Path], None], says: str) -> None:
    charge(path, 1, 2)
    damage(ledger_count.file_of(path))
    with pytest.raises(DatabaseError, match=says):
        opened(path)
    refused(path)


def test_a_lost_counter_is_written_anew_on_the_sites_word_and_an_existing_one_never(path: Path) -> None:
    charge(path, 1, 2)
    with pytest.raises(ConfigError, match="counts dataset 'notes' already"):
        Account.new_count(path, "notes")
    ledger_count.file_of(path).unlink()
    assert Account.new_count(path, "notes") == 2
    charge(path, 3, 3)


def test_a_damaged_counter_says_what_to_do_and_is_mended_on_the_sites_word_for_every_account(path: Path) -> None:
    charge(path, 1, 2)
    charge(path, 1, 3, "scans", ("notes",))
    good = ledger_count.read(path)
    count = ledger_count.file_of(path)
    count.write_text(count.read_text()[:40])
    said = refused(path)
    assert "moonflower ledger verify --new-count" in said
    assert Account.new_count(path, "notes") == 2
    assert ledger_count.read(path) == good
    charge(path, 4, 4, "scans", ("notes",))


def test_a_disk_that_takes_a_part_of_the_counter_leaves_the_one_before(path: Path) -> None:
    charge(path, 1, 2)
    before = ledger_count.file_of(path).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # os.write writes that much, and says so
    try:
        with pytest.raises(OSError, match="too large"):
            ledger_count.write(path, "notes", ledger_count.Count(3, "f" * 64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ledger_count.file_of(path).read_bytes() == before
    charge(path, 3, 3)


@pytest.mark.parametrize("spent_before", [0, 2])
def test_an_older_copy_does_not_open_for_another_data_set_either(path: Path, spent_before: int) -> None:
    opened(path).close()
    charge(path, 1, spent_before)
    older = copy(path, "backup.db")
    charge(path, spent_before + 1, 3)
    put_back(path, older)
    for _ in range(2):
        said = refused(path, "scans")
        assert f"holds {spent_before} events of dataset 'notes', and its counter has seen 3" in said
    with pytest.raises(DatabaseError):
        opened(path, "scans", ("notes",))  # nor with the site's word


def test_a_reader_takes_a_charge_between_its_two_readings_for_no_loss(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charge(path, 1, 1)
    read = ledger_count.read

    def late(ledger: Path) -> dict[str, ledger_count.Count]:
        monkeypatch.undo()
        charge(path, 2, 2)
        return read(ledger)

    monkeypatch.setattr(ledger_count, "read", late)
    Account.read(path, "notes").close()


def test_a_fresh_account_needs_no_counter(path: Path) -> None:
    opened(path).close()
    ledger_count.file_of(path).unlink()
    charge(path, 1, 1)


def test_both_files_put_back_together_cannot_be_noticed_here(path: Path) -> None:
    """Said in docs/guides/ledger.md: only the coordinator's own record can tell."""
    charge(path, 1, 3)
    older, count = copy(path, "backup.db"), ledger_count.file_of(path).read_bytes()
    charge(path, 4, 5)
    put_back(path, older)
    ledger_count.file_of(path).write_bytes(count)
    with opened(path) as ledger:
        assert len(ledger.spends()) == 3


def test_what_is_not_there_is_said_and_not_made(path: Path) -> None:
    with pytest.raises(NotFoundError, match="There is no ledger"):
        Account.read(path, "notes")
    charge(path, 1, 1)
    with pytest.raises(NotFoundError, match="no account of dataset 'scans'; it has: 'notes'"):
        Account.read(path, "scans")


def test_a_folder_is_said_to_be_one(tmp_path: Path) -> None:
    for open_it in (lambda: Account.read(tmp_path, "notes"), lambda: opened(tmp_path)):
        with pytest.raises(DatabaseError, match=r"is a folder, not a ledger: name the file in it"):
            open_it()


# -- what else stands beside and within the ledger --------------------------------------------------------------


def test_a_ledger_has_one_counter_and_one_set_of_reservations_by_whatever_link_it_is_reached(path: Path) -> None:
    charge(path, 1, 1)
    link = path.parent.parent / "other" / "ledger.db"
    link.parent.mkdir()
    link.symlink_to(path)
    held = Question("run", "run/2/train", "d", 2, "train", "train")
    with opened(path) as ledger, ledger.reserve(held, ROUND):
        with opened(link) as other:
            assert [each.alive for each in other.reservations()] == [True]
        assert [each.alive for each in ledger.reservations()] == [True]
    charge(link, 2, 2)
    assert list(link.parent.iterdir()) == [link]
    assert ledger_count.read(path)["notes"].number == 2
    with Account.read(link, "notes") as account:
        assert account.path == path


def test_a_data_set_that_spends_meanwhile_stops_another_without_the_sites_word(path: Path) -> None:
    first, second = (Question("run", f"run/{number}/train", "d", number, "train", "train") for number in (1, 2))
    with opened(path) as notes, opened(path, "scans") as scans, opened(path, "x-rays", ("notes",)) as apart:
        with scans.reserve(first, ROUND):  # nobody has spent yet
            notes.charge(first, ROUND, lambda *_: b"reply")
            with pytest.raises(DataError, match="is another account than 'notes', which has spent"):
                scans.charge(first, ROUND, lambda *_: b"reply")
        with pytest.raises(DataError, match="is another account than 'notes'"), scans.reserve(second, ROUND):
            pytest.fail("it was computed")
        assert scans.spends() == []
        with apart.reserve(first, ROUND):
            apart.charge(first, ROUND, lambda *_: b"reply")
    with Account.read(path, "notes") as account:
        assert account.number == 1


@pytest.mark.parametrize(("run", "kind"), [("", "split"), ("run", "plan")])
def test_what_the_events_were_drawn_with_is_not_kept_anew_once_it_is_lost(path: Path, run: str, kind: str) -> None:
    with opened(path) as ledger:
        assert ledger.pin(run, kind, b"first") == b"first"
    charge(path, 1, 1)
    with opened(path) as ledger:
        assert ledger.pin(run, kind, b"second") == b"first"
        assert ledger.pin("next", "plan", b"another run's") == b"another run's"
    tamper(path, "DELETE FROM states")
    with opened(path) as ledger:
        with pytest.raises(DatabaseError, match=f"has lost the '{kind}' that they were drawn with"):
            ledger.pin(run, kind, b"second")
        assert ledger.state(run, kind) is None


def test_what_a_dead_maker_of_the_ledger_left_is_removed_and_a_live_ones_is_not(path: Path) -> None:
    opened(path).close()
    dead, live, other = (
        path.with_name(f"ledger.db.{name}") for name in ("0a" * 8 + ".new", "0b" * 8 + ".new", "my.new")
    )
    for file in (dead, Path(f"{dead}-wal"), live, other):
        file.touch()
        if file != live:
            os.utime(file, (time.time() - 7200,) * 2)
    opened(path).close()
    assert (dead.exists(), Path(f"{dead}-wal").exists(), live.exists(), other.exists()) == (False, False, True, True)
