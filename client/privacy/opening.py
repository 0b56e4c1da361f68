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
from shared.errors import DatabaseError, DataError
from shared.run_config import PrivacyUnit

_UNIT = "WHERE dataset = ? AND run = '' AND kind = 'unit'"
_STUDY = ("", "study")  # among a ledger's states: of no run


def find(connection: sqlite3.Connection, dataset: str) -> dict[str, Any] | None:
    """Return the header of a dataset's account, None where it has none."""
    query = "SELECT id, account, delta, rdp_order, opened_at FROM datasets WHERE id = ?"
    row = connection.execute(query, [dataset]).fetchone()
    if row is None:
        return None
    unit = connection.execute(f"SELECT state FROM states {_UNIT}", [dataset]).fetchone()  # noqa: S608 - our own
    header = dict(zip(ledger_chain.HEADER, row, strict=True))
    return header if unit is None else header | {"unit": bytes(unit[0]).decode(errors="replace")}


def new_account(
    connection: sqlite3.Connection, dataset: str, delta: float, order: int, unit: PrivacyUnit
) -> dict[str, Any]:
    """Enter an account under a random name, and return its header.

    The unit is kept among the dataset's states, where it is not the record, and with the header in every event's digest: an
    account whose state is lost or edited has a broken chain.
    """
    now = datetime.now(UTC).isoformat()
    header = dict(zip(ledger_chain.HEADER, (dataset, secrets.token_hex(16), delta, order, now), strict=True))
    connection.execute("INSERT INTO datasets VALUES (?, ?, ?, ?, ?)", list(header.values()))
    if unit != "record":
        connection.execute("INSERT INTO states VALUES (?, '', 'unit', ?)", [dataset, unit.encode()])
        header["unit"] = unit
    return header


def mark_a_study(connection: sqlite3.Connection, dataset: str) -> None:
    """Mark an account as a simulation's: it is charged as a site's own is, and no promise rests on it."""
    connection.execute("INSERT INTO states VALUES (?, ?, ?, ?)", [dataset, *_STUDY, b"marked"])


def refuse_a_study(path: Path, connection: sqlite3.Connection) -> None:
    """Refuse a simulation's ledger where a site's is asked for.

    Raises
    ------
    DatabaseError
        Naming the file.
    """
    if connection.execute("SELECT 1 FROM states WHERE run = ? AND kind = ? LIMIT 1", _STUDY).fetchone():
        raise DatabaseError(
            f"The ledger {path} is a simulated study's: no promise rests on it, and nothing is stated of it. What its sites "
            "spent: `moonflower history spends RUN`."
        )


def refuse_shared_records(connection: sqlite3.Connection, dataset: str, apart_from: frozenset[str]) -> None:
    """Refuse a dataset beside others that have spent, unless the site has said that they share no record.

    Raises
    ------
    DataError
        It names the other dataset, which no coordinator need know of: its text stays at the site.
    """
    query = "SELECT id FROM datasets WHERE EXISTS (SELECT 1 FROM spends WHERE dataset = datasets.id) ORDER BY id"
    for (other,) in connection.execute(query).fetchall():
        if other != dataset and other not in apart_from:
            raise DataError(
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
                f"The ledger {path} is missing, and its counter has seen {count.number} events of dataset {name!r}. "
                f"Restore the newest copy ({ledger_count.GUIDE})."
            )


def refuse_a_lost_event(path: Path, connection: sqlite3.Connection) -> None:
    """Refuse a ledger that its counter contradicts, whichever account is asked for: in an older copy all are old.

    A reader holds no lock. Accounts are read first, for each is counted before it is committed, then the counter, then
    the events: what is charged meanwhile makes the ledger the newer one.

    Raises
    ------
    DatabaseError
        As `ledger_count.check`, for any dataset of the ledger or of its counter.
    """
    with said_in_one_line(path):
        known = [name for (name,) in connection.execute("SELECT id FROM datasets").fetchall()]
        counts = ledger_count.read(path)
        for dataset in sorted({*counts, *known}):
            count = counts.get(dataset)
            (number,) = connection.execute(
                "SELECT ifnull(max(number), 0) FROM spends WHERE dataset = ?", [dataset]
            ).fetchone()
            at = connection.execute(
                "SELECT row FROM spends WHERE dataset = ? AND number = ?", [dataset, count.number if count else 0]
            ).fetchone()
            ledger_count.check(path, dataset, count, number, at[0] if at else None)


def last_events(connection: sqlite3.Connection) -> dict[str, Count]:
    """Return each account's newest event, as the file has it."""
    query = (
        "SELECT datasets.id, ifnull(max(number), 0), row FROM datasets LEFT JOIN spends ON dataset = datasets.id "
        "GROUP BY datasets.id"  # where there is max(), SQLite takes the other columns from its row
    )
    return {name: Count(number, row or ledger_chain.NO_HEAD) for name, number, row in connection.execute(query)}
