"""Keeps what XLA would rewrite as it was written: over real numbers the same, in fixed point it may overflow or vanish.

While a function is compiled for shares, XLA turns (a / b) / c into a / (b c), whose denominator may be beyond the ring,
and (a k) (b l), of constants k and l that are whole arrays, into (a b) (k l). No number of the function as it was
written says so, and nobody sees the numbers on shares.
"""

from __future__ import annotations

from typing import Any

import jax

try:
    from jax.ffi import ffi_call  # pyright: ignore[reportMissingImports]
except ImportError:  # jax 0.4
    from jax.extend import ffi

    def ffi_call(target_name: str, struct: Any) -> Any:
        return lambda x: ffi.ffi_call(target_name, struct, x)


# SPU's name of an operation that gives its operand as it is: as the sum of shares that every number with a fraction is.
_SAME = "spu.prefer_a"


def apart(x: Any) -> Any:
    """A traced array itself, of which XLA knows nothing. It sends nothing: constants are public, floats sums."""
    return ffi_call(_SAME, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)
