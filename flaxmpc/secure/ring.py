"""Numbers as the ring has them: integers whose fraction bits the caller keeps account of.

SPU truncates after every product of fixed-point numbers, which takes more than half of the bytes. Products of integers
it leaves as they are. So `integers` are shared, products and sums are those of integers, and `truncate` drops bits
where the caller wants it. It means the same in the clear as on shares; in the clear it needs `jax.enable_x64`.
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


class Integers(np.ndarray):
    """int64 numbers of the ring. Shared they stay int64, where JAX without x64 makes other ones int32."""


def integers(x: Any) -> Integers:
    """Whole numbers as numbers of the ring. ValueError: one that is not whole, or beyond 2^62."""
    array = np.asarray(x)
    wrong = ~((np.abs(array) <= 2.0**62) & (array == np.rint(array)))
    if wrong.any():
        raise ValueError(f"numbers of the ring are whole and up to 2^62, not {array[wrong].flat[0]:g}")
    return array.astype(np.int64).view(Integers)


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
        return _dropped(x + offset, bits)

    return truncated


def _truncate(x: Any, *, bits: int) -> Any:
    return _dropped(x + np.int64(1 << (bits - 1)), bits)


def _dropped(x: Any, bits: int) -> Any:
    """x / 2^bits, rounded down. What is too large for SPU, which multiplies first, is as wrong as there."""
    x = lax.shift_left(x, lax.full_like(x, FRACTION_BITS - bits))
    return lax.shift_right_arithmetic(x, lax.full_like(x, FRACTION_BITS))


_TRUNCATE = Primitive("truncate")
_TRUNCATE.def_impl(_truncate)
_TRUNCATE.def_abstract_eval(lambda aval, **_: aval.update(weak_type=False))
mlir.register_lowering(_TRUNCATE, mlir.lower_fun(_truncate, multiple_results=False))


def truncated_on_shares(x: Any, bits: int) -> Any:
    """`truncate` as SPU has it, where float64 and int64 are two names of a number in its ring."""
    with enable_x64(True):  # pyright: ignore[reportCallIssue]
        number = lax.bitcast_convert_type(x, np.float64)
        return lax.bitcast_convert_type(number * np.float64(2.0**-bits), np.int64)
