"""What must hold before an account is opened: that its file is not lost, and that no record pays in two of them."""

import secrets
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.privacy import ledger_count
from client.privacy.ledger_count import Count
from client.privacy.ledger_file import said_in_one_line
from shared import ledger_chain
from shared.errors import ConfigError, DatabaseError


def find(connection: sqlite3.Connection, dataset: str) -> dict[str, Any] | None:
    """Return the header of a dataset's account, None where it has none."""
    query = "SELECT id, account, delta, rdp_order, opened_at FROM datasets WHERE id = ?"
    row = connection.execute(query, [dataset]).fetchone()
    return None if row is None else dict(zip(ledger_chain.HEADER, row, strict=True))


def new_account(connection: sqlite3.Connection, dataset: str, delta: float, order: int) -> dict[str, Any]:
    """Enter an account under a random name, and return its header."""
    now = datetime.now(UTC).isoformat()
    header = dict(zip(ledger_chain.HEADER, (dataset, secrets.token_hex(16), delta, order, now), strict=True))
    connection.execute("INSERT INTO datasets VALUES (?, ?, ?, ?, ?)", list(header.values()))
    return header


def refuse_shared_records(connection: sqlite3.Connection, dataset: str, apart_from: set[str]) -> None:
    """Refuse a dataset beside others that have spent, unless the site has said that they share no record."""
    for (other,) in connection.execute("SELECT DISTINCT dataset FROM spends ORDER BY dataset").fetchall():
        if other != dataset and other not in apart_from:
            raise ConfigError(
                f"dataset.id={dataset!r} is another account than {other!r}, which has spent in the same ledger: if no record "
                f"is in both, say so (site.toml, [dataset] shares_no_records_with = [{other!r}]); if one is, keep the old id."
            )


def refuse_a_lost_file(path: Path) -> None:
    """Refuse to begin anew where a counter tells of events and their ledger is gone."""
    with said_in_one_line(path):
        counts = {name: count for name, count in ledger_count.read(path).items() if count.number}
        if counts and not path.exists():  # in this order: a ledger is there before its counter counts
            name, count = next(iter(counts.items()))
            raise DatabaseError(
                f"The ledger {path} is missing, and its counter has seen {count.number} events of dataset {name!r}. Nothing "
                f"is sent. Restore the newest copy ({ledger_count.GUIDE})."
            )


def refuse_a_lost_account(path: Path, dataset: str) -> None:
    """Refuse to open an account anew where the counter tells of its events."""
    ledger_count.check(path, dataset, ledger_count.read(path).get(dataset) or Count(0, ledger_chain.NO_HEAD), 0, None)
