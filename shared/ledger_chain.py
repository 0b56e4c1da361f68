"""The chain of a dataset's ledger: each event holds the digest of the one before, so that a change shows.

A site's ledger and whoever verifies an export of it share this arithmetic. An event's digest is the SHA-256 of
one canonical JSON of the dataset's header and of all the event's fields, the digest of the event before it included;
the last digest therefore stands for all events, their order, the delta and order that they are accounted with, and the unit
that the promise is made to. Only where that is the person does the header say so: a ledger from before persons has the same
digests as ever, and a program that knows of no persons takes theirs for broken and refuses it.

The chain finds what was edited, dropped or reordered between its ends. Whether its end is the newest is not in
the chain: for that the site keeps a counter beside its ledger, and the coordinator the numbers that it was told.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shared.errors import DataError

FORMAT, VERSION = "moonflower-ledger", 1  # of an export
NO_HEAD = "0" * 64  # stands for the event before the first
ORDERS = (2, 16384)  # of a Rényi filter: 16384 is the highest that `accounting.best_order` gives
HEADER: dict[str, type] = {"id": str, "account": str, "delta": float, "order": int, "opened_at": str}
UNITS = ("person",)  # what a header's `unit` may say; one without has the record as its unit, as all had before persons
EVENT: dict[str, type] = {
    "number": int,  # from 1
    "run": str,
    "round": int,
    "kind": str,
    "part": str,
    "request": str,
    "digest": str,  # of the request
    "mechanism": str,
    "noise_multiplier": float,
    "sampling_rate": float,
    "steps": int,
    "at": str,
    "previous": str,  # the digest of the event before, NO_HEAD for the first
}

Values = Mapping[str, Any]
_LARGEST: dict[type, float] = {int: 2**63 - 1, float: sys.float_info.max}  # SQLite's integer; what a float holds
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@dataclass(frozen=True)
class Fault:
    """The first thing that is wrong with a chain.

    Attributes
    ----------
    kind
        What was done to it; "malformed" where it is no chain at all.
    number
        The event at fault, from 1; 0 where it is none.
    text
        One line for a person.
    """

    kind: Literal["edited", "dropped", "reordered", "malformed"]
    number: int
    text: str


def parse(text: str | bytes) -> Any:
    """Read JSON that anyone may have written.

    Raises
    ------
    ValueError
        Where it is none, or none that can be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def canonical(values: Values) -> str:
    """Return the one JSON text of some values: keys sorted, no spaces, ASCII, floats at full precision."""
    return _ENCODER.encode(values)


def row_digest(header: Values, event: Values) -> str:
    """SHA-256 of a dataset's header and one event of it, hexadecimal; the event's own `row` is not looked at.

    Numbers are taken by their field's type, so that an export may pass through a program that writes 1.0 as 1.

    Raises
    ------
    DataError
        Where a field is missing, unknown or of another type.
    """
    event = {name: value for name, value in event.items() if name != "row"}
    text = canonical({"dataset": _header(header), "event": _typed(event, EVENT, "an event")})
    return hashlib.sha256(text.encode()).hexdigest()


def check_next(header: Values, number: int, head: str, event: Values) -> Fault | None:
    """Say what is wrong with an event that should follow the `number` events that end in `head`.

    Raises
    ------
    DataError
        As `row_digest`.
    """
    found = event["number"]
    if event.get("row") != row_digest(header, event):
        return Fault("edited", found, f"event {found} was edited: its digest is not that of its fields.")
    if found > number + 1:
        return Fault("dropped", number + 1, f"event {number + 1} was dropped: event {found} follows event {number}.")
    if found <= number:
        return Fault("reordered", found, f"event {found} stands after event {number}: they were reordered.")
    if event["previous"] != head:
        return Fault("edited", number, f"event {number} was edited, digest and all: event {found} followed another.")
    return None


def verify(export: Values) -> Fault | None:
    """Return the first fault of an exported ledger, None where every event is as it was charged.

    `export` is what `moonflower ledger export` prints. That its `head` is the newest is beyond it: compare
    the number and the head with what the site's counter or the coordinator's history says.
    """
    try:
        header, events = _parts(export)
        head = NO_HEAD
        for number, event in enumerate(events):
            fault = check_next(header, number, head, event)
            if fault and fault.kind == "dropped" and any(other["number"] == number + 1 for other in events):
                return Fault("reordered", number + 1, f"event {number + 1} was moved from its place: reordered.")
            if fault:
                return fault
            head = event["row"]
    except (DataError, KeyError, TypeError) as error:
        return Fault("malformed", 0, f"not a ledger's export: {error}.".replace("..", "."))
    if export.get("head") != head:
        return Fault("dropped", len(events) + 1, f"what follows event {len(events)} was dropped: the head is another.")
    return None


def _parts(export: Values) -> tuple[Values, list[Values]]:
    if (export["format"], export["version"]) != (FORMAT, VERSION):
        raise DataError(f"format {export['format']!r} of version {export['version']!r}, not {FORMAT!r} of {VERSION}")
    header, events = export["dataset"], export["events"]
    if not isinstance(header, Mapping) or not isinstance(events, list):
        raise DataError("its dataset is no object, or its events are no list")
    for event in events:
        if not isinstance(event, Mapping):
            raise DataError("an event is no object")
        _typed({name: value for name, value in event.items() if name != "row"}, EVENT, "an event")
    return _header(header), events


def unit_of(header: Values) -> str:
    """Whom an account's promise is made to, for its life: "record" or "person"."""
    return str(header.get("unit", "record"))


def _header(values: Values) -> dict[str, Any]:
    typed = _typed(values, HEADER | ({"unit": str} if "unit" in values else {}), "the dataset")
    if typed.get("unit", UNITS[0]) not in UNITS:
        raise DataError(f"the dataset's unit {typed['unit']!r} is not known here")
    if not 0 < typed["delta"] < 1 or not ORDERS[0] <= typed["order"] <= ORDERS[1]:
        raise DataError(f"the dataset's delta is not within 0 and 1, or its order not from {ORDERS[0]} to {ORDERS[1]}")
    return typed


def _typed(values: Values, fields: dict[str, type], what: str) -> dict[str, Any]:
    if values.keys() != fields.keys():
        raise DataError(f"{what} lacks or has beyond its fields: {_named(set(values) ^ set(fields))}")
    typed = {}
    for name, kind in fields.items():
        value = values[name]
        if kind is str:
            if type(value) is not str or not value.isprintable():  # it is shown to a person
                raise DataError(f"{what}'s {name} is not a line of text")
        elif type(value) not in (int, float) or not abs(value) <= _LARGEST[kind] or kind(value) != value:
            raise DataError(f"{what}'s {name} is not a {kind.__name__}")
        typed[name] = kind(value)
    return typed


def _named(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
