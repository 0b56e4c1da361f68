"""What happened at the door: counters for the daemon, and a line in the log for a refusal, not for each of a flood."""

import logging
import time
from collections import Counter

from server.gateway.rates import Bucket

log = logging.getLogger("moonflower.gateway")
LINES_PER_SECOND, LINES_AT_ONCE = 1.0, 20.0


class Counts:
    """Counters since the start: connections, requests that passed, their bytes, and refusals by reason."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lines = Bucket(LINES_PER_SECOND, LINES_AT_ONCE, time.monotonic())
        self._unsaid = 0

    def add(self, name: str, by: int = 1) -> None:
        """Count."""
        self._counts[name] += by

    def refused(self, reason: str, address: str, detail: str = "") -> None:
        """Count a refusal and, while there are few, say it.

        `detail` is a site, or what a stranger wrote: shown as a literal, cut, and never a header or a body.
        """
        self._counts[f"refused: {reason}"] += 1
        if self._lines.take(time.monotonic()) > 0:
            self._unsaid += 1
            return
        unsaid, self._unsaid = self._unsaid, 0
        log.warning(
            "refused %s: %s%s%s",
            address,
            reason,
            f" ({detail[:80]!r})" if detail else "",
            f"; {unsaid} refusals before it are not shown" if unsaid else "",
            extra={"address": address, "reason": reason},
        )

    def snapshot(self) -> dict[str, int]:
        """Return the counters as they are."""
        return dict(sorted(self._counts.items()))
