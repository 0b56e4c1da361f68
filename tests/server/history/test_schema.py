"""Making, checking and upgrading the schema, on both databases."""

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from server.history import schema
from server.history.engine import connect, parse_url
from server.history.models import Base
from server.history.records import Trial
from server.history.store import History
from shared.errors import DatabaseError

ASSETS = Path(__file__).parents[2] / "assets"
OPEN = "import sys; from server.history.store import History; History.open(sys.argv[1]).close()"
BEFORE = schema.NEWEST  # also where a test puts another version in its place
FURTHER = f"{int(schema.NEWEST) + 1:04}"
SECOND = f"""
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "{FURTHER}", "{schema.NEWEST}", None, None

def upgrade():
    how = "always" if op.get_bind().dialect.name == "sqlite" else "auto"
    with op.batch_alter_table("rounds", recreate=how) as table:
        table.add_column(sa.Column("note", sa.String(), nullable=False, server_default="none"))
    #END
"""


def execute(url, statement):
    engine = create_engine(parse_url(url))
    try:
        with engine.begin() as connection:
            result = connection.execute(text(statement))
            return list(result) if result.returns_rows else []
    finally:
        engine.dispose()


@pytest.fixture
def next_version(tmp_path, monkeypatch):
    """Make this the Moonflower after next: one with a further revision of the schema."""

    def install(end="pass"):
        folder = tmp_path / "migrations"
        shutil.copytree(schema.MIGRATIONS, folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "versions" / f"{FURTHER}_note.py").write_text(SECOND.replace("#END", end))
        monkeypatch.setattr(schema, "MIGRATIONS", folder)
        monkeypatch.setattr(schema, "NEWEST", FURTHER)

    return install


def test_the_newest_revision_is_the_one_the_code_names():
    assert ScriptDirectory(str(schema.MIGRATIONS)).get_heads() == [schema.NEWEST]


def test_the_migrations_make_the_tables_that_the_models_declare(shared_url):
    History.open(shared_url).close()
    engine = connect(parse_url(shared_url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": schema.TABLE})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_a_new_database_has_the_newest_schema_and_opens_again(shared_url):
    assert History.current_revision(shared_url) is None
    History.open(shared_url).close()
    assert History.current_revision(shared_url) == schema.NEWEST
    with History.open(shared_url, create=False) as history:
        assert history.runs() == []


def test_to_look_at_a_database_does_not_make_it(tmp_path):
    url = f"sqlite:///{tmp_path / 'none.db'}"
    assert schema.status(url).state == "empty"
    with pytest.raises(DatabaseError, match="holds no history yet; the first run makes it"):
        History.open(url, create=False)
    assert list(tmp_path.iterdir()) == []


def test_looking_at_an_empty_postgresql_does_not_make_tables(postgres_url):
    with pytest.raises(DatabaseError, match="holds no history yet"):
        History.open(postgres_url, create=False)
    assert schema.status(postgres_url).state == "empty"


@pytest.mark.parametrize("asset", sorted(ASSETS.glob("history-*.db")), ids=lambda path: path.stem)
def test_a_database_of_each_past_revision_is_upgraded_and_read(asset, tmp_path):
    url = f"sqlite:///{shutil.copy(asset, tmp_path / 'old.db')}"
    assert History.current_revision(url) == asset.stem.removeprefix("history-")
    History.upgrade(url)
    with History.open(url) as history:
        runs = history.runs()
        assert [(run.id, run.status, run.rounds_done, run.private) for run in runs] == [
            ("open-2", "running", 1, False),
            ("lungs-1", "completed", 3, True),
        ]
        assert runs[0].config["privacy"]["epsilon"] == float("inf")
        assert runs[1].created_at.tzinfo is UTC
        last = history.last_round("lungs-1")
        assert (last.number, last.attempt, last.started_at) == (3, 2, datetime(2026, 3, 1, 12, 3, tzinfo=UTC))
        assert [spend.epsilon for spend in last.spends] == [1.5, 0.75]
        assert [attempt.outcome for attempt in history.attempts("lungs-1")] == ["lost", "completed"]
        assert len(history.participations("lungs-1")) == 6
        known = asset.stem != "history-0001"  # what was not recorded then is empty, not made up
        assert last.spends[0].mechanism == "gaussian"
        assert bool(last.spends[0].noise_source) is bool(last.spends[0].ledger_id) is known
        assert [spend.ledger_number for spend in last.spends] == ([5, 6] if known else [0, 0])
        assert sorted(history.ledgers()) == (["ab" * 16] if known else [])
        assert {run.origin for run in runs} == {"simulate"}
        federated = asset.stem not in {"history-0001", "history-0002"}
        assert [key.node_id for key in history.site_keys() if not key.revoked_at] == ([2**64 - 1] if federated else [])
        assert [told.site for told in history.progress("lungs-1")][-1:] == (["aku"] if federated else [])
        studied = asset.stem >= "history-0004"
        assert [run.trial for run in runs] == [Trial("lungs-5ca1e", 1, 7) if studied else None, None]
        assert [run.id for sweep in history.sweeps() for run in history.trials(sweep.id)] == ["open-2"] * studied
        assert history.events("lungs-1")[-1].text == "Attempt 2 completed."
        started = history.start_attempt("open-2", engine="flower")
        assert started.number == 2


def test_every_revision_has_a_database_kept_from_its_time():
    revisions = {each.revision for each in ScriptDirectory(str(schema.MIGRATIONS)).walk_revisions()}
    assert {path.stem.removeprefix("history-") for path in ASSETS.glob("history-*.db")} == revisions


def test_an_older_schema_is_refused_with_the_command_that_upgrades_it(shared_url, next_version, tmp_path):
    History.open(shared_url).close()
    next_version()
    with pytest.raises(DatabaseError) as caught:
        History.open(shared_url)
    message = str(caught.value)
    assert "has an older schema; back it up, then run `moonflower database upgrade --database " in message
    assert "\n" not in message
    assert History.current_revision(shared_url) == BEFORE


def test_an_upgrade_keeps_every_row_and_every_key(shared_url, next_version, new_run, new_round):
    with History.open(shared_url) as history:
        new_run(history)
        history.commit_round(new_round(1))
    next_version()
    with History.open(shared_url, upgrade=True) as history:
        assert history.last_round("lungs-1") == new_round(1)
        history.commit_round(new_round(2))
        with (
            pytest.raises(DatabaseError, match=r"(?i)foreign key"),
            history._session(writing=True) as session,
        ):
            session.execute(text("DELETE FROM rounds"))
    assert schema.status(shared_url).state == "newest"
    assert execute(shared_url, "SELECT DISTINCT note FROM rounds") == [("none",)]


def test_an_upgrade_that_fails_changes_nothing(shared_url, next_version, new_run, new_round):
    with History.open(shared_url) as history:
        new_run(history)
        history.commit_round(new_round(1))
    next_version(end="op.execute('SELECT * FROM no_such_table')")
    with pytest.raises(DatabaseError):
        History.upgrade(shared_url)
    assert History.current_revision(shared_url) == BEFORE
    assert execute(shared_url, "SELECT number FROM rounds") == [(1,)]
    with pytest.raises(SQLAlchemyError, match="note"):
        execute(shared_url, "SELECT note FROM rounds")


def test_a_newer_schema_asks_for_a_newer_moonflower(shared_url):
    History.open(shared_url).close()
    execute(shared_url, "UPDATE moonflower_revision SET version_num = '9999'")
    for attempt in (History.open, History.upgrade):
        with pytest.raises(DatabaseError, match="newer schema than this version knows; install a newer Moonflower"):
            attempt(shared_url)


def test_a_database_of_another_program_is_left_alone(shared_url):
    execute(shared_url, "CREATE TABLE runs (id INTEGER)")
    for attempt in (History.open, History.upgrade):
        with pytest.raises(DatabaseError, match="holds another program's tables; give Moonflower a database of its"):
            attempt(shared_url)
    assert schema.status(shared_url).state == "foreign"


def test_processes_that_open_a_fresh_database_at_once_all_succeed(shared_url):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    started = [
        subprocess.Popen([sys.executable, "-c", OPEN, shared_url], stderr=subprocess.PIPE, env=environment)
        for _ in range(4)
    ]
    errors = [process.communicate(timeout=60)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0, 0], errors
    assert History.current_revision(shared_url) == schema.NEWEST


def test_a_fresh_file_that_another_process_writes_is_waited_for(tmp_path):
    """SQLite says "locked" at once, without its timeout, when the journal's mode is changed meanwhile."""
    other = sqlite3.connect(tmp_path / "history.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, other.execute, ["COMMIT"])
    release.start()
    History.open(f"sqlite:///{tmp_path / 'history.db'}").close()
    release.join()
    other.close()


def test_tables_that_appear_between_two_looks_are_not_taken_for_another_programs(sqlite_url, monkeypatch):
    History.open(sqlite_url).close()
    looks = iter([None])  # the first look came before the other process had committed
    seen = schema.revision
    monkeypatch.setattr(schema, "revision", lambda connection: next(looks, seen(connection)))
    History.open(sqlite_url).close()


def test_threads_that_open_a_fresh_database_at_once_all_succeed(tmp_path):
    urls = [f"sqlite:///{tmp_path / name}.db" for name in "aaaabc"] + ["sqlite://", "sqlite://"]
    with ThreadPoolExecutor(len(urls)) as pool:
        for history in pool.map(History.open, urls):
            with history:
                assert history.runs() == []


def test_sqlite_is_set_up_to_lose_nothing(sqlite_url):
    with History.open(sqlite_url) as history, history._session() as session:
        pragmas = ["journal_mode", "foreign_keys", "synchronous", "busy_timeout"]
        found = [session.scalar(text(f"PRAGMA {name}")) for name in pragmas]
    assert found == ["wal", 1, 2, 30_000]


def test_the_reads_of_a_run_use_its_keys(sqlite_url):
    History.open(sqlite_url).close()
    for table in ("participations", "metrics", "spends"):
        plan = execute(
            sqlite_url,
            f"EXPLAIN QUERY PLAN SELECT * FROM rounds JOIN {table} ON {table}.round_id = rounds.id "  # noqa: S608
            "WHERE rounds.run_id = 'x' ORDER BY rounds.number DESC, position DESC LIMIT 9",
        )
        steps = [row[-1] for row in plan]
        assert all(step.startswith("SEARCH") for step in steps), steps  # neither scanned nor sorted


@pytest.mark.parametrize("asset", sorted(ASSETS.glob("history-*.db")), ids=lambda path: path.stem)
def test_the_asset_of_a_revision_is_a_whole_database(asset):
    with sqlite3.connect(f"file:{asset}?mode=ro&immutable=1", uri=True) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
