"""What a ledger holds of one dataset: its events, verified as they are read, and what they amount to.

An event says what was released (mechanism, noise, rate, steps) and not what it costs: every epsilon is computed
from the events when it is asked for. A run is composed by privacy-loss distributions; the dataset's life by a Rényi
filter at the order that was fixed when its account was opened, one order for its whole life.
"""

import math
import sqlite3
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from client.privacy import ledger_count, ledger_owner
from client.privacy.events import PARTS, Part, Reservation, Spend, question_of, release_of
from client.privacy.ledger_count import BrokenCountError
from client.privacy.ledger_file import connect, one_name, said_in_one_line, transaction
from client.privacy.opening import find, last_events, refuse_a_lost_event, refuse_a_lost_file, refuse_a_study
from shared import accounting, ledger_chain
from shared.accounting import Release
from shared.errors import ConfigError, DatabaseError, DataError, NotFoundError

_EVENT = (*ledger_chain.EVENT, "row")
_RESERVED = tuple(name for name in ledger_chain.EVENT if name not in ("number", "previous"))


class Account:
    """One dataset's account, as of the last reading; get it from `Account.read`, which writes nothing.

    Attributes
    ----------
    path
        The ledger's file, by the one name that its counter and its reservations stand beside.
    dataset, account, delta, order, unit
        The declared id; the account's own random name; delta, the filter's order, and whom the promise is made to ("record" or
        "person"), fixed for the dataset's life.
    number, head
        How many events were read, and the digest of the last.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, header: dict[str, Any]) -> None:
        self.path, self._connection, self._header = path, connection, header
        self.dataset: str = header["id"]
        self.account: str = header["account"]
        self.delta: float = header["delta"]
        self.order: int = header["order"]
        self.unit = ledger_chain.unit_of(header)
        self.number, self.head = 0, ledger_chain.NO_HEAD
        self._last_row = 0
        self._spends: list[Spend] = []
        self._events: list[dict[str, Any]] = []
        self._prices: dict[Part, list[float]] = {part: [] for part in PARTS}
        self._known: dict[Release, float] = {}

    @classmethod
    def read(cls, path: Path, dataset: str) -> Self:
        """Read an account without changing its file.

        Raises
        ------
        NotFoundError
            Where there is no such file, or no such account in it.
        DatabaseError
            Where the file is no ledger of this version, its chain is broken, or its counter contradicts it.
        """
        account = cls._found(path, dataset, to_write=False)
        try:
            refuse_a_study(account.path, account._connection)
            refuse_a_lost_event(account.path, account._connection)
        except BaseException:
            account.close()
            raise
        return account

    @classmethod
    def new_count(cls, path: Path, dataset: str) -> int:
        """Write the counts anew that are missing or cannot be read, on the site's word that no event is; return this one.

        One file counts all accounts of the ledger, so all that it lacks are written.

        Raises
        ------
        NotFoundError, DatabaseError
            As `read`.
        ConfigError
            Where no count is missing: one is never lowered.
        """
        with cls._found(path, dataset, to_write=True) as account, transaction(account.path, account._connection):
            try:
                counts = ledger_count.read(account.path)
            except BrokenCountError:
                counts = {}
            now = last_events(account._connection)
            if now.keys() <= counts.keys():
                raise ConfigError(
                    f"{ledger_count.file_of(path)} counts dataset {dataset!r} already: there is nothing to write anew; "
                    "without --new-count, verify says whether the ledger agrees with it."
                )
            ledger_count.replace(account.path, now | counts)
            return (now | counts)[dataset].number

    @classmethod
    def _found(cls, path: Path, dataset: str, *, to_write: bool) -> Self:
        path = one_name(path)
        if not path.exists():
            refuse_a_lost_file(path)
            raise NotFoundError(f"There is no ledger {path}: a site makes it when it first joins a run.")
        connection = connect(path, to_write=to_write)
        try:
            with said_in_one_line(path):
                header = find(connection, dataset)
                known = [name for (name,) in connection.execute("SELECT id FROM datasets ORDER BY id")]
            if header is None:
                refuse_a_lost_event(path, connection)
                held = ", ".join(repr(name) for name in known) or "none yet"
                raise NotFoundError(f"The ledger {path} has no account of dataset {dataset!r}; it has: {held}.")
            account = cls(path, connection, header)
            account._read_on()
        except BaseException:
            connection.close()
            raise
        return account

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def spends(self) -> list[Spend]:
        """Return all spends of the dataset, in the order of charging."""
        self._read_on()
        return list(self._spends)

    def reservations(self) -> list[Reservation]:
        """Return the open reservations, oldest first; a dead owner's is returned at the ledger's next opening."""
        return [
            Reservation(question_of(row), release_of(row), datetime.fromisoformat(row["at"]), row["alive"])
            for row in self._reserved()
        ]

    def export(self) -> dict[str, Any]:
        """Return the account as JSON values, verified: what `shared.ledger_chain.verify` reads."""
        self._read_on()
        return {
            "format": ledger_chain.FORMAT,
            "version": ledger_chain.VERSION,
            "dataset": dict(self._header),
            "events": [dict(event) for event in self._events],
            "reservations": self._reserved(),
            "head": self.head,
        }

    def run_releases(self, run: str, part: Part) -> list[Release]:
        """Return what the run has released from the part, over all its attempts, in the order of charging."""
        return [spend.release for spend in self.spends() if (spend.question.run, spend.question.part) == (run, part)]

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
        return accounting.rdp_to_epsilon(self.spent(part), self.order, self.delta)

    def planned_epsilon(self, part: Part) -> float:
        """Epsilon of the same releases by PLD, "if planned in advance": a comparison, not a bound."""
        return accounting.epsilon((s.release for s in self.spends() if s.question.part == part), self.delta)

    def price(self, release: Release) -> float:
        """Rényi divergence of a release at the filter's order; most of a ledger's events are alike."""
        if release not in self._known:
            self._known[release] = accounting.rdp(release, self.order)
        return self._known[release]

    def spent(self, part: Part) -> float:
        """Sum what was charged of the part, as the Rényi filter counts it."""
        self._read_on()
        return math.fsum(self._prices[part])

    def _read_on(self) -> None:
        """Read what was charged since the last reading, each event verified against the chain."""
        query = f"SELECT id, {', '.join(_EVENT)} FROM spends WHERE dataset = ? AND id > ? ORDER BY id"  # noqa: S608 - our own names
        with said_in_one_line(self.path):
            rows = self._connection.execute(query, [self.dataset, self._last_row]).fetchall()
        for place, *values in rows:
            event = dict(zip(_EVENT, values, strict=True))
            try:
                fault = ledger_chain.check_next(self._header, self.number, self.head, event)
                says = fault.text if fault else None
            except DataError as error:
                says = f"{error}."
            if says:
                raise DatabaseError(
                    f"The ledger {self.path} is broken for dataset {self.dataset!r}: {says} "
                    f"Restore the newest sound copy ({ledger_count.GUIDE})."
                )
            spend = Spend(
                event["number"],
                question_of(event),
                release_of(event),
                datetime.fromisoformat(event["at"]),
                event["previous"],
                event["row"],
            )
            self._prices[spend.question.part].append(self.price(spend.release))
            self._spends.append(spend)
            self._events.append(event)
            self._last_row, self.number, self.head = place, spend.number, spend.row

    def _reserved(self) -> list[dict[str, Any]]:
        query = f"SELECT {', '.join(_RESERVED)}, owner FROM reservations WHERE dataset = ? ORDER BY at"  # noqa: S608 - our own names
        with said_in_one_line(self.path):
            rows = self._connection.execute(query, [self.dataset]).fetchall()
        found = []
        for *values, owner in rows:
            found.append(dict(zip(_RESERVED, values, strict=True)) | {"alive": ledger_owner.lives(self.path, owner)})
        return found
