"""Integers in SPU's ring as JAX has them, each in its width, and exact quotients: of integers, and of floats."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from flaxmpc.secure.protocol import RING_BITS, Config

try:
    from jax import enable_x64  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # jax before 0.8
    from jax.experimental import enable_x64


class Arithmetic:
    """Of the ring of a config. Operands are traced values, or arrays that are known while compiling.

    Attributes:
        config: the config.
        integer: the type whose numbers are those of the ring, as far as JAX has one.
    """

    def __init__(self, config: Config):
        self.config = config
        self._ring_bits = RING_BITS[config.ring]
        self.integer: Any = np.int64 if self._ring_bits > 32 else np.int32
        self._wide = False

    def x64(self, wide: bool = False) -> Any:
        """The context in which what was made here can be lowered, or something else that is `wide`."""
        self._wide |= wide
        return enable_x64(self._wide or bool(jax.config.jax_enable_x64))  # pyright: ignore[reportAttributeAccessIssue]

    def integers(self) -> Any:
        """The context in which JAX has `integer`."""
        return self.x64(self.integer is np.int64)

    def _to_ring(self, x: Any) -> Any:
        """As `integer`, which on shares is the same number. Within `integers`."""
        return lax.convert_element_type(x, self.integer)

    def holds(self, dtype: Any) -> bool:
        """Whether the ring has all numbers of an integer type, with their sign."""
        return jnp.iinfo(dtype).max < 2 ** (self._ring_bits - 1)

    def divides(self, dtype: Any) -> bool:
        """Whether the ring is large enough to divide integers of a type."""
        return jnp.iinfo(dtype).bits + 1 < self._ring_bits

    def wrap(self, x: Any, dtype: Any = None) -> Any:
        """x modulo 2^bits of `dtype` (by default its own), in the type's range."""
        dtype = np.dtype(dtype or x.dtype)
        info = jnp.iinfo(dtype)
        if info.bits >= self._ring_bits or info.bits == 64:
            return lax.convert_element_type(x, dtype)  # the ring itself wraps, or the type is int64
        with self.integers():
            offset = self.integer(-info.min)
            low = ((self._to_ring(x) + offset) & self.integer(2**info.bits - 1)) - offset
            return lax.convert_element_type(low, dtype)

    def divide(self, a: Any, b: Any) -> tuple[Any, Any]:
        """Quotient, towards zero, and remainder of integers of one type, as JAX has them: a/0 is -1, remainder a.

        A known divisor: a product and a shift (Granlund and Montgomery, "Division by Invariant Integers using
        Multiplication", PLDI 1994). Else bit by bit: one comparison for each bit of the type, one after the other.
        """
        dtype = np.dtype(b.dtype)
        info = jnp.iinfo(dtype)
        by_shift = not isinstance(b, Tracer) and info.bits <= 32 and info.max < 2**31 and self.integer is np.int64
        known = np.asarray(b) if by_shift else None
        with self.integers():
            a, b = self._to_ring(a), self._to_ring(b)
            size_a, size_b = (jnp.abs(a), jnp.abs(b)) if info.min else (a, b)
            if known is not None:
                quotient = _multiply_and_shift(size_a, known)
                remainder = size_a - quotient * size_b
            else:
                quotient, remainder = _bit_by_bit(size_a, size_b, info.bits)
            if info.min:
                negative = a < 0
                quotient = jnp.where(negative ^ (b < 0), -quotient, quotient)
                remainder = jnp.where(negative, -remainder, remainder)
            by_zero = b == 0
            found: tuple[Any, Any] = (
                jnp.where(by_zero, self.integer(-1 if info.min else info.max), quotient),
                jnp.where(by_zero, a, remainder),
            )
            return found[0].astype(dtype), found[1].astype(dtype)

    def encoded(self, x: Any) -> Any:
        """The integer that encodes a float: x 2^fraction_bits. Within `integers`."""
        if not isinstance(x, Tracer):
            return np.rint(np.asarray(x, np.float64) * 2.0**self.config.fraction_bits).astype(self.integer)
        # On shares this changes the type alone; of a constant XLA would take the bits of the float.
        return self._to_ring(lax.bitcast_convert_type(x, np.int32))

    def remainder(self, x: Any, y: Any) -> Any:
        """x - y trunc(x / y) of floats: a quotient that is nearly right, then integers, which are exact."""
        sign = x < 0
        x, y = (jnp.abs(v) if isinstance(v, Tracer) else np.abs(v) for v in (x, y))
        with self.integers():
            divisor = self.encoded(y)
            left = self.encoded(x)
            for _ in range(2):  # each leaves a part of 2^-13 of the quotient
                quotient = jnp.floor(_float(left) / y)
                left = left - lax.convert_element_type(quotient, self.integer) * divisor
            left = jnp.where(left < 0, left + divisor, left)
            left = jnp.where(left >= divisor, left - divisor, left)
            found = _float(left)
        return jnp.where(sign, -found, found)


def _float(integer: Any) -> Any:
    """The float that an integer of the ring encodes."""
    return lax.bitcast_convert_type(lax.convert_element_type(integer, np.int32), np.float32)


def _multiply_and_shift(a: Any, divisor: np.ndarray) -> Any:
    """a // |divisor| for 0 <= a <= 2^31 (int64) and known divisors; anything for 0."""
    size = np.abs(divisor.astype(np.int64))
    log = np.ceil(np.log2(np.maximum(size, 1))).astype(np.int64)
    power = np.int64(1) << (31 + log)
    factor = -(-power // np.maximum(size, 1))
    return (a * factor) >> (31 + log)


def _bit_by_bit(a: Any, b: Any, bits: int) -> tuple[Any, Any]:
    """Quotient and remainder of 0 <= a < 2^bits and 0 <= b < 2^bits, by hand's long division in base 2."""
    shape = jnp.broadcast_shapes(jnp.shape(a), jnp.shape(b))
    quotient = left = jnp.zeros(shape, a.dtype)
    places = np.arange(bits, dtype=a.dtype).reshape(-1, *[1] * len(shape))
    digits = (jnp.broadcast_to(a, shape) >> places) & 1
    for place in reversed(range(bits)):
        left = left * 2 + digits[place]
        fits = left >= b
        left = jnp.where(fits, left - b, left)
        quotient = quotient * 2 + lax.convert_element_type(fits, a.dtype)
    return quotient, left


def wraps(dtype: Any) -> bool:
    """Whether numbers of a type are expected to wrap: unsigned ones, and those of 8 and 16 bits."""
    return jnp.issubdtype(dtype, jnp.integer) and (jnp.iinfo(dtype).min == 0 or jnp.iinfo(dtype).bits <= 16)
