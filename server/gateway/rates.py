"""Rates: a bucket of tokens that refills with time, and one a key, for keys that strangers choose."""

from collections import OrderedDict
from collections.abc import Hashable

KEPT = 10_000  # buckets at most: who invents addresses displaces the longest unseen


class Bucket:
    """Tokens that come at a rate, `burst` at most; taking may run into debt, which is time to wait."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate, self._burst = rate, burst
        self._tokens, self._at = burst, now

    def take(self, now: float, *, amount: float = 1, debt: bool = False) -> float:
        """Take tokens and return 0; without them, return the seconds until they come, taken only with `debt`."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        missing = amount - self._tokens
        if missing <= 0 or debt:
            self._tokens -= amount
        return max(0.0, missing / self._rate)


class Buckets:
    """A bucket a key, in bounded memory."""

    def __init__(self, rate: float, burst: float, kept: int = KEPT) -> None:
        self._rate, self._burst, self._kept = rate, burst, kept
        self._buckets: OrderedDict[Hashable, Bucket] = OrderedDict()

    def take(self, key: Hashable, now: float, *, amount: float = 1, debt: bool = False) -> float:
        """Take tokens of a key's bucket, as `Bucket.take` does."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(self._rate, self._burst, now)
            while len(self._buckets) > self._kept:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        return bucket.take(now, amount=amount, debt=debt)
