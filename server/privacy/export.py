"""What `moonflower ledger export` wrote at a site, as the coordinator reads it: anyone may have changed it since."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server import mechanisms
from server.privacy.records import PARTS
from shared import accounting, ledger_chain
from shared.errors import ConfigError, DataError
from shared.messages import LARGEST

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Export:
    """A ledger's export as it was read: `fault` says what is wrong with its chain."""

    source: str
    dataset: str
    account: str
    delta: float
    order: int
    unit: str
    events: Sequence[Event]
    fault: str | None


def load(path: Path) -> Export:
    """Read an export, and verify its chain.

    Raises
    ------
    DataError
        Where the file cannot be read or is no export at all.
    """
    try:
        values = ledger_chain.parse(path.read_bytes())
        fault = ledger_chain.verify(values)
    except (OSError, ValueError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "it is not the JSON of a ledger's export"
        raise DataError(f"--verify {path}: {reason}; write it with `moonflower ledger export` at the site.") from None
    if fault is not None and fault.kind == "malformed":
        raise DataError(f"--verify {path}: {fault.text}")
    header = values["dataset"]
    if any(event["steps"] > LARGEST for event in values["events"]):  # composing them could take any time
        raise DataError(f"--verify {path}: an event has more than {LARGEST} steps, which no site releases.")
    known = (
        header["id"],
        header["account"],
        float(header["delta"]),
        int(header["order"]),
        ledger_chain.unit_of(header),
    )
    return Export(str(path), *known, values["events"], None if fault is None else fault.text)


def release(event: Event) -> mechanisms.Recorded:
    """Give an event's release, as it is recorded."""
    return event["mechanism"], event["sampling_rate"], event["noise_multiplier"], event["steps"]


def lifetime(export: Export) -> float:
    """Epsilon of the dataset's larger part over all runs, as the ledger's Rényi filter bounds it."""
    prices: dict[str, list[float]] = {part: [0.0] for part in PARTS.values()}
    try:
        for event in export.events:
            prices[event["part"]].append(accounting.rdp(mechanisms.release(*release(event)), export.order))
    except (ConfigError, KeyError, OverflowError):
        return math.inf
    largest = max(math.fsum(part) for part in prices.values())
    return accounting.rdp_to_epsilon(largest, export.order, export.delta)
