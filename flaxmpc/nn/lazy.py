"""A hidden state that is not computed yet: folding as algebra on values, so that a model is written once.

Arithmetic with secret numbers costs per product, so what can be done to the weights is done there. A `Lazy` state is a
sum of products that nobody has computed: arrays that are there times matrices, and a bias. A dense layer multiplies its
matrix into theirs, a residual adds terms, and one product computes the sum when something else than a matrix asks for
it. What the matrices become depends on weights alone: `flaxmpc.secure.hoist` computes it once, at the model's owner.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxmpc.nn.product import Product, matmul, rows_together


class Unit(NamedTuple):
    """A factor a of every number of a token, which attention of degree k takes for the mask and 1/n.

    Numerators of degree k turn the product of two tokens' factors a = m n^(-1/2k) into m m / n: mask and normaliser
    cost nothing then. A matrix takes its bias a times, so that padding stays 0.

    Attributes:
        scale, inverse, inverse_square: a, 1/a and 1/a^2, each (batch, token, 1); 0 at padding.
    """

    scale: Float[Array, "batch token 1"]
    inverse: Float[Array, "batch token 1"]
    inverse_square: Float[Array, "batch token 1"]


class Lazy(flax.struct.PyTreeNode):
    """sum_i array_i @ matrix_i + bias, (*batch, features), and where there is a unit this times its a.

    Attributes:
        arrays: each (*batch, held), already times a where there is a unit.
        matrices: one for each of them, (held, features), or (features,) for a diagonal one.
        bias: (features,).
        unit: a `Unit`, or None where a is 1.
        product: how products of two secret arrays are computed, head by head or grouped.
    """

    arrays: tuple[Any, ...]
    matrices: tuple[Any, ...]
    bias: Any
    unit: Any = None
    product: Product = flax.struct.field(pytree_node=False, default=matmul)

    @classmethod
    def held(cls, x: Float[Array, "*batch features"], unit: Unit | None = None, product: Product = matmul) -> "Lazy":
        """An array that is there. With a unit it must have its a already."""
        features = x.shape[-1]
        return cls((x,), (jnp.ones(features, x.dtype),), jnp.zeros(features, x.dtype), unit, product)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.arrays[0].shape[:-1], self.bias.shape[-1])

    def __add__(self, other: "Lazy") -> "Lazy":
        assert self.unit is other.unit, "states of two units were added"
        arrays, matrices = (*self.arrays, *other.arrays), (*self.matrices, *other.matrices)
        return self.replace(arrays=arrays, matrices=matrices, bias=self.bias + other.bias)

    def __matmul__(self, matrix: Float[Array, "features out"]) -> "Lazy":
        matrices = tuple(m[:, None] * matrix if m.ndim == 1 else m @ matrix for m in self.matrices)
        return self.replace(matrices=matrices, bias=self.bias @ matrix)

    def plus(self, bias: Float[Array, " features"] | float) -> "Lazy":
        return self.replace(bias=self.bias + bias)

    def map(self, f: Callable[[Float[Array, "*rows features"]], Float[Array, "*rows out"]]) -> "Lazy":
        """With a linear function of the features applied, to matrices and bias."""
        matrices = tuple(f(jnp.diag(m) if m.ndim == 1 else m) for m in self.matrices)
        return self.replace(matrices=matrices, bias=f(self.bias))

    def tokens(self, count: int) -> "Lazy":
        """Of the first tokens alone, (batch, count, features)."""
        unit = None if self.unit is None else Unit(*(factor[:, :count] for factor in self.unit))
        return self.replace(arrays=tuple(array[:, :count] for array in self.arrays), unit=unit)

    def first(self) -> "Lazy":
        """The first token's, (batch, features). It has no unit."""
        assert self.unit is None, "what reads one token takes no unit"
        return self.replace(arrays=tuple(array[:, 0] for array in self.arrays))

    def force(self) -> Float[Array, "*batch features"]:
        """The value, times a where there is a unit: one product."""
        matrices = [jnp.diag(m) if m.ndim == 1 else m for m in self.matrices]
        if self.unit is None:
            return jnp.concatenate(self.arrays, -1) @ jnp.concatenate(matrices, 0) + self.bias
        arrays = jnp.concatenate([*self.arrays, self.unit.scale], -1)
        return arrays @ jnp.concatenate([*matrices, self.bias[None]], 0)


class Stream(flax.struct.PyTreeNode):
    """The residual stream of pre-LayerNorm blocks, as it is kept on shares: nothing but normalisations read it.

    So its mean over the features is left out where they take it away, and it is `size` times too large, so that its
    mean square has a power of two as its divisor. What is added goes through a matrix that does both.

    Attributes:
        value: (batch, token, hidden).
        centres: whether the normalisations take the mean away.
        product: how products of two secret arrays are computed, see `Lazy`.
    """

    value: Any
    centres: bool = flax.struct.field(pytree_node=False, default=True)
    product: Product = flax.struct.field(pytree_node=False, default=matmul)

    @classmethod
    def of(cls, x: Float[Array, "batch token hidden"], centres: bool = True, product: Product = matmul) -> "Stream":
        """From embeddings."""
        return cls(_sized(x, centres), centres, product)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def __add__(self, other: Lazy) -> "Stream":
        assert other.unit is None, "a stream has no unit"
        return self.replace(value=self.value + other.map(lambda rows: _sized(rows, self.centres)).force())


def size(hidden: int) -> float:
    """How much larger than the deviation a lazy normalisation computes it, see `square_mean_by_product`."""
    return math.sqrt(power_of_two(hidden) / hidden)


def _sized(rows: Float[Array, "*rows hidden"], centres: bool) -> Float[Array, "*rows hidden"]:
    return (rows - rows.mean(-1, keepdims=True) if centres else rows) * size(rows.shape[-1])


State: TypeAlias = Float[Array, "..."] | Lazy
"""What goes from layer to layer, (batch, token, hidden): an array, or what is not computed yet. The value decides what
a layer does.
"""


def force(x: State) -> Float[Array, "*batch features"]:
    """The array itself, or the lazy state's value."""
    return x.force() if isinstance(x, Lazy) else x


def side_by_side(states: Sequence[Lazy]) -> Lazy:
    """States that are read from the same arrays as one with all their features: then one product computes all."""
    first = states[0]
    assert all(a is b for state in states for a, b in zip(state.arrays, first.arrays, strict=True))
    rows = zip(*(state.matrices for state in states), strict=True)
    matrices = tuple(jnp.concatenate([jnp.diag(m) if m.ndim == 1 else m for m in row], -1) for row in rows)
    return first.replace(matrices=matrices, bias=jnp.concatenate([state.bias for state in states]))


def power_of_two(hidden: int) -> int:
    """The first that is not below `hidden`."""
    return 1 << (hidden - 1).bit_length()


def square_mean_by_product(x: Float[Array, "*batch hidden"], product: Product = matmul) -> Float[Array, "*batch 1"]:
    """The sum of the squares over the last axis, divided by `power_of_two(hidden)`.

    It is taken as the diagonals of products X X^T of some rows each: a product of matrices sends per element of its
    result, rows x rows, and truncates once, where the squares are rows x columns elements, each truncated (ABY3,
    128 x 768: 0.05 MB for 5.1 MB). And the divisor is one that fixed point knows exactly: at 18 fraction bits 1/768 is
    off by 0.1 %.
    """
    hidden = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    together = rows_together(rows, product)
    if together > hidden:
        squares = jnp.square(x).sum(-1, keepdims=True)
    else:
        blocks_NxRxH = x.reshape(-1, together, hidden)
        products_NxRR = product(blocks_NxRxH[:, None], blocks_NxRxH.swapaxes(-1, -2)[:, None]).reshape(-1, together**2)
        # A strided slice takes the diagonals without a gather, which jnp would make.
        squares = jax.lax.slice(products_NxRR, (0, 0), products_NxRR.shape, (1, together + 1))
    return squares.reshape(*x.shape[:-1], 1) / power_of_two(hidden)
