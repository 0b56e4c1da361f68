"""What a recorded spend released, as the accounting takes it."""

import math
from collections.abc import Iterable
from typing import get_args

from shared import accounting
from shared.accounting import Mechanism, Release
from shared.errors import ConfigError

Recorded = tuple[str, float, float, int]  # mechanism, sampling rate, noise multiplier, steps


def release(mechanism: str, sampling_rate: float, noise_multiplier: float, steps: int) -> Release:
    """Return the release that a history's or a ledger's words and numbers describe.

    Raises
    ------
    ConfigError
        Where no mechanism that is accounted for can have made it.
    """
    if mechanism == "none":
        return Release(sampling_rate, 0.0, steps)
    for known in get_args(Mechanism):
        if mechanism == known:
            return Release(sampling_rate, noise_multiplier, steps, known)
    raise ConfigError(f"mechanism={mechanism!r} is none that is accounted for.")


def epsilon(recorded: Iterable[Recorded], delta: float) -> float:
    """Epsilon of recorded releases, in the order in which they were charged; inf where no mechanism made them."""
    try:
        return accounting.epsilon([release(*each) for each in recorded], delta)
    except (ConfigError, OverflowError):  # no such release, or numbers beyond a float's
        return math.inf
