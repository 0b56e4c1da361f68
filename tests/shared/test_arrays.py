"""Named arrays: out of a module and back to the bit, and a digest of exactly what they are."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared import arrays

ARRAYS = st.dictionaries(
    st.text(min_size=1, max_size=5),
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, max_side=4), elements=st.floats(-9, 9, width=32)),
    max_size=4,
)


def test_what_is_read_is_what_was_written_and_the_rest_stays():
    module = torch.nn.Linear(3, 2)
    bias = module.bias.detach().clone()
    new = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    arrays.write(module, new)
    assert arrays.read(module, ["weight"])["weight"].tobytes() == new["weight"].tobytes()
    assert torch.equal(module.bias, bias)
    assert list(arrays.read(module, ["bias", "weight"])) == ["bias", "weight"]


def test_what_is_read_is_a_copy_in_float32():
    module = torch.nn.Linear(3, 2).to(torch.bfloat16)
    held = arrays.read(module, ["weight"])
    before = held["weight"].copy()
    with torch.no_grad():
        module.weight.add_(1)
    assert held["weight"].dtype == np.float32
    np.testing.assert_array_equal(held["weight"], before)


def test_the_difference_is_after_minus_before_of_the_names_after():
    before = {"a": np.ones(2, np.float32), "b": np.ones(1, np.float32)}
    (found,) = arrays.difference({"a": np.full(2, 3, np.float32)}, before).items()
    assert found[0] == "a"
    np.testing.assert_array_equal(found[1], [2, 2])


@given(held=ARRAYS)
def test_the_digest_rests_on_names_shapes_and_values_alone(held):
    digest = arrays.digest(held)
    assert digest == arrays.digest(dict(reversed(held.items())))
    assert digest == arrays.digest({name: np.array(array, order="F") for name, array in held.items()})
    assert digest == arrays.digest({name: array.astype(">f4") for name, array in held.items()})
    for name, array in held.items():
        others = {key: value for key, value in held.items() if key != name}
        assert digest != arrays.digest(others)
        assert digest != arrays.digest({**others, name + "x": array})
        assert digest != arrays.digest({**others, name: array[None]})
        assert digest != arrays.digest({**others, name: array + np.float32(1)} if array.size else others)


def test_the_digest_does_not_change_from_version_to_version():
    held = {"b": np.array([1.5], np.float32), "a": np.zeros((1, 2), np.float32)}
    plain = b"a\0(1, 2)\0" + bytes(8) + b"b\0(1,)\0" + np.float32(1.5).tobytes()
    assert arrays.digest(held) == hashlib.sha256(plain).hexdigest()


@pytest.mark.parametrize(
    ("other", "same"),
    [({"a": (2,)}, True), ({"a": (1, 2)}, False), ({"b": (2,)}, False), ({"a": (2,), "b": (1,)}, False), ({}, False)],
)
def test_shapes_are_the_same_when_names_and_shapes_are(other, same):
    held = {"a": np.zeros(2, np.float32)}
    assert arrays.same_shapes(held, {name: np.zeros(shape, np.float32) for name, shape in other.items()}) is same


def test_the_size_is_that_of_the_values():
    assert arrays.nbytes({"a": np.zeros((3, 4), np.float32), "b": np.zeros(2, np.float32)}) == 56
