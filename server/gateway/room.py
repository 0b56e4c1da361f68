"""Room on the disk that the SuperLink writes to, which is the history's and the checkpoints' too."""

import logging
import shutil
import time
from pathlib import Path

log = logging.getLogger("moonflower.gateway")
LOOK = 1.0  # seconds between looks


class Room:
    """Whether there is room for more of what sites send.

    Parameters
    ----------
    folder : Path
        On that disk.
    least : int
        Bytes that stay free for everything else.
    """

    def __init__(self, folder: Path, least: int) -> None:
        self._folder, self._least = folder, least
        self._looked, self._full = -LOOK, False

    def full(self, senders: dict[str, int]) -> bool:
        """Return whether there is none; the log says once when it has gone, and who has sent how many bytes."""
        now = time.monotonic()
        if now - self._looked >= LOOK:
            self._looked = now
            free = shutil.disk_usage(self._folder).free
            if free < self._least and not self._full:
                most = sorted(senders, key=lambda site: -senders[site])[:5]
                log.error(
                    "%s has %d MiB free, below gateway.least_free_mib=%d: sites' replies wait. Received since the start: %s.",
                    *(self._folder, free >> 20, self._least >> 20),
                    ", ".join(f"{site} {senders[site] >> 20} MiB" for site in most) or "nothing",
                )
            self._full = free < self._least
        return self._full
