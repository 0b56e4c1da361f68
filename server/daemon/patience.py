"""The history of a daemon that outlives its database: a call that the database does not answer is made again."""

import asyncio
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from shared.errors import DatabaseError

log = logging.getLogger("moonflower.daemon")
FIRST, MOST = 0.5, 10.0  # seconds between tries: the first, doubled up to the most
P = ParamSpec("P")
T = TypeVar("T")


class Patience:
    """Calls a history's methods in threads, and waits for the database for as long as it takes.

    A write whose answer was lost is made twice, so only writes that may be are called this way.
    """

    def __init__(self) -> None:
        self.gone = False  # whether the database did not answer the last call

    async def __call__(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what the call returns; the log says once that the database is away, and once that it is back."""
        delay = FIRST
        while True:
            try:
                answer = await asyncio.to_thread(call, *args, **kwargs)
            except DatabaseError as error:
                if not self.gone:
                    log.warning("%s Trying again until it answers.", error)
                self.gone = True
                await asyncio.sleep(delay)
                delay = min(2 * delay, MOST)
            else:
                if self.gone:
                    log.info("the database answers again")
                self.gone = False
                return answer
