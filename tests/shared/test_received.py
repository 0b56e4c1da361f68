"""A received array is a view of its bytes, the same as Flower reads, and nothing that is no plain array is read."""

from tokenize import TokenError

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shared import received


@given(
    arrays.arrays(
        st.sampled_from(["<f4", ">f4", "<f8", "|u1", "|b1", "<i8"]),
        arrays.array_shapes(min_dims=0, min_side=0),
        fill=st.nothing(),
    )
)
def test_a_view_is_what_flower_reads(array):
    for each in (array, np.asfortranarray(array)):
        sent = Array(each)
        seen, read = received.view(sent), sent.numpy()
        assert (seen.dtype, seen.shape, seen.tobytes()) == (read.dtype, read.shape, read.tobytes())


def test_a_view_shares_its_messages_memory_and_cannot_change_it():
    sent = Array(np.arange(1000, dtype=np.float32))
    seen = received.view(sent)
    assert np.shares_memory(seen, np.frombuffer(sent.data, np.uint8))
    assert not seen.flags.writeable


GOOD = Array(np.arange(4, dtype=np.float32)).data
BAD = {
    "nothing": b"",
    "no header": b"x" * 200,
    "one value short": GOOD[:-4],
    "one value more": GOOD + b"\0" * 4,
    "a header without an end": GOOD[:8] + b"\xff\xff" + b"(" * 70_000,
    "another version": GOOD[:6] + b"\x03\x00" + GOOD[8:],
    "negative lengths": GOOD.replace(b"(4,)", b"(-4,"),
    "code for a header": GOOD.replace(b"{'descr': '<f4'", b"{exit():  '<f4'"),
    "a pickle": GOOD.replace(b"'<f4'", b"'|O' ").replace(b"(4,)", b"(2,)"),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_what_is_no_array_is_not_read(data):
    with pytest.raises((ValueError, TokenError)):
        received.view(Array("float32", (4,), "numpy.ndarray", data))


def test_another_way_to_write_arrays_is_not_read():
    with pytest.raises(ValueError, match="travel as"):
        received.view(Array("float32", (4,), "safetensors", GOOD))
