"""The ledger of a study: the accounts of thousands of virtual sites in one file, each charged as a site's own is.

Nobody's privacy rests on it. So it goes without what guards a real one and takes time: a change is not flushed to the disk
(it outlives a killed process, not a power failure), no counter stands beside the file, and nothing is reserved, because one
worker answers for a site at a time. What is spent is counted by the same code, and the limits are the same. Each account is
marked, and refused wherever a site's own is asked for.
"""

import sqlite3
from collections import OrderedDict
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

KEPT = 1000  # accounts in memory: some 10 kB each, after a few rounds


class StudyLedger(Ledger):
    """One site's account; get it from `Study.ledger`."""

    @classmethod
    def of(cls, path: Path, connection: sqlite3.Connection, site: Site) -> Self:
        """Open the site's account, or begin it."""
        dataset, policy = site.dataset, site.privacy
        header = opening.find(connection, dataset.id)
        if header is None:
            order = accounting.best_order(policy.max_epsilon, policy.delta)
            with transaction(path, connection):
                header = opening.find(connection, dataset.id)  # by now another process may have begun it
                if header is None:
                    header = opening.new_account(connection, dataset.id, policy.delta, order, dataset.unit)
                    opening.mark_a_study(connection, dataset.id)
        ledger = cls(path, connection, header, policy.max_epsilon, policy.max_releases)
        ledger._read_on()
        return ledger

    def read_on(self, site: Site) -> None:
        """Read what was charged since, and hold to the site's limits as they are now."""
        self.max_epsilon, self.max_releases = site.privacy.max_epsilon, site.privacy.max_releases
        self._read_on()

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
        self._read: OrderedDict[str, StudyLedger] = OrderedDict()  # the accounts that were asked for last

    def ledger(self, site: Site) -> StudyLedger:
        """Open a site's account; of one that was read before, what was charged since is read, by whatever process."""
        ledger = self._read.pop(site.dataset.id, None)
        if ledger is None:
            ledger = StudyLedger.of(self._path, self._connection, site)
        else:
            ledger.read_on(site)
        self._read[site.dataset.id] = ledger
        if len(self._read) > KEPT:
            self._read.popitem(last=False)
        return ledger

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
