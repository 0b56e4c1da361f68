"""The counter beside a ledger: how many events each account has had, and the digest of the last.

A ledger that is put back from an older copy is sound in itself. The counter tells: it is a file of its own, durable,
only ever raised, and written after each commit, so it may lag behind its ledger by a crash but never runs ahead. A
ledger with fewer events than its counter, or with another event at that number, is not opened. Both files put back
together are not noticed here.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from shared.errors import DatabaseError

FORMAT, VERSION = "moonflower-ledger-count", 1
GUIDE = "docs/guides/ledger.md, 'When a ledger does not open'"


class BrokenCountError(DatabaseError):
    """The counter is damaged: what it had counted is not known."""


@dataclass(frozen=True)
class Count:
    """An account's newest event that is known to be durable: its number, 0 before the first, and its digest."""

    number: int
    head: str


def file_of(ledger: Path) -> Path:
    """Where the counter of a ledger stands."""
    return ledger.with_name(f"{ledger.name}.count")


def read(ledger: Path) -> dict[str, Count]:
    """Return each dataset's count; none where there is no counter.

    Raises
    ------
    BrokenCountError
        Where the file is no counter.
    """
    file = file_of(ledger)
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        if (held["format"], held["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {held['format']!r}, version {held['version']!r}")
        return {name: Count(int(value["number"]), str(value["head"])) for name, value in held["datasets"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCountError(
            f"{file} is not a ledger's counter ({type(error).__name__}): restore it from where the ledger comes from, or, if you "
            f"know that no event is missing, run: moonflower ledger verify --new-count ({GUIDE})."
        ) from None


def check(ledger: Path, dataset: str, count: Count | None, number: int, digest_at: str | None) -> None:
    """Refuse a ledger that its counter contradicts.

    Parameters
    ----------
    count
        What the counter says of the dataset; None where it says nothing.
    number
        Events in the ledger.
    digest_at
        The digest of the ledger's event of the counter's number; None where it has none.

    Raises
    ------
    DatabaseError
        Where events are missing, or are others, or where events have no counter at all.
    """
    if count is None:
        if number:
            raise DatabaseError(
                f"The ledger {ledger} holds {number} events of dataset {dataset!r}, and its counter {file_of(ledger)} none: "
                "whether it is the newest cannot be told. Copy the counter from where the ledger comes from, "
                f"or, if you know that nothing is missing, run: moonflower ledger verify --new-count ({GUIDE})."
            )
    elif number < count.number:
        raise DatabaseError(
            f"The ledger {ledger} holds {number} events of dataset {dataset!r}, and its counter has seen {count.number}: "
            f"it was put back from an older copy. Restore the newest copy ({GUIDE})."
        )
    elif count.number and digest_at != count.head:
        raise DatabaseError(
            f"Event {count.number} of dataset {dataset!r} in the ledger {ledger} is not the one that its counter has seen: it "
            f"was put back from an older copy and charged since, or edited. Restore the newest copy ({GUIDE})."
        )


def write(ledger: Path, dataset: str, count: Count) -> None:
    """Raise a dataset's count, durably; the file is whole at any moment. Call it under the ledger's write lock.

    Raises
    ------
    DatabaseError
        Where the count would fall.
    OSError
        Where the disk takes not all of it: the counter is as it was.
    """
    counts = read(ledger)
    if (held := counts.get(dataset)) is not None and held.number > count.number:
        raise DatabaseError(
            f"{file_of(ledger)} has seen {held.number} events of dataset {dataset!r}, not {count.number}."
        )
    replace(ledger, counts | {dataset: count})


def replace(ledger: Path, counts: dict[str, Count]) -> None:
    """Put these counts in the place of all: `write`, where there is no counter that could be read."""
    file = file_of(ledger)
    values = {name: {"number": each.number, "head": each.head} for name, each in sorted(counts.items())}
    text = json.dumps({"format": FORMAT, "version": VERSION, "datasets": values}, indent=1)
    draft = file.with_name(f"{file.name}.new")  # a crash's remains are overwritten: the write lock makes us alone
    descriptor = os.open(draft, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:  # takes all or raises; os.write may take a part
        stream.write(text)
        stream.flush()
        os.fsync(descriptor)
    draft.replace(file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
