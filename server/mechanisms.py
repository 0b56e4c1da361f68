"""What a recorded spend released, as the accounting takes it."""

from typing import get_args

from shared.accounting import Mechanism, Release
from shared.errors import ConfigError


def release(mechanism: str, sampling_rate: float, noise_multiplier: float, steps: int) -> Release:
    """Return the release that a history's words and numbers describe.

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
