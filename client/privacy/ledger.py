"""A site's account of the privacy it has spent: append-only, durable before anything is sent.

The unit is one record of a declared dataset, under add-or-remove-one neighbours. A record is in one part
for ever, training or validation, so the parts compose in parallel and a dataset's lifetime epsilon is its
larger part's. Spends are keyed by the dataset's declared id, over all runs and attempts, and nothing is ever
refunded.

Later runs are chosen after seeing earlier ones, so `max_epsilon` is enforced by a Rényi filter at one order
(Feldman and Zrnic 2021, "Individual Privacy Accounting via a Rényi Filter"), which, like delta, is fixed
when a dataset is first opened. The filter runs under the same write lock as the spend.

A file cannot defend itself against whoever may write it: triggers refuse what a mistake would do, not an
attacker, and a file that is deleted, or put back from an old backup, has forgotten what was spent since.
"""

import math
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from client.privacy.ledger_file import connect, said_in_one_line, transaction
from shared import accounting
from shared.accounting import Release
from shared.errors import ConfigError, PolicyError, RetryError

Part = Literal["train", "validation"]


@dataclass(frozen=True)
class Spend:
    """One charged reply: which request it answered, what it released, and its price at the filter's order."""

    run: str
    request_id: str
    digest: str
    sequence: int
    kind: str
    part: Part
    release: Release
    rdp: float
    at: datetime


class Ledger:
    """The account of one dataset; get it from `open`, in the process and thread that use it.

    Every error of the file, the disk or SQLite comes as a `DatabaseError` of one line; what was charged
    before it stays charged, and what was not is not sent.

    Attributes
    ----------
    dataset, delta, order, max_epsilon
        The declared id; delta and the filter's order, fixed for the dataset's life; the site's limit now.
    """

    def __init__(
        self,
        path: Path,
        connection: sqlite3.Connection,
        dataset: str,
        delta: float,
        order: int,
        max_epsilon: float,
    ) -> None:
        self.path, self._connection = path, connection
        self.dataset, self.delta, self.order, self.max_epsilon = dataset, delta, order, max_epsilon

    @classmethod
    def open(cls, path: Path, *, dataset: str, delta: float, max_epsilon: float, order: int | None = None) -> Self:
        """Open the account of `dataset` in the file, which is made (mode 0600) when it does not exist.

        `order` is the Rényi filter's; without it, a new dataset gets `accounting.best_order` of the limit.
        `max_epsilon` may change from one opening to the next, and holds from then on.

        Raises
        ------
        ConfigError
            If delta or order differ from those that the dataset was opened with at first, or the limit is
            not above 0.
        DatabaseError
            If the file is not a ledger of this version, or cannot be written.
        """
        best = accounting.best_order(max_epsilon, delta)  # refuses bad values before a file is made
        connection = connect(path)
        try:
            with transaction(path, connection):
                first = connection.execute("SELECT delta, rdp_order FROM datasets WHERE id = ?", [dataset]).fetchone()
                if first is None:
                    first = (delta, best if order is None else order)
                    accounting.rdp_budget(max_epsilon, *first)  # refuses an order that is none
                    connection.execute("INSERT INTO datasets VALUES (?, ?, ?, ?)", [dataset, *first, _now()])
                if delta != first[0] or order not in (None, first[1]):
                    raise ConfigError(
                        f"delta={delta} and Rényi order={order or 'as before'} were asked for dataset "
                        f"{dataset!r}, whose account was opened with delta={first[0]} and order={first[1]}, "
                        "for its whole life: set those again (site.toml, [privacy] delta)."
                    )
        except BaseException:
            connection.close()
            raise
        return cls(path, connection, dataset, delta, first[1], max_epsilon)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. What was charged is on disk already."""
        self._connection.close()

    def recall(self, run: str, request_id: str, digest: str, sequence: int, kind: str) -> bytes | None:
        """Return the kept reply if this very request was answered before, None if it is new.

        Raises
        ------
        RetryError
            If the id was answered with another digest or kind, or if a request of the same run and kind with
            a larger `sequence` (round number) was answered: many noisy copies of one answer would average
            the noise away, so a superseded or differing request is never computed again.
        """
        with said_in_one_line(self.path):
            row = self._connection.execute(
                "SELECT digest, kind, reply FROM spends LEFT JOIN replies ON spend = id "
                "WHERE dataset = ? AND run = ? AND request = ?",
                [self.dataset, run, request_id],
            ).fetchone()
            (newest,) = self._connection.execute(
                "SELECT max(sequence) FROM spends WHERE dataset = ? AND run = ? AND kind = ?",
                [self.dataset, run, kind],
            ).fetchone()
        if row is not None and (row[0], row[1]) != (digest, kind):
            raise RetryError(
                f"Request {request_id!r} of run {run!r} was answered as {row[1]!r} with digest {row[0]}, and "
                f"now comes as {kind!r} with {digest}: send a changed request under an id of its own."
            )
        if (newest is not None and newest > sequence) or (row is not None and row[2] is None):
            raise RetryError(
                f"Request {request_id!r} of run {run!r} ({kind}, round {sequence}) is superseded: "
                f"round {newest} was answered, and an earlier one never is again."
            )
        return None if row is None else bytes(row[2])

    def charge(
        self,
        run: str,
        request_id: str,
        digest: str,
        sequence: int,
        kind: str,
        part: Part,
        release: Release,
        reply: bytes,
        state: bytes | None,
        *,
        allow_unbounded: bool = False,
    ) -> bytes:
        """Spend, and keep the reply and the state, in one durable commit; return the bytes to send.

        Those are `reply`, unless another process answered the same request meanwhile: then nothing is
        spent or kept here, and its bytes are returned. Call it before sending, and send only what it
        returns. A crash before its return may have charged a reply that was never sent, never the reverse.
        Earlier rounds' replies of the same run and kind are dropped; `state` (None keeps the last) replaces
        that of the same run and kind.

        Parameters
        ----------
        allow_unbounded
            The site's [privacy] allow_non_private: accept a release without noise, which makes the part's
            epsilon inf for ever, and whatever comes after one. Before that the filter holds all the same.

        Raises
        ------
        RetryError
            As `recall`, checked again under the write lock.
        PolicyError
            If the release does not fit into what is left of `max_epsilon`. Nothing is written.
        """
        price = accounting.rdp(release, self.order)
        with transaction(self.path, self._connection):
            kept = self.recall(run, request_id, digest, sequence, kind)
            if kept is not None:
                return kept
            self._refuse_beyond_budget(price, part, "This release", allow_unbounded)
            execute = self._connection.execute
            event = [release.sampling_rate, release.noise_multiplier, release.steps, price, _now()]
            spend = execute(
                "INSERT INTO spends (dataset, run, request, digest, sequence, kind, part, sampling_rate, "
                "noise_multiplier, steps, rdp, at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [self.dataset, run, request_id, digest, sequence, kind, part, *event],
            ).lastrowid
            execute("INSERT INTO replies VALUES (?, ?)", [spend, reply])
            execute(
                "DELETE FROM replies WHERE spend IN (SELECT id FROM spends "
                "WHERE dataset = ? AND run = ? AND kind = ? AND sequence < ?)",
                [self.dataset, run, kind, sequence],
            )
            if state is not None:
                execute("INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?)", [self.dataset, run, kind, state])
        return reply

    def check_plan(self, releases: Iterable[Release], part: Part, *, allow_unbounded: bool = False) -> None:
        """Raise PolicyError unless all of a run's releases still to come fit together; spend nothing."""
        price = math.fsum(accounting.rdp(release, self.order) for release in releases)
        self._refuse_beyond_budget(price, part, "The planned run", allow_unbounded)

    def run_releases(self, run: str, part: Part) -> list[Release]:
        """Return what the run has released from the part, over all its attempts, in the order of charging."""
        return [spend.release for spend in self.spends() if (spend.run, spend.part) == (run, part)]

    def run_epsilon(self, run: str, part: Part, delta: float) -> float:
        """Epsilon of what the run has released from the part so far, by PLD: a run is planned in advance."""
        return accounting.epsilon(self.run_releases(run, part), delta)

    def lifetime_epsilon(self, part: Part | None = None) -> float:
        """Epsilon of all releases from the part (None: the larger part's), as the filter bounds it.

        At a fixed order even a small spend has a large epsilon: the first one starts near
        log(1 / delta) / (order - 1), and the figure is close only as it nears the limit.
        """
        if part is None:
            return max(self.lifetime_epsilon("train"), self.lifetime_epsilon("validation"))
        return accounting.rdp_to_epsilon(self._spent(part), self.order, self.delta)

    def planned_epsilon(self, part: Part) -> float:
        """Epsilon of the same releases by PLD, "if planned in advance": a comparison, not a bound."""
        return accounting.epsilon((s.release for s in self.spends() if s.part == part), self.delta)

    def state(self, run: str, kind: str) -> bytes | None:
        """Return the state kept with the run's last charge of that kind; it is private to the site."""
        query = "SELECT state FROM states WHERE dataset = ? AND run = ? AND kind = ?"
        with said_in_one_line(self.path):
            row = self._connection.execute(query, [self.dataset, run, kind]).fetchone()
        return None if row is None else bytes(row[0])

    def pin(self, run: str, kind: str, value: bytes) -> bytes:
        """Keep `value` under (run, kind) unless something is kept there; return what is kept, durably.

        For what must not change after it was first used: whoever comes second, in whatever process, learns
        what the first one kept.
        """
        with transaction(self.path, self._connection):
            self._connection.execute(
                "INSERT OR IGNORE INTO states VALUES (?, ?, ?, ?)", [self.dataset, run, kind, value]
            )
            return self.state(run, kind) or value

    def spends(self) -> list[Spend]:
        """Return all spends of the dataset, in the order of charging."""
        query = (
            "SELECT run, request, digest, sequence, kind, part, sampling_rate, noise_multiplier, steps, rdp, "
            "at FROM spends WHERE dataset = ? ORDER BY id"
        )
        with said_in_one_line(self.path):
            rows = self._connection.execute(query, [self.dataset]).fetchall()
        return [
            Spend(run, request, digest, sequence, kind, part, Release(rate, noise, steps), rdp, _time(at))
            for run, request, digest, sequence, kind, part, rate, noise, steps, rdp, at in rows
        ]

    def _spent(self, part: Part) -> float:
        query = "SELECT total(rdp) FROM spends WHERE dataset = ? AND part = ?"
        with said_in_one_line(self.path):
            return float(self._connection.execute(query, [self.dataset, part]).fetchone()[0])

    def _refuse_beyond_budget(self, price: float, part: Part, what: str, allow_unbounded: bool) -> None:
        spent = self._spent(part)
        where = f"of dataset {self.dataset!r}, part {part!r},"
        if math.isinf(price) or math.isinf(spent):
            if allow_unbounded:
                return
            reason = (
                f"A release without noise was charged before: the promise {where} is gone for ever"
                if math.isinf(spent)
                else f"{what} has no noise: the epsilon {where} would be inf for ever"
            )
            raise PolicyError(f"{reason} (site.toml, [privacy] allow_non_private).")
        budget = accounting.rdp_budget(self.max_epsilon, self.delta, self.order)
        if spent + price > budget:
            now, then = (accounting.rdp_to_epsilon(r, self.order, self.delta) for r in (spent, spent + price))
            raise PolicyError(
                f"{what} would take the lifetime epsilon {where} from {now:.3f} to {then:.3f}, above the "
                f"limit of {self.max_epsilon:g} at delta={self.delta:g} (site.toml, [privacy] max_epsilon). "
                f"In the Rényi filter of order {self.order}, {spent:.4g} is spent, {price:.4g} asked and "
                f"{max(budget - spent, 0.0):.4g} left."
            )


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _time(at: str) -> datetime:
    return datetime.fromisoformat(at)
