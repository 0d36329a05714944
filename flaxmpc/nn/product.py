"""How the products of two batches of secret matrices are computed: head by head, or grouped."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# (batch, head, m, k) x (batch, head, k, n).
Product = Callable[[Float[Array, "batch head m k"], Float[Array, "batch head k n"]], Float[Array, "batch head m n"]]


def matmul(a: Float[Array, "batch head m k"], b: Float[Array, "batch head k n"]) -> Float[Array, "batch head m n"]:
    """The plain batched product: fastest in the clear. SPU runs it head after head (12 heads: 32 rounds in ABY3)."""
    return jnp.matmul(a, b)


# XLA turns a grouped convolution into a dilated one, whose work grows with the square of the groups: at 192 groups
# (16 sentences, 12 heads) it took ten times as long as all matrix products of the layer.
_MOST_GROUPS = 24


@jax.jit  # one name in a jaxpr for all convolutions together, which a plan of bits takes for one product
def grouped_conv(
    a: Float[Array, "batch head m k"], b: Float[Array, "batch head k n"]
) -> Float[Array, "batch head m n"]:
    """The same product as grouped 1-D convolutions of width 1: the same bytes in MPC, 2.7 rounds for up to 24 heads.

    One convolution holds all heads of as many sentences as that allows, at least of one.
    """
    batch, heads = a.shape[:2]
    step = max(1, _MOST_GROUPS // heads)
    return jnp.concatenate([_one_conv(a[i : i + step], b[i : i + step]) for i in range(0, batch, step)])


def rows_together(rows: int, product: Product) -> int:
    """How many rows a product of rows with themselves takes at once, where only each one with itself is wanted.

    Products one by one take rounds each, so one takes all. Of a grouped one each group takes as few as there can be.
    """
    if product is not grouped_conv:
        return rows
    return rows // next(groups for groups in range(_MOST_GROUPS, 0, -1) if rows % groups == 0)


def _one_conv(a: Array, b: Array) -> Array:
    batch, heads, m, k = a.shape
    n = b.shape[-1]
    groups = batch * heads
    signal_1xMxGK = a.transpose(2, 0, 1, 3).reshape(1, m, groups * k)
    kernel_1xKxGN = b.transpose(2, 0, 1, 3).reshape(1, k, groups * n)
    out_1xMxGN = jax.lax.conv_general_dilated(
        signal_1xMxGK, kernel_1xKxGN, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
    )
    return out_1xMxGN.reshape(m, batch, heads, n).transpose(1, 2, 0, 3)
