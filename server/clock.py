"""The time that rounds are kept by: the machine's, or that of a grid whose nodes' time is simulated."""

import time
from typing import Protocol

from flwr.serverapp import Grid


class Clock(Protocol):
    """Seconds since any moment, and waiting."""

    simulated: bool

    def now(self) -> float:
        """Return the time, in seconds; it never goes back."""

    def wait(self, pause: float, until: float) -> None:
        """Let time pass: about `pause` seconds; simulated, to the next reply that is not there yet, or to `until`."""


class Machine:
    """The machine's monotonic clock."""

    simulated = False

    def now(self) -> float:
        """Return the time, in seconds."""
        return time.monotonic()

    def wait(self, pause: float, until: float) -> None:  # noqa: ARG002 - as `Clock`
        """Sleep."""
        time.sleep(pause)


def of(grid: Grid) -> Clock:
    """Return the grid's own clock, or the machine's where it has none."""
    own: Clock | None = getattr(grid, "clock", None)
    return Machine() if own is None else own
