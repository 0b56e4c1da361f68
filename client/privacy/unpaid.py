"""Answers that were begun and never charged: a worker died, ran out of memory, or was ended at the run's deadline.

Whether that happens may depend on who was drawn, and a coordinator sees it: it chooses deadlines and batches, and could ask
until it has learned by many failures, none of them charged, what the records are like. So only a few may follow one
another; the next charge begins the count anew, and so does a day.
"""

import json
import sqlite3
import time

MOST = 20  # in a row
LATELY = 86_400.0  # seconds
_PLACE = ("", "unpaid")  # among a ledger's states: of no run


def note(connection: sqlite3.Connection, dataset: str, times: int = 1) -> None:
    """Count answers that were begun and will not be charged; under the ledger's write lock."""
    kept = [*_lately(connection, dataset), *[time.time()] * times][-MOST:]
    values = [dataset, *_PLACE, json.dumps(kept).encode()]
    connection.execute("INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?)", values)


def forget(connection: sqlite3.Connection, dataset: str) -> None:
    """Begin the count anew: an answer was charged."""
    connection.execute("DELETE FROM states WHERE dataset = ? AND run = ? AND kind = ?", [dataset, *_PLACE])


def too_many(connection: sqlite3.Connection, dataset: str) -> bool:
    """Whether no further answer may be begun for now."""
    return len(_lately(connection, dataset)) >= MOST


def _lately(connection: sqlite3.Connection, dataset: str) -> list[float]:
    query = "SELECT state FROM states WHERE dataset = ? AND run = ? AND kind = ?"
    row = connection.execute(query, [dataset, *_PLACE]).fetchone()
    return [] if row is None else [at for at in json.loads(row[0]) if at > time.time() - LATELY]
