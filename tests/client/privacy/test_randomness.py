"""Statistics at a stated power, of keystreams under a fixed key, so that a test fails always or never.

A bound is five standard errors: a right generator under a random key would break it once in two million.
"""

import copy
import math
import os
import pickle

import numpy as np
import pytest
from scipy import stats

from client.privacy.randomness import Keystream
from shared.errors import ConfigError

N = 200_000


@pytest.fixture
def stream() -> Keystream:
    return Keystream(bytes(range(32)))


def is_standard_normal_scale(draws: np.ndarray) -> bool:
    """Accept a deviation within 5 standard errors of 1; at N draws anything 0.8 % off is rejected."""
    return bool(abs(float(np.std(draws)) - 1) < 5 / math.sqrt(2 * len(draws)))


def test_the_noise_has_the_stated_sigma_and_not_two_thirds_or_three_halves_of_it(stream: Keystream) -> None:
    draws = stream.normal(N)
    assert is_standard_normal_scale(draws)
    assert not is_standard_normal_scale(draws * 2 / 3)
    assert not is_standard_normal_scale(draws * 3 / 2)
    assert not is_standard_normal_scale(draws * 1.02)
    assert abs(draws.mean()) < 5 / math.sqrt(N)


def test_the_noise_is_normal_and_the_test_would_see_a_neighbour_of_it(stream: Keystream) -> None:
    draws = stream.normal(N)
    assert stats.kstest(draws, "norm").pvalue > 1e-6
    assert stats.kstest(draws * 1.05, "norm").pvalue < 1e-6
    student = stats.t(df=10).rvs(N, random_state=1) / math.sqrt(10 / 8)  # the same variance, heavier tails
    assert stats.kstest(student, "norm").pvalue < 1e-6
    assert abs(stats.kurtosis(draws)) < 5 * math.sqrt(24 / N)
    assert abs(stats.skew(draws)) < 5 * math.sqrt(6 / N)


def test_the_tails_have_their_weight(stream: Keystream) -> None:
    draws = np.abs(stream.normal(4_000_000))
    for sigmas in (3.0, 4.0, 4.5):
        expected = 2 * stats.norm.sf(sigmas) * len(draws)
        assert abs(np.count_nonzero(draws > sigmas) - expected) < 5 * math.sqrt(expected)


def test_extreme_words_give_finite_symmetric_noise(stream: Keystream, monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.array([0, 2**64 - 1, 2**64 - 1, 0], dtype=np.uint64)  # two radii, then two angles
    monkeypatch.setattr(stream, "words", lambda n: words)
    draws = stream.normal(4)
    assert np.isfinite(draws).all()
    assert draws[0] == pytest.approx(9.419, abs=1e-3)  # the smallest uniform, at angle 0 (all but)
    assert draws[1] == draws[3] == 0  # the largest uniform
    words[2] = 2**63  # half of a turn: the largest radius the other way
    assert stream.normal(4)[0] == pytest.approx(-9.419, abs=1e-3)
    uniforms = stream.uniform(4)
    assert uniforms.min() == 2.0**-53
    assert uniforms.max() == 1 - 2.0**-53


def test_uniforms_are_uniform_and_never_reach_the_ends(stream: Keystream) -> None:
    draws = stream.uniform(N)
    assert stats.kstest(draws, "uniform").pvalue > 1e-6
    assert 0 < draws.min() < draws.max() < 1
    # On the grid of odd multiples of 2**-53, with all its low bits in use.
    grid = (draws * 2.0**53).astype(np.uint64)
    assert np.all(grid % 2 == 1)
    assert np.all(grid.astype(np.float64) == draws * 2.0**53)
    for bit in range(1, 53):
        ones = np.count_nonzero(grid >> np.uint64(bit) & np.uint64(1))
        assert abs(ones - N / 2) < 5 * math.sqrt(N) / 2


@pytest.mark.parametrize("rate", [0.001, 0.032, 0.5, 0.99])
def test_each_record_is_drawn_on_its_own_at_the_rate(stream: Keystream, rate: float) -> None:
    records, rounds = 500, 2000
    counts, sizes = np.zeros(records), np.empty(rounds)
    for index in range(rounds):
        sample = stream.poisson_sample(records, rate)
        counts[sample] += 1
        sizes[index] = len(sample)
    expected, spread = rounds * rate, math.sqrt(rounds * rate * (1 - rate))
    assert np.all(np.abs(counts - expected) < 6 * spread + 6)
    assert abs(sizes.mean() - records * rate) < 5 * math.sqrt(records * rate * (1 - rate) / rounds)
    # The size varies as a binomial: a sampler of fixed size would have none, a coupled one more.
    variance = records * rate * (1 - rate)
    assert abs(sizes.var() / variance - 1) < 6 * math.sqrt((2 + 1 / variance) / rounds)


def test_a_sample_may_be_empty_and_a_rate_of_one_draws_everyone(stream: Keystream) -> None:
    assert any(len(stream.poisson_sample(10, 0.05)) == 0 for _ in range(50))
    assert stream.poisson_sample(1000, 1.0).tolist() == list(range(1000))
    assert len(stream.poisson_sample(0, 0.5)) == 0
    for rate in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="sampling_rate"):
            stream.poisson_sample(10, rate)


def test_two_streams_differ_and_a_key_repeats_itself() -> None:
    first, second = Keystream.from_system().normal(1000), Keystream.from_system().normal(1000)
    assert not np.any(first == second)
    assert np.array_equal(Keystream(b"k" * 32).normal(100), Keystream(b"k" * 32).normal(100))
    with pytest.raises(ConfigError, match="32 bytes"):
        Keystream(b"short")


def test_the_stream_never_repeats_across_calls_of_any_size(stream: Keystream) -> None:
    words = np.concatenate([stream.words(n) for n in (1, 3, 100_000, 7, 65_536, 65_537)])
    assert len(np.unique(words)) == len(words)  # two equal 64-bit words among these: chance 1e-9
    whole = Keystream(bytes(range(32))).words(len(words))
    assert np.array_equal(words, whole)
    again = Keystream(bytes(range(32)))
    mixed = np.concatenate([again.normal(5), again.uniform(5), again.normal(70_000)])
    assert len(np.unique(mixed)) == len(mixed)


def test_a_stream_cannot_be_copied_or_pickled(stream: Keystream) -> None:
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            duplicate(stream)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_cannot_repeat_its_parents_stream(stream: Keystream) -> None:
    stream.normal(10)
    child = os.fork()
    if child == 0:
        try:
            stream.normal(1)
        except RuntimeError:
            os._exit(17)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    assert len(stream.normal(1)) == 1  # the parent goes on
