"""The site's dataset: read, check, split, encode.

Nothing of it leaves this module but examples for training and evaluation on this machine. A row that
breaks the declaration is an error with its number, before the site joins; the error stays at the site.
"""

import hashlib
import hmac
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.site import Dataset
from shared import records
from shared.errors import DataError, let_interrupts_through
from shared.examples import Examples
from shared.records import Record
from shared.tasks.base import Encoded, Task

log = logging.getLogger("moonflower.site")


@dataclass(frozen=True)
class Parts:
    """A site's units by part. A unit, with all its records, is in one part for the dataset's whole life."""

    train: Examples
    validation: Examples


def read(dataset: Dataset, task: Task) -> list[Record]:
    """Read the records, each checked against what the site and the run declare.

    Raises
    ------
    DataError
        Naming the row.
    """
    return records.read(dataset.path, task, dataset.layout(), labels=dataset.labels)


def is_validation(unit: str, key: bytes, share: float) -> bool:
    """Whether a unit is kept for validation: a keyed hash of its own id and nothing else."""
    value = int.from_bytes(hmac.digest(key, unit.encode(), "sha256")[:8], "big")
    return value < share * 2**64


def load(dataset: Dataset, task: Task, key: bytes, processor: Any) -> Parts:
    """Read, split and encode a site's records."""
    parts: dict[bool, dict[str, list[Record]]] = {False: {}, True: {}}
    for record in read(dataset, task):
        part = parts[is_validation(record.unit, key, dataset.validation)]
        part.setdefault(record.unit, []).append(record)
    return Parts(
        *(Examples.of(task, processor, _encoded(list(part.values()), task, processor)) for part in parts.values())
    )


def _encoded(units: Sequence[Sequence[Record]], task: Task, processor: Any) -> list[list[Encoded]]:
    """Encode each record alone; one that the run's processor cannot take gets a stand-in.

    A refusal would tell the coordinator, which chose the processor, that there is such a record.
    """
    strange = 0
    found: list[list[Encoded]] = []
    for unit in units:
        found.append([])
        for record in unit:
            try:
                encoded = task.encode(record.values, processor)
            except Exception as error:  # whatever it is
                let_interrupts_through(error)
                strange += 1
                encoded = task.stand_in(record.values)
            found[-1].append(encoded)
    if strange:
        log.warning("the run's processor cannot take %d records", strange)
    return found


def file_digest(path: Path) -> str:
    """SHA-256 of the records' file: what a warm process checks before it trusts what it has encoded."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
