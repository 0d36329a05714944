"""The encoder of BERT and its kin: embeddings of tokens, then post-LayerNorm blocks, with pluggable parts.

What differs between these families stands in their config, or in a method that a subclass has instead.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxmpc.models.config import EncoderConfig
from flaxmpc.models.outputs import EncoderOutput
from flaxmpc.nn.attention import ATTENTION
from flaxmpc.nn.layers import Dense, Norm, PostNormBlock, param
from flaxmpc.nn.lazy import Lazy, State, force
from flaxmpc.nn.mask import Mask
from flaxmpc.nn.normalization import EXACT

Hidden = Float[Array, "batch token hidden"]


def _blocks(
    config: EncoderConfig, sizes: Any, parts: Sequence[tuple[Any, Any, Any]], shared: int = 1, **types: Any
) -> list[Any]:
    """The layers of an encoder.

    Args:
        config: the encoder's.
        sizes: what says how many heads and features they have: the config, or `PublicLayers`.
        parts: of each layer the attention, the activation and the normalisations.
        shared: how many neighbours share scores.
    """
    return [
        PostNormBlock(
            attention,
            hidden_act,
            norms,
            sizes.num_attention_heads,
            sizes.intermediate_size,
            config.layer_norm_eps,
            config.hidden_dropout_prob,
            config.attention_probs_dropout_prob,
            kernel_init=nn.initializers.normal(config.initializer_range),
            gives_weights=shared > 1 and i % shared == 0,
            name=f"layer_{i}",
            **types,
        )
        for i, (attention, hidden_act, norms) in enumerate(parts)
    ]


class TokenEmbeddings(nn.Module):
    """Word + position (+ token type), LayerNorm, dropout; a dense layer where the tables are not as wide as the states.
    Then the layers that are public.

    Raises:
        ValueError: more tokens than the model has positions.
    """

    config: EncoderConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        config = self.config

        def table(name: str, rows: int) -> Any:
            initial = nn.initializers.normal(config.initializer_range)
            return param(self, name, initial, (rows, config.embedding_width))

        self.word_embeddings = table("word_embeddings", config.vocab_size)
        self.position_embeddings = table("position_embeddings", config.max_position_embeddings)
        if config.type_vocab_size:
            self.token_type_embeddings = table("token_type_embeddings", config.type_vocab_size)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.layer_norm = Norm(epsilon=config.layer_norm_eps, **types)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        if config.embedding_width != config.hidden_size:
            initial = nn.initializers.normal(config.initializer_range)
            self.projection = Dense(config.hidden_size, kernel_init=initial, **types)
        self.layers = []
        if (public := config.public_layers) is not None:
            parts = [(ATTENTION["softmax"], public.hidden_act, (EXACT, EXACT))] * public.num_hidden_layers
            self.layers = _blocks(config, public, parts, **types)

    def __call__(
        self, tokens: Array, token_types: Array | None, attention_mask: Array | None, *, deterministic: bool
    ) -> Hidden:
        config, lookup = self.config, self.config.embedding.lookup
        length, first = tokens.shape[1], config.first_position
        if length > config.num_positions:
            raise ValueError(f"a text has {length} tokens, but the model has {config.num_positions} positions")
        positions_PxE = self.position_embeddings
        if config.type_vocab_size and token_types is None:
            # All are 0. Added before the cut, so that the owner adds, whatever the length.
            positions_PxE = positions_PxE + self.token_type_embeddings[0]
        x_BxTxE = lookup(self.word_embeddings, tokens) + positions_PxE[first : first + length]
        if config.type_vocab_size and token_types is not None:
            x_BxTxE = x_BxTxE + lookup(self.token_type_embeddings, token_types)
        x_BxTxE = self.dropout(self.layer_norm(x_BxTxE), deterministic=deterministic)
        x_BxTxH: Any = x_BxTxE if config.embedding_width == config.hidden_size else force(self.projection(x_BxTxE))
        if self.layers:
            mask = Mask.from_tokens(jnp.ones(tokens.shape[:2]) if attention_mask is None else attention_mask)
            for layer in self.layers:
                x_BxTxH, _ = layer(x_BxTxH, mask, None, deterministic)
        return x_BxTxH


class Encoder(nn.Module):
    """Embeddings and blocks; a pooler (dense, tanh) where a head asks for it."""

    config: Any
    add_pooling_layer: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        config = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embeddings = TokenEmbeddings(config, **types)
        layers = range(config.num_hidden_layers)
        parts = [(config.attention_of(i), config.hidden_act_of(i), config.layer_norms_of(i)) for i in layers]
        self.layers = _blocks(config, config, parts, config.layers_sharing_scores, **types)
        if self.add_pooling_layer:
            initial = nn.initializers.normal(config.initializer_range)
            self.pooler = Dense(config.hidden_size, kernel_init=initial, **types)

    def embed(
        self,
        input_ids: Array,
        token_type_ids: Array | None = None,
        attention_mask: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Hidden:
        """See `WithHead.embed`.

        With a mask, and LayerNorms that are right only where they were calibrated, padding holds the first token's
        embedding, and so its states in every layer: on what no token has they diverge, and 0 x inf is no 0.
        """
        x_BxTxH = self.embeddings(input_ids, token_type_ids, attention_mask, deterministic=deterministic)
        parts = [part for i in range(self.config.num_hidden_layers) for part in self.config.layer_norms_of(i)]
        if attention_mask is None or all(part == EXACT for part in parts):
            return x_BxTxH
        mask_BxTx1 = jnp.asarray(attention_mask, x_BxTxH.dtype)[..., None]
        return x_BxTxH * mask_BxTx1 + x_BxTxH[:, :1] * (1 - mask_BxTx1)

    def position_bias(self, num_tokens: int) -> Float[Array, "1 head query key"] | None:
        """What positions add to the scores of every layer; None: nothing."""
        return None

    def encode(self, x: State, mask: Mask, *, deterministic: bool = True, first: bool = False) -> EncoderOutput:
        """Embeddings (batch, token, hidden), or a lazy state of them (`defer`), through all layers.

        Args:
            first: whether the head reads the first token alone. Then of a lazy state the last layer computes no other.
        """
        unit, bias = x.unit if isinstance(x, Lazy) else None, self.position_bias(x.shape[1])
        if bias is not None and unit is not None:  # once for all layers: the scores have both tokens' a
            bias = bias * (unit.scale * unit.scale.swapaxes(-1, -2))[:, None]
        return through(self.layers, x, mask, bias, deterministic=deterministic, first=first)


def through(
    layers: Sequence[PostNormBlock],
    x: State,
    mask: Mask,
    bias: Array | None = None,
    *,
    deterministic: bool = True,
    first: bool = False,
) -> EncoderOutput:
    """A state through blocks, one after the other; `bias` and `first` as `PostNormBlock` has them, of the last one.

    A block that gives weights has scores of its own; those after it share them, until the next.
    """
    embeddings, unit = x, x.unit if isinstance(x, Lazy) else None
    found, weights = [], None
    for i, layer in enumerate(layers):
        last = i == len(layers) - 1
        weights = None if layer.gives_weights else weights
        x, seen = layer(x, mask, bias, deterministic, None if last else unit, first and last, weights)
        weights = seen.weights
        found.append((x, seen))
    return EncoderOutput.of(embeddings, found)
