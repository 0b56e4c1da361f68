"""The chain's arithmetic, on an export that is made here: every change to any field of any event shows."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from shared import accounting, ledger_chain
from shared.errors import DataError

HEADER = {"id": "notes", "account": "ab" * 16, "delta": 1e-5, "order": 4, "opened_at": "2026-01-01T00:00:00+00:00"}


def exported(count: int = 5) -> dict[str, Any]:
    events: list[dict[str, Any]] = []
    head = ledger_chain.NO_HEAD
    for number in range(1, count + 1):
        event = {
            "number": number,
            "run": "run",
            "round": number,
            "kind": "train",
            "part": "train",
            "request": f"run/{number}/train",
            "digest": "d" * 64,
            "mechanism": "gaussian",
            "noise_multiplier": 1.0,
            "sampling_rate": 0.032,
            "steps": 32,
            "at": "2026-01-01T00:00:00+00:00",
            "previous": head,
        }
        head = ledger_chain.row_digest(HEADER, event)
        events.append(event | {"row": head})
    return {
        "format": "moonflower-ledger",
        "version": 1,
        "dataset": dict(HEADER),
        "events": events,
        "reservations": [],
        "head": head,
    }


def fault(export: dict[str, Any]) -> tuple[str, int] | None:
    found = ledger_chain.verify(export)
    assert found is None or "\n" not in found.text
    return found and (found.kind, found.number)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_an_export_as_it_was_charged_has_no_fault(count: int) -> None:
    assert fault(exported(count)) is None
    assert fault(json.loads(json.dumps(exported(count), indent=2))) is None


def test_an_export_that_another_program_wrote_out_again_has_no_fault() -> None:
    """Some write 1.0 as 1: the same number."""
    assert fault(json.loads(json.dumps(exported()).replace("1.0,", "1,"))) is None


@pytest.mark.parametrize("number", [1, 3, 5])
@pytest.mark.parametrize("name", [*ledger_chain.EVENT, "row"])
def test_a_field_that_was_edited_is_found_where_it_is(name: str, number: int) -> None:
    export = exported()
    event = export["events"][number - 1]
    event[name] = event[name] + ("x" if isinstance(event[name], str) else 1)
    found = fault(export)
    assert found is not None
    assert found[0] == "edited"
    assert found[1] == (number + 1 if name == "number" else number)


@pytest.mark.parametrize("name", ledger_chain.HEADER)
def test_the_datasets_own_row_is_in_the_chain(name: str) -> None:
    export = exported()
    export["dataset"][name] *= 2
    assert fault(export) == ("edited", 1)


def test_an_edit_whose_digest_was_made_anew_is_found_by_the_next_event() -> None:
    for number in (1, 4):
        export = exported()
        event = export["events"][number - 1]
        event["noise_multiplier"] = 9.0
        event["row"] = ledger_chain.row_digest(HEADER, event)
        assert fault(export) == ("edited", number)
    export = exported()  # ... and of the last event, by the head
    event = export["events"][-1]
    event["noise_multiplier"] = 9.0
    event["row"] = ledger_chain.row_digest(HEADER, event)
    assert fault(export) == ("dropped", 6)


def drop(number: int) -> Callable[[list[Any]], None]:
    return lambda events: events.pop(number - 1)


def swap(events: list[Any]) -> None:
    events[1], events[3] = events[3], events[1]


def move_to_the_end(events: list[Any]) -> None:
    events.append(events.pop(0))


def repeat(events: list[Any]) -> None:
    events.insert(2, copy.deepcopy(events[1]))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (drop(1), ("dropped", 1)),
        (drop(3), ("dropped", 3)),
        (drop(5), ("dropped", 5)),
        (swap, ("reordered", 2)),
        (move_to_the_end, ("reordered", 1)),
        (repeat, ("reordered", 2)),
    ],
)
def test_an_event_that_is_dropped_moved_or_repeated_is_named(
    change: Callable[[list[Any]], None], found: tuple[str, int]
) -> None:
    export = exported()
    change(export["events"])
    assert fault(export) == found


@pytest.mark.parametrize(
    "export",
    [
        {},
        {"format": "moonflower-ledger", "version": 2},
        exported() | {"dataset": "notes"},
        exported() | {"events": {}},
        exported() | {"events": [3]},
        exported() | {"events": [exported()["events"][0] | {"more": 1}]},
        exported() | {"events": [exported()["events"][0] | {"steps": "32"}]},
        exported() | {"events": [exported()["events"][0] | {"steps": 1.5}]},
        exported() | {"events": [exported()["events"][0] | {"noise_multiplier": float("nan")}]},
        exported() | {"dataset": HEADER | {"more": 1}},
        exported() | {"events": [exported()["events"][0] | {"steps": 10**400}]},
        exported() | {"events": [exported()["events"][0] | {"noise_multiplier": 10**400}]},
        exported() | {"events": [exported()["events"][0] | {"run": "\ud800"}]},
        exported() | {"events": [exported()["events"][0] | {"run": "\x1b[2J"}]},
        exported(0) | {"dataset": HEADER | {"delta": 10**400}},
        exported(0) | {"dataset": HEADER | {"delta": 1.0}},
        exported(0) | {"dataset": HEADER | {"order": 10**400}},
        exported(0) | {"dataset": HEADER | {"order": 16385}},
        exported(0) | {"dataset": HEADER | {"order": 1}},
    ],
)
def test_what_is_no_export_is_said_to_be_none(export: dict[str, Any]) -> None:
    assert fault(export) == ("malformed", 0)


def test_a_field_that_the_digest_would_not_cover_is_refused() -> None:
    event = exported()["events"][0]
    with pytest.raises(DataError, match="its fields: epsilon"):
        ledger_chain.row_digest(HEADER, event | {"epsilon": 0.1})


def test_the_highest_order_that_a_ledger_is_opened_with_is_read() -> None:
    assert ledger_chain.ORDERS[1] == max(accounting._ORDERS)
    assert fault(exported(0) | {"dataset": HEADER | {"order": ledger_chain.ORDERS[1]}}) is None
