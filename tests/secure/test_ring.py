"""The ring's numbers mean the same in the clear as on shares."""

import jax
import numpy as np
import pytest

from flaxmpc import secure
from flaxmpc.secure.arithmetic import enable_x64  # pyright: ignore[reportAttributeAccessIssue]
from flaxmpc.secure.ring import FRACTION_BITS, MOST_DROPPED, Integers, by_chance, integers, truncate

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
        return truncate(x * np.int64(2**4), bits)

    parties = group(protocol, fraction_bits=FRACTION_BITS)
    whole = np.rint(X * 2.0 ** (30 if bits > 1 else 16)).astype(np.int64)  # truncated by one bit x 2^29 is to fit
    clear = wide(jax.jit(halved))(whole)
    shared = secure.jit(halved, parties=parties)(integers(whole))
    assert shared.dtype == np.int64
    for found in (clear, shared):
        np.testing.assert_allclose(found, whole * 2.0 ** (4 - bits), rtol=0, atol=1.1)


def test_products_of_integers_are_not_truncated_and_cost_half(group):
    parties = group("ABY3", fraction_bits=FRACTION_BITS)
    x = integers(np.arange(-50, 50) * 2**14)
    ours = secure.jit(lambda x: truncate(x * x, 28), parties=parties).run(x)
    np.testing.assert_allclose(ours.output, np.asarray(x) ** 2 / 2.0**28, atol=1.1)
    assert ours.cost.bytes_sent == 100 * (24 + 28)
    untouched = secure.jit(lambda x: x * x, parties=parties).run(x)
    assert untouched.cost.bytes_sent == 100 * 24
    np.testing.assert_array_equal(untouched.output, np.asarray(x) ** 2)


@pytest.mark.parametrize("settings", [{"fraction_bits": 18}, {"ring": "FM128", "fraction_bits": 30}, {"ring": "FM32"}])
def test_other_parties_are_refused(settings, group):
    """A truncation is by a factor that has the fraction bits of plans: with others it would be off."""
    parties = group("REF2K", **{"fraction_bits": 8, **settings})
    with pytest.raises(secure.SecureError, match=r"30 fraction bits in the ring FM64|int64 has numbers that"):
        secure.jit(lambda x: truncate(x, 3), parties=parties)(integers([8]))


def test_only_numbers_of_the_ring_stay_int64(group):
    """Other integers are JAX's int32, and none is cut off silently."""
    double = secure.jit(lambda x: x + x, parties=group("REF2K", fraction_bits=FRACTION_BITS))
    assert double(np.array([5])).dtype == np.int32
    assert double(integers([2**40])).tolist() == [2**41]
    with pytest.raises(ValueError, match="holds 1099511627776, which is beyond int32"):
        double(np.array([2**40]))


@pytest.mark.parametrize("wrong", [1.5, np.nan, np.inf, 2.0**63, -1e30])
def test_what_is_no_number_of_the_ring_is_refused(wrong, group):
    """Cast to int64 it would be another number without a word."""
    with pytest.raises(ValueError, match="whole and up to 2\\^62, not"):
        integers(np.array([1.0, wrong]))
    with pytest.raises(ValueError, match="whole and up to 2\\^62, not"):
        group("REF2K", fraction_bits=FRACTION_BITS).put(np.array([wrong]).view(Integers))


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
