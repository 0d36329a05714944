"""Numbers as the ring has them: fixed point whose bits the caller keeps account of.

SPU truncates after every product of fixed-point numbers, which takes more than half of the bytes. Products of integers
it leaves as they are. So `to_ring` gives the integer that encodes a number, products and sums are those of integers,
and `truncate` drops bits where the caller wants it. All three mean the same in the clear as on shares; in the clear
they need `jax.enable_x64`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from flaxmpc.secure.arithmetic import enable_x64  # pyright: ignore[reportAttributeAccessIssue]

FRACTION_BITS = 30
"""Of the parties' config. The more, the more bits can be dropped at once; more than these a config has not."""

MOST_DROPPED = 28
"""Bits that one truncation drops: a smaller factor than 2^-28 SPU takes for a very small one, and overflows."""


def to_ring(x: Any) -> Any:
    """x 2^FRACTION_BITS as int64, of float32. On shares this changes the type alone."""
    return _TO.bind(x)


def from_ring(x: Any) -> Any:
    """The inverse: x 2^-FRACTION_BITS as float32, of int64."""
    return _FROM.bind(x)


def truncate(x: Any, bits: int) -> Any:
    """x / 2^bits, rounded: in the clear to the nearest, on shares up or down by chance. Of int64.

    On shares |x| 2^(FRACTION_BITS - bits) must be below 2^62.
    """
    assert 0 <= bits <= MOST_DROPPED, bits
    return _TRUNCATE.bind(x, bits=bits) if bits else x


def by_chance(key: Any) -> Callable[[Any, int], Any]:
    """`truncate` in the clear as it is on shares: up or down by chance, with the exact value as the mean."""
    count = itertools.count()

    def truncated(x: Any, bits: int) -> Any:
        if not bits:
            return x
        random = jax.random.bits(jax.random.fold_in(key, next(count)), x.shape, np.uint32)
        offset = lax.convert_element_type(random >> np.uint32(32 - bits), np.int64)
        return lax.shift_right_arithmetic(x + offset, lax.full_like(x, bits))

    return truncated


def _to(x: Any) -> Any:
    return lax.convert_element_type(lax.round(lax.convert_element_type(x, np.float64) * _one(), _NEAREST), np.int64)


def _from(x: Any) -> Any:
    return lax.convert_element_type(lax.convert_element_type(x, np.float64) / _one(), np.float32)


def _truncate(x: Any, *, bits: int) -> Any:
    return lax.shift_right_arithmetic(x + np.int64(1 << (bits - 1)), lax.full_like(x, bits))


_NEAREST = lax.RoundingMethod.TO_NEAREST_EVEN


def _one() -> np.float64:
    return np.float64(2.0**FRACTION_BITS)


def _primitive(name: str, clear: Any, dtype: Any) -> Primitive:
    made = Primitive(name)
    made.def_impl(clear)
    made.def_abstract_eval(lambda aval, **_: aval.update(dtype=np.dtype(dtype), weak_type=False))
    mlir.register_lowering(made, mlir.lower_fun(clear, multiple_results=False))
    return made


_TO = _primitive("to_ring", _to, np.int64)
_FROM = _primitive("from_ring", _from, np.float32)
_TRUNCATE = _primitive("truncate", _truncate, np.int64)


def on_shares(name: str, x: Any, bits: int = 0) -> Any:
    """The same three as SPU has them, where float64 and int64 are two names of a number in its ring."""
    with enable_x64(True):  # pyright: ignore[reportCallIssue]
        if name == "to_ring":
            return lax.bitcast_convert_type(lax.convert_element_type(x, np.float64), np.int64)
        number = lax.bitcast_convert_type(x, np.float64)
        if name == "truncate":
            return lax.bitcast_convert_type(number * np.float64(2.0**-bits), np.int64)
        return lax.convert_element_type(number, np.float32)
