import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flaxmpc.models.quantize import GROUP, dequantize, quantize

bits_of = pytest.mark.parametrize("bits", [8, 4])
# Groups of one size, and groups where one number dwarfs the others.
matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.sampled_from([GROUP, 2 * GROUP])),
    elements=st.floats(-1000, 1000, width=32) | st.floats(-(2.0**-10), 2.0**-10, width=32),
)
LARGEST = {8: 127, 4: 7}


def round_trip(weights, bits):
    return dequantize(*quantize(weights, bits))


@bits_of
@given(weights=matrices)
def test_a_weight_moves_by_half_a_step_of_its_group(bits, weights):
    largest = np.abs(weights.reshape(len(weights), -1, GROUP)).max(-1)
    # float16 holds the scale within 2^-11, and no smaller than 2^-14.
    step = np.maximum(largest / LARGEST[bits], 2.0**-14)
    bound = (0.5 * step * (1 + 2.0**-11) + largest * 2.0**-11).repeat(GROUP, -1)
    assert (np.abs(round_trip(weights, bits) - weights) <= bound * (1 + 1e-5)).all()


@bits_of
@given(weights=matrices)
def test_stored_weights_are_stored_again_without_loss(bits, weights):
    once = round_trip(weights, bits)
    np.testing.assert_array_equal(round_trip(once, bits), once)


@bits_of
@given(weights=matrices)
def test_zero_and_sign_are_kept(bits, weights):
    stored = round_trip(weights, bits)
    assert (stored[weights == 0] == 0).all()
    assert (stored * weights >= 0).all()
    np.testing.assert_array_equal(round_trip(-weights, bits), -stored)


def test_what_is_stored_is_small():
    weights = np.random.default_rng(0).normal(size=(4, 128)).astype(np.float32)
    integers, scale = quantize(weights, 8)
    assert (integers.dtype, integers.shape, scale.dtype, scale.shape) == (np.int8, (4, 128), np.float16, (4, 2))
    integers, scale = quantize(weights, 4)
    assert (integers.dtype, integers.shape, scale.dtype, scale.shape) == (np.uint8, (4, 64), np.float16, (4, 2))
    assert dequantize(integers, scale).dtype == np.float32


@bits_of
def test_every_integer_comes_back(bits):
    weights = np.resize(np.arange(-LARGEST[bits], LARGEST[bits] + 1), (5, 2 * GROUP)).astype(np.float32)
    weights[:, ::GROUP] = LARGEST[bits]  # so every group has the scale 1
    np.testing.assert_array_equal(round_trip(weights, bits), weights)


@pytest.mark.parametrize(
    ("weights", "bits", "message"),
    [
        (np.zeros((2, 64)), 5, r"bits must be one of \[4, 8\], not 5"),
        (np.zeros((2, 65)), 8, "multiple of 64 columns"),
        (np.zeros(64), 8, "multiple of 64 columns"),
        (np.full((1, 64), 1e9), 8, "only finite weights"),
        (np.full((1, 64), np.nan), 4, "only finite weights"),
    ],
)
def test_what_cannot_be_stored_is_refused(weights, bits, message):
    with pytest.raises(ValueError, match=message):
        quantize(weights, bits)
