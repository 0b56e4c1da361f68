"""Rates hold over time, and strangers cannot fill the memory with them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.gateway.rates import Bucket, Buckets


def test_a_burst_passes_and_then_the_rate() -> None:
    bucket = Bucket(rate=2, burst=3, now=0)
    assert [bucket.take(0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert bucket.take(0.5) == 0
    assert bucket.take(0.5) == 0.5


def test_debt_is_time_to_wait_in_line() -> None:
    bucket = Bucket(rate=2, burst=1, now=0)
    assert [bucket.take(0, debt=True) for _ in range(4)] == [0, 0.5, 1.0, 1.5]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=200), st.booleans())
def test_no_more_than_burst_and_rate_pass(pauses: list[float], debt: bool) -> None:
    bucket, now, starts = Bucket(rate=5, burst=4, now=0), 0.0, []
    for pause in pauses:
        now += pause
        wait = bucket.take(now, debt=debt)
        if wait == 0 or debt:
            starts.append(now + wait)
    for first in range(len(starts)):
        for last in range(first, len(starts)):
            assert last - first + 1 <= 4 + 5 * (starts[last] - starts[first]) + 1e-6


def test_keys_are_counted_apart_and_the_longest_unseen_is_forgotten() -> None:
    buckets = Buckets(rate=0.001, burst=1, kept=2)
    assert buckets.take("a", 0) == 0
    assert buckets.take("b", 0) == 0
    assert buckets.take("a", 0) == pytest.approx(1000)
    assert buckets.take("c", 0) == 0  # displaces b
    assert buckets.take("a", 0) == pytest.approx(1000)
    assert buckets.take("b", 0) == 0
