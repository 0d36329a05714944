"""How the products of two batches of secret matrices are computed: head by head, or grouped."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# (batch, head, m, k) x (batch, head, k, n).
Product = Callable[[Float[Array, "batch head m k"], Float[Array, "batch head k n"]], Float[Array, "batch head m n"]]


# As functions of their own they have one name in a jaxpr, and a plan of bits takes each for one product.
@jax.jit
def matmul(a: Float[Array, "batch head m k"], b: Float[Array, "batch head k n"]) -> Float[Array, "batch head m n"]:
    """The plain batched product: fastest in the clear. SPU runs it head after head (12 heads: 32 rounds in ABY3)."""
    return jax.lax.batch_matmul(a, b)


# XLA turns a grouped convolution into a dilated one, whose work grows with the square of the groups. A product and its
# truncation take 2.7 rounds, a product alone one: so where a plan of bits leaves truncations out, more convolutions of
# less work take less time, on a slow line too.
_MOST_GROUPS, _MOST_WORK, _LESS_WORK = 24, 2**28, 3 * 2**25


@functools.partial(jax.jit, static_argnames="most_work")
def grouped_conv(
    a: Float[Array, "batch head m k"], b: Float[Array, "batch head k n"], most_work: int = _MOST_WORK
) -> Float[Array, "batch head m n"]:
    """The same product as grouped 1-D convolutions of width 1: the same bytes in MPC, 2.7 rounds each.

    As few convolutions as there can be, of as many products each, have up to 24 and no more than so much work.
    """
    (batch, heads, m, k), n = a.shape, b.shape[-1]
    most = max(1, min(_MOST_GROUPS, math.isqrt(most_work // (m * k * n))))
    step = -(-batch * heads // -(-batch * heads // most))
    a, b = a.reshape(-1, m, k), b.reshape(-1, k, n)
    pieces = [_one_conv(a[i : i + step], b[i : i + step]) for i in range(0, batch * heads, step)]
    return jnp.concatenate(pieces).reshape(batch, heads, m, n)


grouped_conv_of_less_work: Product = functools.partial(grouped_conv, most_work=_LESS_WORK)
"""`grouped_conv` for a plan of bits. Of 128 tokens, 12 heads of 64 features stand in two convolutions, not in one."""


def rows_together(rows: int, product: Product) -> int:
    """How many rows a product of rows with themselves takes at once, where only each one with itself is wanted.

    Products one by one take rounds each, so one takes all. Of a grouped one each group takes as few as there can be.
    """
    if product is matmul:
        return rows
    return rows // next(groups for groups in range(_MOST_GROUPS, 0, -1) if rows % groups == 0)


def _one_conv(a: Float[Array, "group m k"], b: Float[Array, "group k n"]) -> Float[Array, "group m n"]:
    (groups, m, k), n = a.shape, b.shape[-1]
    signal_1xMxGK = a.transpose(1, 0, 2).reshape(1, m, groups * k)
    kernel_1xKxGN = b.transpose(1, 0, 2).reshape(1, k, groups * n)
    out_1xMxGN = jax.lax.conv_general_dilated(
        signal_1xMxGK, kernel_1xKxGN, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
    )
    return out_1xMxGN.reshape(m, groups, n).transpose(1, 0, 2)
