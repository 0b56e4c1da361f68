"""The ledger of a study: the accounts of thousands of virtual sites in one file, each charged as a site's own is.

Nobody's privacy rests on it. So it goes without what guards a real one and takes time: a change is not flushed to the disk
(it outlives a killed process, not a power failure), no counter stands beside the file, and nothing is reserved, because one
worker answers for a site at a time. What is spent is counted by the same code, and the limits are the same. Each account is
marked, and refused wherever a site's own is asked for.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from client.privacy import opening
from client.privacy.events import Question
from client.privacy.ledger import Ledger
from client.privacy.ledger_file import connect, transaction
from client.site import Site
from shared import accounting
from shared.accounting import Release


class StudyLedger(Ledger):
    """One site's account; get it from `Study.ledger`."""

    @classmethod
    def of(cls, path: Path, connection: sqlite3.Connection, site: Site) -> Self:
        """Open the site's account, or begin it."""
        dataset, policy = site.dataset, site.privacy
        header = opening.find(connection, dataset.id)
        if header is None:
            with transaction(path, connection):
                order = accounting.best_order(policy.max_epsilon, policy.delta)
                header = opening.new_account(connection, dataset.id, policy.delta, order, dataset.unit)
                opening.mark_a_study(connection, dataset.id)
        ledger = cls(path, connection, header, policy.max_epsilon, policy.max_releases)
        ledger._read_on()
        return ledger

    def close(self) -> None:
        """Leave the file open: it is the study's."""

    @contextmanager
    def reserve(self, question: Question, release: Release, *, allow_unbounded: bool = False) -> Iterator[None]:
        """Refuse what does not fit; nobody else could spend it meanwhile."""
        self._refuse_beyond_limits(question, release, allow_unbounded)
        yield

    def _refuse_shared_records(self) -> None:
        """The partition puts no unit at two sites."""

    def _raise_count(self) -> None:
        """No counter is kept."""


class Study:
    """A study's file, open in one process."""

    def __init__(self, path: Path) -> None:
        self._path, self._connection = path, connect(path)
        self._connection.execute("PRAGMA synchronous = OFF")

    def ledger(self, site: Site) -> StudyLedger:
        """Open a site's account."""
        return StudyLedger.of(self._path, self._connection, site)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
