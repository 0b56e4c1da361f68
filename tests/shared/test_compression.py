"""Packed updates: how near they are, whether their mean is right, how long they are, and what is not unpacked."""

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from client.privacy.randomness import Keystream
from shared import compression
from shared.arrays import same_shapes
from shared.compression import compress, decompress
from shared.messages import MessageError
from shared.run_config import Compression

LARGEST = 2.0**120  # the fold refuses far smaller ones
FLOATS = st.floats(-LARGEST, LARGEST, width=32)
SHAPES = npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6)
UPDATES = st.dictionaries(
    st.text("ab.", min_size=1, max_size=4), npst.arrays(np.float32, SHAPES, elements=FLOATS), max_size=4
)
EVERY = [
    Compression(),
    Compression(update="float16"),
    Compression(update="int8", block=8),
    Compression(update="int8"),
    *(Compression(update="top-k", keep=keep) for keep in (1e-9, 0.01, 0.1, 0.7, 1.0)),
]
SETTINGS = st.sampled_from(EVERY)


def words(key="words"):
    return Keystream(hashlib.sha256(key.encode()).digest()).words


def flat(arrays):
    return np.concatenate([np.zeros(0, np.float32), *(arrays[name].ravel() for name in sorted(arrays))])


def normal(n, seed=0):
    return {"b": np.random.default_rng(seed).normal(size=n).astype(np.float32)}


def sent(update, chosen, residual=None, key="words"):
    """Send an update; return what arrives, and what is left."""
    packed, left = compress(update, residual or {}, chosen, words(key))
    return decompress(packed, update, chosen), left


# -- there and back -----------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(UPDATES, SETTINGS)
def test_any_update_arrives_in_its_shapes_and_as_long_as_was_said(update, chosen):
    packed, _ = compress(update, {}, chosen, words())
    arrived = decompress(packed, update, chosen)
    assert same_shapes(arrived, update)
    assert all(array.dtype == np.float32 for array in arrived.values())
    assert compression.size(update, chosen) == (packed.nbytes if chosen.update != "none" else flat(update).nbytes)


@settings(max_examples=100, deadline=None)
@given(UPDATES)
def test_by_default_an_update_travels_as_it_is(update):
    packed, left = compress(update, {}, Compression(), words())
    assert packed is update
    assert left == {}
    assert decompress(packed, update, Compression()) is update


@settings(max_examples=200, deadline=None)
@given(UPDATES)
def test_float16_is_within_its_own_rounding_of_the_largest_value_and_never_overflows(update):
    values, arrived = flat(update).astype(float), flat(sent(update, Compression(update="float16"))[0]).astype(float)
    largest = np.abs(values).max(initial=0.0)
    smallest = max(largest * 2.0**-38, 2.0**-126 * 2.0**-24)  # spacing of the subnormal float16 in these scales
    # eleven bits, or half a subnormal's spacing; and half of the smallest float32, which the product is rounded to
    assert (np.abs(arrived - values) <= np.maximum(np.abs(values) * 2.0**-11, smallest / 2) + 2.0**-150).all()


@settings(max_examples=200, deadline=None)
@given(UPDATES, st.sampled_from([8, 9, 256]), st.text(max_size=3))
def test_int8_is_within_a_step_of_its_blocks_scale(update, block, key):
    values = flat(update).astype(float)
    arrived = flat(sent(update, Compression(update="int8", block=block), key=key)[0]).astype(float)
    for start in range(0, values.size, block):
        part = slice(start, start + block)
        step = np.abs(values[part]).max(initial=0.0) / 127 * (1 + 2.0**-22) + 2.0**-149
        assert (np.abs(arrived[part] - values[part]) <= step).all()


# -- int8: the mean is the value -------------------------------------------------------------------------------------


def test_the_mean_over_all_words_of_int8_is_the_value_to_two_to_the_minus_33_of_a_step():
    """Every draw of 32 bits is gone through: the rounding is up below a limit, which is found by halving."""
    chosen = Compression(update="int8", block=16)
    update = {"a": np.concatenate([normal(4000)["b"], np.float32([0, -0.0, 1e-30, -1e-30, 5.5, -5.5, 3e38, -2e38])])}
    n = update["a"].size

    def codes(drawn):
        held = np.zeros(n + n % 2, "<u4")
        held[:n] = drawn
        offered = iter(np.array_split(held.view("<u8"), [compression.CHUNK // 2]))
        packed, _ = compress(update, {}, chosen, lambda count: next(offered)[:count])
        scales = packed[4 : 4 + 4 * -(-n // 16)].view("<f4").repeat(16)[:n].astype(float)
        return packed[-n:].view(np.int8).astype(float), scales

    away, scales = codes(np.zeros(n, np.uint64))  # the draw that rounds away from 0 if any does
    near, _ = codes(np.full(n, 2**32 - 1))
    low, high = np.zeros(n, np.int64), np.where(away == near, 0, 2**32)  # draws below the limit round away
    while (high - low > 1).any():
        middle = (low + high) // 2
        up = (codes(np.minimum(middle, 2**32 - 1))[0] == away) & (away != near)
        low, high = np.where(up, middle, low), np.where(up, high, np.minimum(high, middle))
    many = np.where(away == near, 0, high)
    mean = near + (away - near) * many / 2.0**32
    assert (np.abs(mean - update["a"].astype(float) / scales) <= 2.0**-33).all()
    assert (away != near).mean() > 0.9


def test_int8_rounds_neighbours_independently():
    """The product of two values' errors has mean 0; six of its deviations are exceeded once in 10^9."""
    values = np.full(200_000, 0.3, np.float32)
    values[::256] = 127
    error = flat(sent({"a": values}, Compression(update="int8"))[0]) - values
    rest = error[np.arange(values.size) % 256 > 1]
    assert set(np.unique(rest)) == {np.float32(0) - np.float32(0.3), np.float32(1) - np.float32(0.3)}
    products = rest[1:] * rest[:-1]
    assert abs(products.mean()) < 6 * 0.21 / math.sqrt(products.size)
    assert abs(rest.mean()) < 6 * math.sqrt(0.21 / rest.size)


def test_other_words_round_otherwise_and_the_same_words_the_same():
    chosen = Compression(update="int8")
    first, second, again = (flat(sent(normal(10_000), chosen, key=key)[0]) for key in ("one", "two", "one"))
    assert np.array_equal(first, again)
    assert 0.1 < (first != second).mean() < 0.9


# -- top-k: what is sent and what is left -----------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(UPDATES, st.sampled_from([1e-9, 0.05, 0.3, 0.7, 1.0]))
def test_top_k_sends_the_largest_and_what_it_sends_and_leaves_is_the_update(update, keep):
    arrived, left = sent(update, Compression(update="top-k", keep=keep))
    values, there, here = flat(update), flat(arrived), flat(left)
    assert np.array_equal(there + here, values)
    assert not (there.astype(bool) & here.astype(bool)).any()
    assert np.count_nonzero(there) <= math.ceil(Fraction(str(keep)) * values.size)
    assert np.abs(here).max(initial=0.0) <= np.abs(values[there != 0]).min(initial=np.inf)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(npst.arrays(np.int32, 23, elements=st.integers(-1000, 1000)), min_size=1, max_size=12),
    st.sampled_from([0.04, 0.2, 0.5]),
)
def test_over_rounds_all_that_was_sent_and_the_residual_are_the_sum_of_the_updates(updates, keep):
    """Whole numbers, of which float32 sums are exact; of others each round's identity holds, which is above."""
    chosen, residual, total = Compression(update="top-k", keep=keep), {}, np.zeros(23)
    for update in updates:
        arrived, residual = sent({"a": update.astype(np.float32)}, chosen, residual)
        total += arrived["a"]
    assert np.array_equal(total + residual["a"], np.sum(updates, axis=0))


def test_a_round_adds_the_residual_in_float32_and_takes_out_exactly_what_it_sends():
    chosen, residual = Compression(update="top-k", keep=0.05), {}
    for seed in range(20):
        update = normal(1000, seed)
        expected = update["b"] + (residual["b"] if residual else np.float32(0))
        arrived, residual = sent(update, chosen, residual)
        assert np.array_equal(arrived["b"] + residual["b"], expected)
    assert np.count_nonzero(residual["b"]) == 950


def test_of_equal_values_the_first_are_sent_whatever_the_machine():
    arrived, _ = sent({"a": np.full(100, -2, np.float32)}, Compression(update="top-k", keep=0.1))
    assert np.flatnonzero(arrived["a"]).tolist() == list(range(10))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("chosen", EVERY, ids=repr)
def test_an_update_that_is_not_finite_arrives_as_one_and_leaves_nothing_behind(chosen, bad):
    update = normal(1000)
    update["b"][[3, 700]] = bad
    arrived, left = sent(update, chosen)
    assert not np.isfinite(arrived["b"]).all()
    assert all(np.isfinite(array).all() for array in left.values())


# -- how long it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "factor"),
    [
        (Compression(update="float16"), 2),
        (Compression(update="int8"), 4 / (1 + 4 / 256)),
        (Compression(update="top-k", keep=0.1), 4 / (0.4 + 1 / 8)),  # a bit for each place
        (Compression(update="top-k", keep=0.01), 4 / 0.08),  # the places' numbers
    ],
    ids=repr,
)
def test_a_packed_update_is_smaller_by_its_factor(chosen, factor):
    update = normal(100_000)
    packed, _ = compress(update, {}, chosen, words())
    assert update["b"].nbytes / packed.nbytes == pytest.approx(factor, rel=1e-3)


# -- what is not unpacked ---------------------------------------------------------------------------------------------


def packed_by(name, n=1000, **more):
    return compress(normal(n), {}, Compression(update=name, **more), words())[0]


def refused(packed, chosen, n=1000):
    with pytest.raises(MessageError) as raised:
        decompress(packed, normal(n), chosen)
    said = str(raised.value)
    assert said.endswith(".")
    assert said.isprintable()
    return said


@pytest.mark.parametrize("chosen", EVERY, ids=repr)
@pytest.mark.parametrize("name", ["none", "float16", "int8", "top-k"])
def test_an_update_that_another_encoding_packed_is_refused(chosen, name):
    if name == chosen.update:
        return
    assert f"compression.update={chosen.update!r}" in refused(packed_by(name), chosen).replace(" is 'none'", "='none'")


@pytest.mark.parametrize("chosen", EVERY[1:], ids=repr)
@pytest.mark.parametrize("change", [lambda p: p[:-1], lambda p: np.append(p, p[:1]), lambda p: p[:4]])
def test_an_update_of_another_length_is_refused(chosen, change):
    packed = packed_by(chosen.update, **chosen.model_dump(exclude={"update"}))
    assert "bytes, and" in refused(change(packed), chosen)


@pytest.mark.parametrize("chosen", EVERY[1:], ids=repr)
def test_an_update_shorter_than_its_mark_is_refused(chosen):
    for length in range(4):
        assert "is not packed as" in refused(np.zeros(length, np.uint8), chosen)


@pytest.mark.parametrize(
    "places",
    [[0, 0], [5, 3], [3, 1000], [3, 2**32 - 1], [2**31, 2**31 + 1]],
    ids=["twice", "out of order", "one too far", "far", "negative to some"],
)
def test_places_that_are_not_each_once_in_order_and_in_range_are_refused(places):
    chosen = Compression(update="top-k", keep=0.002)
    packed = packed_by("top-k", keep=0.002).copy()
    packed[-8:] = np.array(places, "<u4").view(np.uint8)
    assert "places are not 2 of 1000" in refused(packed, chosen)


@pytest.mark.parametrize("bits", [0, 255])
def test_places_that_are_more_or_fewer_than_the_values_are_refused(bits):
    packed = packed_by("top-k").copy()
    packed[-125:] = bits
    assert f"marks {bits and 1000} places, and 100 are expected" in refused(packed, Compression(update="top-k"))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(EVERY[1:]), st.integers(0, 40))
def test_any_bytes_of_the_right_length_and_mark_are_refused_or_unpacked_to_the_shapes(data, chosen, n):
    like = {"a": np.zeros(n, np.float32)}
    length = compression.size(like, chosen)
    body = data.draw(st.binary(min_size=length - 4, max_size=length - 4))
    packed = np.frombuffer(compression.MARKS[chosen.update] + body, np.uint8)
    try:
        assert same_shapes(decompress(packed, like, chosen), like)
    except MessageError:
        assert chosen.update == "top-k"
