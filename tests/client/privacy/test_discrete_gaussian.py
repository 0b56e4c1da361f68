"""The discrete Gaussian's draws against its formula, of keystreams under a fixed key: a test fails always or never.

A chi-square test at 1e-6 of 200,000 draws: it sees a deviation 2 % off. What rounds a continuous draw is
seen where a deviation is about a grid step; on a finer grid no test of draws could tell, and there the
sampler is exact by its arithmetic, which is tested by itself.
"""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from client.privacy import discrete_gaussian
from client.privacy.discrete_gaussian import LARGEST, SMALLEST, DiscreteGaussian, sampler
from client.privacy.randomness import Keystream
from shared.errors import ConfigError

N = 200_000
DEVIATIONS = [0.4, 1.0, 3.7, 15.99, 16.0, 31.9, 40.0, 1000.5, 3.3e5, 2.0**33]


@pytest.fixture
def stream() -> Keystream:
    return Keystream(bytes(range(32)))


def probabilities(deviation: float, edges: np.ndarray) -> np.ndarray:
    """Of the cells [edges[i], edges[i + 1]) of whole numbers: summed, or by the continuous distribution.

    From 100 steps on, the mass of a cell of whole numbers and of the normal between them shifted by a half differ
    by less than 1e-6 of it (Euler and Maclaurin), far below what N draws can see.
    """
    if deviation > 100:
        return np.diff(stats.norm.cdf((edges - 0.5) / deviation))
    reach = math.ceil(14 * deviation) + 2
    x = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (x / deviation) ** 2)
    masses, _ = np.histogram(x, np.clip(edges, -reach, reach + 1) - 0.5, weights=weights / weights.sum())
    return masses


def agrees(draws: np.ndarray, deviation: float) -> bool:
    """Chi-square at 1e-6 of some 80 cells of a tenth of a deviation, or of single numbers, and the rare ones' count."""
    width = max(1, math.floor(deviation / 10))
    last = math.ceil(4 * deviation / width)
    edges = np.concatenate([[-np.inf], np.arange(-last, last + 2) * width, [np.inf]])
    expected = probabilities(deviation, edges) * len(draws)
    counted, _ = np.histogram(draws, edges - 0.5)
    enough = expected >= 5
    rare = (counted[~enough].sum(), expected[~enough].sum())
    if rare[0] > stats.poisson.isf(1e-6, rare[1]):
        return False
    statistic = float((np.square(counted - expected)[enough] / expected[enough]).sum())
    return bool(statistic < stats.chi2.isf(1e-6, np.count_nonzero(enough)))


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_the_draws_are_discrete_gaussian_and_not_of_two_thirds_or_three_halves_the_deviation(
    stream: Keystream, deviation: float
) -> None:
    draws = sampler(deviation).draw(N, stream)
    assert draws.dtype == np.int64
    assert agrees(draws, deviation)
    assert not agrees(draws, deviation * 2 / 3)
    assert not agrees(draws, deviation * 3 / 2)
    assert not agrees(draws, deviation * 1.02)
    assert not agrees(draws, deviation * 0.98)


@pytest.mark.parametrize("deviation", [0.4, 1.0])
def test_a_rounded_continuous_gaussian_is_told_apart(stream: Keystream, deviation: float) -> None:
    assert not agrees(np.rint(deviation * stream.normal(N)).astype(np.int64), deviation)


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_the_draws_are_symmetric_and_use_every_bit(stream: Keystream, deviation: float) -> None:
    draws = sampler(deviation).draw(N, stream)
    positive, negative = np.count_nonzero(draws > 0), np.count_nonzero(draws < 0)
    assert abs(positive - negative) < 5 * math.sqrt(positive + negative)
    if deviation > 100:  # far below the deviation each bit is fair
        for bit in range(int(math.log2(deviation)) - 2):
            ones = np.count_nonzero(draws >> bit & 1)
            assert abs(ones - N / 2) < 5 * math.sqrt(N) / 2


@given(st.floats(math.log(SMALLEST), math.log(LARGEST)))
@settings(max_examples=60, deadline=None)
def test_no_whole_number_is_kept_with_a_probability_above_one_and_none_within_12_deviations_is_left_out(
    log_deviation: float,
) -> None:
    deviation = min(max(math.exp(log_deviation), SMALLEST), LARGEST)
    made = DiscreteGaussian(deviation)
    width = 2**made._offset_bits
    assert made._cells.sum() == 2**16
    assert (made._cells > 0).all()
    lowest = np.arange(len(made._cells)) * width  # the most probable of each bin
    assert (made._scale * np.exp(-0.5 * (lowest / deviation) ** 2) <= made._cells).all()
    assert len(made._cells) * width - 1 >= 12 * deviation + 1
    assert 2 * stats.norm.sf(12) < 2.0**-107


def test_the_exact_decision_agrees_with_the_quick_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for deviation in (0.7, 20.0, 3e5):
        made = DiscreteGaussian(deviation)
        quick = made.draw(3000, Keystream(bytes(32)))
        with monkeypatch.context() as patch:
            patch.setattr(discrete_gaussian, "_MARGIN", 1e9)  # nothing is sure
            exact = made.draw(3000, Keystream(bytes(32)))
        assert np.array_equal(quick, exact)


def test_a_decision_that_needs_more_bits_takes_them(stream: Keystream) -> None:
    made = DiscreteGaussian(20.0)
    made._uniform_bits = 0  # nothing of the uniform is known: the first word decides
    kept = sum(made._decide(0, 23, 23 >> made._offset_bits, stream) for _ in range(3000))
    cells = int(made._cells[23 >> made._offset_bits])
    chance = made._scale / cells * math.exp(-0.5 * (23 / 20) ** 2)
    assert 0.5 < chance < 1
    assert abs(kept - 3000 * chance) < 5 * math.sqrt(3000 * chance * (1 - chance))


def test_a_key_repeats_its_noise_and_two_streams_differ() -> None:
    draw = sampler(1000.0).draw
    assert np.array_equal(draw(5000, Keystream(b"k" * 32)), draw(5000, Keystream(b"k" * 32)))
    first, second = draw(5000, Keystream.from_system()), draw(5000, Keystream.from_system())
    assert np.count_nonzero(first == second) < 20  # by chance 1.4
    stream = Keystream(b"k" * 32)
    assert np.count_nonzero(draw(5000, stream) == draw(5000, stream)) < 20


@pytest.mark.parametrize("n", [0, 1, 7, 65_536, 65_537, 200_001])
def test_as_many_are_drawn_as_asked(stream: Keystream, n: int) -> None:
    assert sampler(5.0).draw(n, stream).shape == (n,)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 0.01, 2.0**41])
def test_a_deviation_that_cannot_be_drawn_is_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="Discrete noise of deviation"):
        sampler(bad)


def test_a_million_draws_take_less_than_a_second(stream: Keystream) -> None:
    start = time.perf_counter()
    sampler(3e5).draw(1_000_000, stream)
    assert time.perf_counter() - start < 1  # 0.05 s where it was measured
