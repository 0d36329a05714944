"""Who looks a token up, and what the computing parties see of it.

Never index a table with secret ids: SPU turns that gather into a loop (1.1 GB for 32 tokens at width 128).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from flaxmpc.nn.parts import Registry


@runtime_checkable
class EmbeddingPart(Protocol):
    """What an own embedding must have: `encode` is what the client computes of its ids, `lookup` what follows.

    `client_embeds` says whether the client also does the lookup, with a table that it has in the clear.
    """

    @property
    def name(self) -> str: ...

    @property
    def client_embeds(self) -> bool: ...

    def encode(self, input_ids: Array, vocab_size: int) -> Array: ...

    def lookup(self, table: Array, encoded: Array) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Embedding:
    """A mode of embedding.

    Attributes:
        encode: (input_ids (batch, token), vocab_size) -> what enters `lookup`.
        lookup: (table (vocab, hidden), encoded) -> (batch, token, hidden).
        client_embeds: the client runs the whole embedding, LayerNorm included, and shares its result.
    """

    name: str
    encode: Callable[[Int[Array, "batch token"], int], Array]
    lookup: Callable[[Float[Array, "vocab hidden"], Array], Float[Array, "batch token hidden"]]
    client_embeds: bool


def _ids(input_ids: Array, vocab_size: int) -> Array:
    return input_ids


def _gather(table: ArrayLike, input_ids: Array) -> Array:
    return jnp.asarray(table)[input_ids]  # numpy's own table could not be indexed with traced ids


def _one_hot(input_ids: Array, vocab_size: int) -> Array:
    return jax.nn.one_hot(input_ids, vocab_size, dtype=jnp.float32)


def _product(table: ArrayLike, one_hot: Array) -> Array:
    return one_hot @ jnp.asarray(table)


EMBEDDINGS: Registry[Any] = Registry("embedding", EmbeddingPart)

# The table was frozen while training, so it is the published pre-trained one: nothing secret is revealed. The client
# sends tokens x hidden numbers, and the computing parties do nothing.
public = EMBEDDINGS.register(Embedding("public", _ids, _gather, client_embeds=True))
# The table is the owner's secret. The client sends one-hot rows (tokens x vocabulary numbers): one product.
secret = EMBEDDINGS.register(Embedding("secret", _one_hot, _product, client_embeds=False))
