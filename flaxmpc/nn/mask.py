"""Which keys a query sees: the tokens of a text, which only the client knows, and pairs that everybody knows."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from flaxmpc.nn.lazy import Unit

Pairs = Callable[[int], Bool[np.ndarray, "query key"]]
"""Which queries see which keys among so many tokens; hashable, so that a compiled program can hold it."""


def causal(num_tokens: int) -> Bool[np.ndarray, "query key"]:
    """A query sees the keys up to its own place."""
    return np.tri(num_tokens, dtype=bool)


@dataclasses.dataclass(frozen=True)
class Both:
    """The pairs that all of several `Pairs` have."""

    parts: tuple[Pairs, ...]

    def __call__(self, num_tokens: int) -> Bool[np.ndarray, "query key"]:
        return np.logical_and.reduce([np.asarray(part(num_tokens)) for part in self.parts])


@dataclasses.dataclass(frozen=True)
class First:
    """The pairs of the first queries alone, `count` of them."""

    pairs: Pairs
    count: int

    def __call__(self, num_tokens: int) -> Bool[np.ndarray, "query key"]:
        return np.asarray(self.pairs(num_tokens))[: self.count]


class Mask(flax.struct.PyTreeNode):
    """Which keys a query sees, in the forms that the computing parties multiply with.

    The client knows the number n of keys that a query sees, so it does the divisions and roots, and none is left for
    the computing parties. Without `pairs` n is the same for all queries of a text, and `query` below is 1.

    Attributes:
        tokens: (batch, key), m, 1 for a token, 0 for padding.
        weight: (batch, key), m / (number of tokens).
        fourth_root: (batch, key), weight^(1/4): the sum of (x fourth_root)^4 is the mean of x^4 over the tokens.
        inverse_count: (batch, query), 1/n.
        log_count: (batch, query), log n, for an exponential that takes 1/n into its argument.
        scale: (batch, key), a = m n^(-1/2k) for numerators of degree k (`flaxmpc.nn.lazy.Unit`); m for none.
        inverse, inverse_square: (batch, key), 1/a and 1/a^2 at the tokens, 0 at padding.
        pairs: public, such as `causal`; None: every query sees all tokens.
    """

    tokens: Any
    weight: Any
    fourth_root: Any
    inverse_count: Any
    log_count: Any
    scale: Any
    inverse: Any
    inverse_square: Any
    pairs: Pairs | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def from_tokens(cls, attention_mask: Array, *, degree: int | None = None, pairs: Pairs | None = None) -> "Mask":
        """The mask of a batch of texts.

        Args:
            attention_mask: HF's, (batch, key), 1 for a token and 0 for padding, any dtype.
            degree: the degree of the numerators, where all layers have one in common.
            pairs: what is public.

        Raises:
            ValueError: a degree with pairs: then n differs from query to query, and no factor of a token can hold it.
        """
        tokens = jnp.asarray(attention_mask, jnp.float32)
        if degree is not None and pairs is not None:
            raise ValueError("a mask with pairs has no degree: the number of keys differs from query to query")
        total = jnp.maximum(tokens.sum(-1, keepdims=True), 1.0)
        if pairs is None:
            count = total
        else:
            visible = jnp.asarray(pairs(tokens.shape[1]), jnp.float32)
            count = jnp.maximum(tokens @ visible.T, 1.0)
        root = jnp.ones_like(total) if degree is None else total ** (0.5 / degree)
        powers = (tokens / root, tokens * root, tokens * root * root)
        weight = tokens / total
        return cls(tokens, weight, weight**0.25, 1.0 / count, jnp.log(count), *powers, pairs)

    def __and__(self, pairs: Pairs) -> "Mask":
        """The mask that sees what both see. For the client: it counts anew, and drops the degree."""
        return Mask.from_tokens(self.tokens, pairs=pairs if self.pairs is None else Both((self.pairs, pairs)))

    def first(self, count: int) -> "Mask":
        """What the first queries see."""
        pairs = self.pairs if self.pairs is None else First(self.pairs, count)
        inverse_count, log_count = self.inverse_count[:, :count], self.log_count[:, :count]
        return self.replace(inverse_count=inverse_count, log_count=log_count, pairs=pairs)

    @property
    def unit(self) -> Unit:
        """The factor that a lazy state is multiplied with where attention has a degree, (batch, token, 1)."""
        return Unit(self.scale[..., None], self.inverse[..., None], self.inverse_square[..., None])

    def uniform(self) -> Float[Array, "batch 1 #query key"]:
        """The same weight for all keys that a query sees: 1/n each, 0 for the others."""
        if self.pairs is None:
            return self.weight[:, None, None, :]
        return self.hide(self.tokens[:, None, None, :] * self.inverse_count[:, None, :, None])

    def hide(self, numerators: Float[Array, "batch head query key"]) -> Float[Array, "batch head query key"]:
        """The numerators, 0 where `pairs` says so. Padding is left to the product with V, which costs less.

        A product and not `jnp.where`: what SPU makes of that before a grouped convolution is off by 0.1.
        """
        if self.pairs is None:
            return numerators
        return numerators * jnp.asarray(self.pairs(numerators.shape[-1]), numerators.dtype)

    def lower(self, scores: Float[Array, "batch head query key"], by: float) -> Float[Array, "batch head query key"]:
        """The scores, lowered by a number where a query does not see the key: for taking a row's maximum."""
        hidden: Any = 1.0 - self.tokens[:, None, None, :]
        if self.pairs is not None:
            unseen = jnp.asarray(~np.asarray(self.pairs(scores.shape[-1])), scores.dtype)
            hidden = hidden + unseen  # both: lower still
        return scores - by * hidden
