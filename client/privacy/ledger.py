"""A site's account of the privacy it has spent: append-only, durable before anything is sent.

The unit is one record of a declared dataset, or one person with all their records, under add-or-remove-one
neighbours; which of the two is fixed when a dataset is first opened. A unit is in one part for ever, training or validation, so the parts compose in parallel and a dataset's lifetime epsilon is its
larger part's. Spends are keyed by the dataset's declared id, over all runs and attempts, and nothing is ever
refunded.

Later runs are chosen after seeing earlier ones, so `max_epsilon` is enforced by a Rényi filter at one order
(Feldman and Zrnic 2021, "Individual Privacy Accounting via a Rényi Filter"), which, like delta, is fixed
when a dataset is first opened. A round reserves what it may release before it is computed, and is charged before
it is sent; each under the write lock, and each only where spent, reserved by others and asked fit together.

A file cannot defend itself against whoever may write it: triggers refuse what a mistake would do, the chain of
digests shows an edit, and the counter beside the file an older copy. Against whoever rewrites all of it nothing here
helps; the coordinator's own record of the numbers that it was told does, for its runs.
"""

import math
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from client.privacy import ledger_count, ledger_owner, limits, opening, unpaid
from client.privacy.account import Account
from client.privacy.events import PARTS, Part, Question, Reservation, Spend
from client.privacy.ledger_count import Count
from client.privacy.ledger_file import connect, one_name, said_in_one_line, tidy, transaction
from shared import accounting, ledger_chain
from shared.accounting import Release
from shared.errors import ConfigError, DatabaseError, DataError, RefusedError, RetryError
from shared.run_config import PrivacyUnit

__all__ = ["PARTS", "Account", "Ledger", "Part", "Question", "Reservation", "Spend"]


class Ledger(Account):
    """An account that can be charged; get it from `open`, in the process and thread that use it.

    Every error of the file, the disk or SQLite comes as a `DatabaseError` of one line; what was charged
    before it stays charged, and what was not is not sent.

    Attributes
    ----------
    max_epsilon, max_releases
        The site's limits on the dataset's life, as of this opening; whoever learns of others sets them.
    """

    def __init__(
        self,
        path: Path,
        connection: sqlite3.Connection,
        header: dict[str, Any],
        max_epsilon: float = math.inf,
        max_releases: int | None = None,
        apart_from: Iterable[str] = (),
    ) -> None:
        super().__init__(path, connection, header)
        self.max_epsilon, self.max_releases = max_epsilon, max_releases
        self._apart_from = frozenset(apart_from)
        self._owner: ledger_owner.Owner | None = None
        self._open: set[tuple[str, str]] = set()  # (run, request) that this ledger has reserved

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        dataset: str,
        delta: float,
        max_epsilon: float,
        unit: PrivacyUnit = "record",
        max_releases: int | None = None,
        order: int | None = None,
        apart_from: Iterable[str] = (),
    ) -> Self:
        """Open the account of `dataset` in the file, which is made (mode 0600) when it does not exist.

        The whole chain is verified, the counter of every account in the file compared and this one's raised, and
        what processes that died had reserved is given back.

        Parameters
        ----------
        max_epsilon, max_releases
            May change from one opening to the next, and hold from then on. The second is how many replies may
            ever be charged, of both parts and over all runs; None sets no such limit.
        unit
            Whom the promise is made to, for the dataset's life. What was spent on records is no bound for a person's, nor
            would a person's hold beside releases of another unit.
        order
            The Rényi filter's; without it, a new dataset gets `accounting.best_order` of the limit.
        apart_from
            Datasets of which the site says that they share no record with this one. Every other dataset in
            the file that has spent must be among them: else a record could pay in one account and not the other.

        Raises
        ------
        ConfigError
            If delta, order or unit differ from those that the dataset was opened with at first, or the limit is
            not above 0.
        DataError
            If another dataset in the file has spent and is not named in `apart_from`.
        DatabaseError
            If the file is not a ledger of this version, cannot be written, holds a broken chain, or if its
            counter has seen more, or other, events, of this dataset or another.
        """
        best = accounting.best_order(max_epsilon, delta)  # refuses bad values before a file is made
        path = one_name(path)
        opening.refuse_a_lost_file(path)
        connection = connect(path)
        try:
            with transaction(path, connection):
                opening.refuse_a_study(path, connection)
                header = opening.find(connection, dataset)
                if header is None:
                    order = best if order is None else order
                    accounting.rdp_budget(max_epsilon, delta, order)  # refuses an order that is none
                    header = opening.new_account(connection, dataset, delta, order, unit)
                if delta != header["delta"] or order not in (None, header["order"]):
                    raise ConfigError(
                        f"delta={delta} and Rényi order={order or 'as before'} were asked for dataset "
                        f"{dataset!r}, whose account was opened with delta={header['delta']} and order={header['order']}, "
                        "for its whole life: set those again (site.toml, [privacy] delta)."
                    )
                if unit != (opened := ledger_chain.unit_of(header)):
                    raise ConfigError(
                        f"the account of dataset {dataset!r} was opened with the {opened} as the unit of privacy, for its whole "
                        f"life, and {unit!r} is asked for now: set site.toml, [dataset] unit_column as it was then."
                    )
                ledger = cls(path, connection, header, max_epsilon, max_releases, apart_from)
                ledger._read_on()
                opening.refuse_a_lost_event(path, connection)
                opening.refuse_shared_records(connection, dataset, ledger._apart_from)
                ledger._raise_count()
                ledger._recover()
        except BaseException:
            connection.close()
            raise
        return ledger

    def close(self) -> None:
        """Close the file. What was charged is on disk already; what is still reserved is given back."""
        try:
            self._connection.close()
        finally:
            if self._owner is not None:
                self._owner.close()
                self._owner = None

    def recall(self, question: Question) -> bytes | None:
        """Return the kept reply if this very question was answered before, None if it is new.

        Raises
        ------
        RetryError
            If the id was answered with another digest or kind, or if a question of the same run and kind of
            a later round was answered: many noisy copies of one answer would average
            the noise away, so a superseded or differing question is never computed again.
        """
        run, name, kind = question.run, question.name, question.kind
        with said_in_one_line(self.path):
            row = self._connection.execute(
                "SELECT digest, kind, reply FROM spends LEFT JOIN replies ON spend = id "
                "WHERE dataset = ? AND run = ? AND request = ?",
                [self.dataset, run, name],
            ).fetchone()
            (newest,) = self._connection.execute(
                "SELECT max(round) FROM spends WHERE dataset = ? AND run = ? AND kind = ?",
                [self.dataset, run, kind],
            ).fetchone()
        if row is not None and (row[0], row[1]) != (question.digest, kind):
            raise RetryError(
                f"Request {name!r} of run {run!r} was answered as {row[1]!r} with digest {row[0]}, and "
                f"now comes as {kind!r} with {question.digest}: send a changed request under an id of its own."
            )
        if (newest is not None and newest > question.round) or (row is not None and row[2] is None):
            raise RetryError(
                f"Request {name!r} of run {run!r} ({kind}, round {question.round}) is superseded: "
                f"round {newest} was answered, and an earlier one never is again."
            )
        return None if row is None else bytes(row[2])

    @contextmanager
    def reserve(self, question: Question, release: Release, *, allow_unbounded: bool = False) -> Iterator[None]:
        """Hold the budget of an answer while it is computed; `charge` inside it turns it into the event.

        What was not charged is given back at the end, whatever ended it, and counted unless it was refused. After a crash it is given back at the
        next opening of the ledger, or held by the same question when that is asked again. Two processes
        that answer one question hold its budget once, for one answer only is ever charged.

        Parameters
        ----------
        release
            The most that the answer may release.
        allow_unbounded
            As for `charge`.

        Raises
        ------
        BudgetError
            If it does not fit beside what is spent and what others have reserved.
        DataError
            If another dataset has spent meanwhile, and the site has not said that the two share no record; or if too
            many answers in a row were begun and never charged.
        """
        key, unpaid_for = (question.run, question.name), False
        with transaction(self.path, self._connection):
            if unpaid.too_many(self._connection, self.dataset):
                raise DataError(
                    f"The last {unpaid.MOST} answers of dataset {self.dataset!r} were begun and never charged (the log says why), "
                    "and each tells the coordinator a little: no other is begun until a day has passed since the first."
                )
            self._refuse_beyond_limits(question, release, allow_unbounded)
            if self._owner is None:
                self._owner = ledger_owner.Owner(self.path)
            values = {"dataset": self.dataset, "owner": self._owner.token} | _columns(question, release)
            self._insert("INSERT OR REPLACE", "reservations", values)
        self._open.add(key)
        try:
            yield
        except RefusedError:  # it rests on public values
            raise
        except BaseException:
            unpaid_for = True
            raise
        finally:
            if key in self._open:
                with transaction(self.path, self._connection):
                    if unpaid_for:
                        unpaid.note(self._connection, self.dataset)
                    self._connection.execute(
                        "DELETE FROM reservations WHERE dataset = ? AND run = ? AND request = ? AND owner = ?",
                        [self.dataset, *key, self._owner.token],
                    )
                self._open.discard(key)

    def charge(
        self,
        question: Question,
        release: Release,
        reply: Callable[[int, str], bytes],
        state: bytes | None = None,
        *,
        allow_unbounded: bool = False,
    ) -> bytes:
        """Spend, and keep the reply and the state, in one durable commit; return the bytes to send.

        If another process answered the same question meanwhile, nothing is spent or kept here, and its bytes are
        returned. Call it before sending, and send only what it returns. A crash before its return
        may have charged a reply that was never sent, never the reverse. Earlier rounds' replies of the same
        run and kind are dropped; `state` (None keeps the last) replaces that of the same run and kind.

        Parameters
        ----------
        reply
            Makes the bytes from the event's number in the chain and the digest of the event before it. It is
            called under the write lock, so it should be quick.
        allow_unbounded
            The site's [privacy] allow_non_private: accept a release without noise, which makes the part's
            epsilon inf for ever, and whatever comes after one. Before that the filter holds all the same.

        Raises
        ------
        RetryError
            As `recall`, checked again under the write lock.
        BudgetError
            If the release does not fit into what is left of `max_epsilon`: that is checked again too, so the
            limit holds even for what was never reserved. Nothing is written.
        DataError
            As `reserve`.
        """
        key = (question.run, question.name)
        with transaction(self.path, self._connection):
            kept = self.recall(question)
            if kept is not None:
                return kept
            self._refuse_beyond_limits(question, release, allow_unbounded)
            self._read_on()
            number, head = self.number + 1, self.head
            event = {"number": number, "previous": head} | _columns(question, release)
            event["row"] = ledger_chain.row_digest(self._header, event)
            answer = reply(number, head)
            spend = self._insert("INSERT", "spends", {"dataset": self.dataset} | event)
            execute = self._connection.execute
            execute("INSERT INTO replies VALUES (?, ?)", [spend, answer])
            execute(
                "DELETE FROM replies WHERE spend IN (SELECT id FROM spends "
                "WHERE dataset = ? AND run = ? AND kind = ? AND round < ?)",
                [self.dataset, question.run, question.kind, question.round],
            )
            execute("DELETE FROM reservations WHERE dataset = ? AND run = ? AND request = ?", [self.dataset, *key])
            unpaid.forget(self._connection, self.dataset)
            if state is not None:
                kept_under = [self.dataset, question.run, question.kind]
                execute("INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?)", [*kept_under, state])
        self._open.discard(key)
        with transaction(self.path, self._connection):
            self._read_on()
            self._raise_count()
        return answer

    def check_plan(self, releases: Iterable[Release], part: Part, *, allow_unbounded: bool = False) -> None:
        """Raise BudgetError unless all of a run's releases still to come fit together; reserve and spend nothing."""
        limits.refuse_beyond_budget(self, self.max_epsilon, releases, part, "The planned run", allow_unbounded)

    def check_releases(self, asked: int, what: str = "The planned run", key: tuple[str, str] | None = None) -> None:
        """Raise BudgetError unless that many more replies may be charged, beside those that others are computing.

        `key` is the run and name of the question that asks, whose own reservation does not count.
        """
        limits.refuse_beyond_releases(self, self.max_releases, asked, what, key)

    def state(self, run: str, kind: str) -> bytes | None:
        """Return the state kept with the run's last charge of that kind; it is private to the site."""
        query = "SELECT state FROM states WHERE dataset = ? AND run = ? AND kind = ?"
        with said_in_one_line(self.path):
            row = self._connection.execute(query, [self.dataset, run, kind]).fetchone()
        return None if row is None else bytes(row[0])

    def pin(self, run: str, kind: str, value: bytes) -> bytes:
        """Keep `value` under (run, kind) unless something is kept there; return what is kept, durably.

        For what must not change after it was first used: whoever comes second, in whatever process, learns
        what the first one kept. It is kept before the run's first event, or with an empty run the dataset's.

        Raises
        ------
        DatabaseError
            Where nothing is kept and there are such events: what was kept is lost, and another must not take its place.
        """
        with transaction(self.path, self._connection):
            kept = self.state(run, kind)
            if kept is None:
                where = f"of dataset {self.dataset!r}" + (f", run {run!r}," if run else "")
                if any(run in ("", spend.question.run) for spend in self.spends()):
                    raise DatabaseError(
                        f"The ledger {self.path} holds events {where} and has lost the {kind!r} that they were drawn with, "
                        f"which is never kept anew: restore the newest sound copy ({ledger_count.GUIDE})."
                    )
                self._connection.execute("INSERT INTO states VALUES (?, ?, ?, ?)", [self.dataset, run, kind, value])
            return value if kept is None else kept

    def mark(self, run: str, kind: str) -> None:
        """Keep, durably and for good, that something happened in the run: `state` of (run, kind) is no longer None."""
        with transaction(self.path, self._connection):
            self._connection.execute(
                "INSERT OR IGNORE INTO states VALUES (?, ?, ?, ?)", [self.dataset, run, kind, b"marked"]
            )

    def _refuse_beyond_limits(self, question: Question, release: Release, allow_unbounded: bool) -> None:
        """Refuse what does not fit beside what is spent and reserved, or whose records may have paid in another account.

        It runs under the write lock: another dataset may have spent since this ledger was opened.
        """
        self._refuse_shared_records()
        key, what = (question.run, question.name), "This release"
        limits.refuse_beyond_budget(self, self.max_epsilon, [release], question.part, what, allow_unbounded, key)
        limits.refuse_beyond_releases(self, self.max_releases, 1, what, key)

    def _refuse_shared_records(self) -> None:
        opening.refuse_shared_records(self._connection, self.dataset, self._apart_from)

    def _insert(self, verb: str, table: str, values: dict[str, Any]) -> int | None:
        names, places = ", ".join(values), ", ".join("?" * len(values))
        return self._connection.execute(
            f"{verb} INTO {table} ({names}) VALUES ({places})",
            list(values.values()),
        ).lastrowid

    def _raise_count(self) -> None:
        """Bring the counter up to what was read, which is durable; under the write lock."""
        now = Count(self.number, self.head)
        if ledger_count.read(self.path).get(self.dataset) != now:
            ledger_count.write(self.path, self.dataset, now)

    def _recover(self) -> None:
        """Give back what owners that are dead had reserved; under the write lock."""
        execute = self._connection.execute
        for (owner,) in execute("SELECT DISTINCT owner FROM reservations").fetchall():
            if not ledger_owner.lives(self.path, owner):
                query = "SELECT dataset, count(*) FROM reservations WHERE owner = ? GROUP BY dataset"
                for dataset, times in execute(query, [owner]).fetchall():
                    unpaid.note(self._connection, dataset, times)
                execute("DELETE FROM reservations WHERE owner = ?", [owner])
        ledger_owner.tidy(self.path)
        tidy(self.path)


def _columns(question: Question, release: Release) -> dict[str, Any]:
    """Return an event's or a reservation's own values, by column."""
    values = asdict(question) | asdict(release) | {"at": datetime.now(UTC).isoformat()}
    return values | {"request": values.pop("name")}
