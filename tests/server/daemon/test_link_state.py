"""The link's state on disk: what arrays took in it goes back, so that a flood's room does not stay taken."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from server.daemon import superlink


@pytest.mark.parametrize("older", [False, True])
def test_what_is_deleted_in_the_links_state_goes_back_to_the_disk(tmp_path: Path, older: bool) -> None:
    database = tmp_path / "link.db"
    if older:  # of a SuperLink that made it by itself
        with closing(sqlite3.connect(database)) as link:
            link.execute("CREATE TABLE kept (x)")
    superlink._tidy(database)
    with closing(sqlite3.connect(database)) as link:
        link.execute("PRAGMA journal_mode = WAL")  # as Flower's
        link.execute("CREATE TABLE objects (content BLOB)")
        link.execute("INSERT INTO objects VALUES (zeroblob(20000000))")
        link.commit()
        link.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert database.stat().st_size > 20_000_000
        link.execute("DELETE FROM objects")
        link.commit()
        link.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert database.stat().st_size < 100_000
