"""What the control service asks of the daemon that it is a part of."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol


@dataclass(frozen=True)
class Seen:
    """What is known of a site's node."""

    online: bool | None  # None: not known
    at: datetime | None  # when it was last heard


class Registrar(Protocol):
    """Keeps gateway and SuperLink in step with the keys in the history."""

    async def changed(self) -> None:
        """Take the history's keys over: a revoked one is shut out from the next request on, a new one let in."""

    async def seen(self) -> Mapping[str, Seen]:
        """Say which sites' nodes are online, by the site's name."""
