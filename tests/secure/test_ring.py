"""The ring's numbers mean the same in the clear as on shares."""

import jax
import numpy as np
import pytest

from flaxmpc import secure
from flaxmpc.secure.arithmetic import enable_x64  # pyright: ignore[reportAttributeAccessIssue]
from flaxmpc.secure.ring import FRACTION_BITS, MOST_DROPPED, by_chance, from_ring, to_ring, truncate

X = np.array([0.0, 1.0, -1.0, 0.75, -3.125, 1000.0, -777.75, 2.0**-6], np.float32)


def wide(function):
    def run(*args):
        with enable_x64(True):  # pyright: ignore[reportCallIssue]
            return function(*args)

    return run


@pytest.mark.parametrize("protocol", ["ABY3", "SEMI2K", "REF2K"])
@pytest.mark.parametrize("bits", [1, 12, MOST_DROPPED])
def test_truncation_divides_and_rounds(protocol, bits, group):
    def halved(x):
        return from_ring(truncate(to_ring(x) * np.int64(2**4), bits))

    parties = group(protocol, fraction_bits=FRACTION_BITS)
    x = X if bits > 1 else X / 2**14  # x 2^29 is to fit
    expected = x.astype(np.float64) * 2.0 ** (4 - bits)
    clear = wide(jax.jit(halved))(x)
    shared = secure.jit(wide(halved), parties=parties)(x)
    for found in (clear, shared):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1.1 * 2.0**-FRACTION_BITS)


def test_products_of_integers_are_not_truncated_and_cost_half(group):
    def product(x):
        number = to_ring(x)
        return from_ring(truncate(number * number, 28))

    parties = group("ABY3", fraction_bits=FRACTION_BITS)
    x = np.arange(-50, 50).astype(np.float32) * 2.0**-16
    ours = secure.jit(wide(product), parties=parties).run(x)
    np.testing.assert_allclose(ours.output, x.astype(np.float64) ** 2 * 4, atol=1e-8)
    assert ours.cost.bytes_sent == 100 * (24 + 28)
    untouched = secure.jit(wide(lambda x: from_ring(to_ring(x) * to_ring(x))), parties=parties).run(x)
    assert untouched.cost.bytes_sent == 100 * 24
    np.testing.assert_allclose(untouched.output, x.astype(np.float64) ** 2 * 2**30, rtol=1e-5)


def test_more_bits_than_one_truncation_drops_are_none():
    with pytest.raises(AssertionError):
        truncate(np.zeros(1, np.int64), MOST_DROPPED + 1)


@pytest.mark.parametrize("bits", [0, 1, 7, MOST_DROPPED])
def test_by_chance_is_up_or_down_and_right_in_the_mean(bits):
    exact = np.linspace(-3.0, 3.0, 20_001)
    with enable_x64(True):  # pyright: ignore[reportCallIssue]
        x = jax.numpy.asarray(np.rint(exact * 2.0**bits).astype(np.int64))
        drop = by_chance(jax.random.key(0))
        once, again = np.asarray(drop(x, bits)), np.asarray(drop(x, bits))
    whole = np.asarray(x) / 2.0**bits
    for found in (once, again):
        assert (np.abs(found - whole) < 1.0).all()
        assert abs((found - whole).mean()) < 0.02
    if bits > 1:
        assert (once != again).any()
        assert (once - whole).std() == pytest.approx(6.0**-0.5, abs=0.02)
