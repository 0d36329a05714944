"""BERT in Linen, with pluggable parts. Post-LayerNorm, as published; `apply` is the pure function that SPU compiles.

The model is in two halves: `embed` (the client's, where the embedding is public) and `from_embeddings` (what runs
on shares); `__call__` is one after the other.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxmpc.models.config import BertConfig
from flaxmpc.models.folded import FoldedLayer
from flaxmpc.nn.attention import Keys, matmul
from flaxmpc.nn.normalization import LayerNorm

Hidden = Float[Array, "batch token hidden"]


class Intermediates(NamedTuple):
    """What distillation matches.

    Attributes:
        embeddings: (batch, token, hidden), after their LayerNorm.
        hidden_states: of every layer, each (batch, token, hidden).
        scores: of every layer, Q K^T / sqrt(d) before the mask, each (batch, head, query, key).
    """

    embeddings: Array
    hidden_states: tuple[Array, ...]
    scores: tuple[Array, ...]


def _dense(config: BertConfig, features: int, name: str | None = None) -> nn.Dense:
    return nn.Dense(features, kernel_init=nn.initializers.normal(config.initializer_range), name=name)


class BertEmbeddings(nn.Module):
    """Word + position + token type, LayerNorm, dropout. ValueError: more tokens than the model has positions."""

    config: BertConfig

    def setup(self):
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        self.word_embeddings = self.param("word_embeddings", init, (config.vocab_size, config.hidden_size))
        self.position_embeddings = self.param(
            "position_embeddings", init, (config.max_position_embeddings, config.hidden_size)
        )
        self.token_type_embeddings = self.param(
            "token_type_embeddings", init, (config.type_vocab_size, config.hidden_size)
        )
        self.layer_norm = LayerNorm(epsilon=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def __call__(self, tokens: Array, token_types: Array | None, *, deterministic: bool) -> Hidden:
        lookup = self.config.embedding.lookup
        length, most = tokens.shape[1], self.config.max_position_embeddings
        if length > most:
            raise ValueError(f"a text has {length} tokens, but the model has {most} positions")
        positions_TxH = self.position_embeddings[:length]
        x_BxTxH = lookup(self.word_embeddings, tokens) + positions_TxH
        if token_types is not None:
            x_BxTxH = x_BxTxH + lookup(self.token_type_embeddings, token_types)
        elif not self.config.folded:  # folding adds the row of type 0 to the positions
            x_BxTxH = x_BxTxH + self.token_type_embeddings[0]
        return self.dropout(self.layer_norm(x_BxTxH), deterministic=deterministic)


class BertAttention(nn.Module):
    """Multi-head self-attention with the layer's attention part. Returns the output and the scores."""

    config: BertConfig
    layer: int

    @nn.compact
    def __call__(self, x: Hidden, keys: Keys, *, deterministic: bool) -> tuple[Hidden, Array]:
        config = self.config
        part = config.attention_of(self.layer)
        heads = config.num_attention_heads

        def project(name: str) -> Array:
            y_BxTxH = _dense(config, config.hidden_size, name)(x)
            return y_BxTxH.reshape(*y_BxTxH.shape[:2], heads, config.head_size).transpose(0, 2, 1, 3)

        query, key, value = (project(name) for name in ("query", "key", "value"))
        scores = matmul(query, key.swapaxes(-1, -2)) / jnp.sqrt(config.head_size)

        shift, scale = part.initial_shift(heads), part.initial_scale(heads)
        if shift is not None:
            shift = self.param("shift", lambda _: shift)
        if scale is not None:
            scale = self.param("scale", lambda _: scale)

        dropout = None if deterministic else nn.Dropout(config.attention_probs_dropout_prob, deterministic=False)
        numerator = part.numerator(scores, keys, shift)
        context = part.normalise(numerator, value, keys, scale, matmul, dropout)
        merged_BxTxH = context.transpose(0, 2, 1, 3).reshape(x.shape)
        return _dense(config, config.hidden_size, "output")(merged_BxTxH), scores


class BertLayer(nn.Module):
    """Attention and feed-forward, each with residual and LayerNorm. Returns the output and the attention scores."""

    config: BertConfig
    layer: int

    @nn.compact
    def __call__(self, x: Hidden, keys: Keys, *, deterministic: bool) -> tuple[Hidden, Array]:
        config = self.config
        after_attention, after_feed_forward = config.layer_norms_of(self.layer)
        dropout = nn.Dropout(config.hidden_dropout_prob, deterministic=deterministic)

        y, scores = BertAttention(config, self.layer, name="attention")(x, keys, deterministic=deterministic)
        x = LayerNorm(after_attention, config.layer_norm_eps, name="attention_layer_norm")(x + dropout(y))
        y = config.hidden_act_of(self.layer)(_dense(config, config.intermediate_size, "intermediate")(x))
        y = _dense(config, config.hidden_size, "output")(y)
        return LayerNorm(after_feed_forward, config.layer_norm_eps, name="output_layer_norm")(x + dropout(y)), scores


class BertModel(nn.Module):
    """Embeddings and encoder; the pooler (first token, dense, tanh) where a head asks for it."""

    config: BertConfig
    add_pooling_layer: bool = True

    def setup(self):
        self.embeddings = BertEmbeddings(self.config)
        layer: Any = FoldedLayer if self.config.folded else BertLayer
        self.layers = [layer(self.config, i, name=f"layer_{i}") for i in range(self.config.num_hidden_layers)]
        if self.add_pooling_layer:
            self.pooler = _dense(self.config, self.config.hidden_size)

    def embed(
        self,
        input_ids: Array,
        token_type_ids: Array | None = None,
        attention_mask: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Hidden:
        """Ids (batch, token) -> embeddings. With a mode whose lookup takes one-hot rows, give it those.

        With a mask, and LayerNorms that are right only where they were calibrated, padding holds the first token's
        embedding, and so its states in every layer: on what no token has they diverge, and 0 x inf is no 0.
        """
        x_BxTxH = self.embeddings(input_ids, token_type_ids, deterministic=deterministic)
        if attention_mask is None or not self.config.fills_padding:
            return x_BxTxH
        mask_BxTx1 = jnp.asarray(attention_mask, x_BxTxH.dtype)[..., None]
        return x_BxTxH * mask_BxTx1 + x_BxTxH[:, :1] * (1 - mask_BxTx1)

    def from_embeddings(
        self, embeddings: Hidden, keys: Keys, *, deterministic: bool = True
    ) -> tuple[Hidden, Intermediates | None]:
        """The last hidden state (what the head reads of it, if folded), and the intermediates (None if folded)."""
        if self.config.folded:
            u = embeddings if self.config.state_degree is None else embeddings * keys.scale[..., None]
            for layer in self.layers:
                u = layer(u, keys)
            return u, None
        x, hidden_states, all_scores = embeddings, [], []
        for layer in self.layers:
            x, scores = layer(x, keys, deterministic=deterministic)
            hidden_states.append(x)
            all_scores.append(scores)
        return x, Intermediates(embeddings, tuple(hidden_states), tuple(all_scores))

    def pool(self, hidden: Hidden) -> Float[Array, "batch hidden"]:
        return jnp.tanh(self.pooler(hidden[:, 0]))

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Hidden, Array | None, Intermediates | None]:
        """The last hidden state, the pooled first token (None without a pooler), and the intermediates."""
        keys = self.config.keys(jnp.ones(input_ids.shape[:2]) if attention_mask is None else attention_mask)
        embeddings = self.embed(input_ids, token_type_ids, attention_mask, deterministic=deterministic)
        hidden, intermediates = self.from_embeddings(embeddings, keys, deterministic=deterministic)
        return hidden, self.pool(hidden) if self.add_pooling_layer else None, intermediates


class _BertWithHead(nn.Module):
    """A BertModel named `bert`, and a head. `__call__` is `embed`, then `from_embeddings`."""

    config: BertConfig

    def head(self, hidden: Hidden, deterministic: bool) -> Array:
        raise NotImplementedError

    def embed(self, *args: Any, **kwargs: Any) -> Hidden:
        """`BertModel.embed`, with its arguments."""
        return self.bert.embed(*args, **kwargs)

    def from_embeddings(
        self, embeddings: Hidden, keys: Keys, *, deterministic: bool = True, return_intermediates: bool = False
    ) -> Any:
        """The head's output; with `return_intermediates`, a pair of it and `Intermediates`."""
        hidden, intermediates = self.bert.from_embeddings(embeddings, keys, deterministic=deterministic)
        output = self.head(hidden, deterministic)
        return (output, intermediates) if return_intermediates else output

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        deterministic: bool = True,
        return_intermediates: bool = False,
    ) -> Any:
        """The head's output for ids (batch, token); see `from_embeddings`."""
        keys = self.config.keys(jnp.ones(input_ids.shape[:2]) if attention_mask is None else attention_mask)
        embeddings = self.embed(input_ids, token_type_ids, attention_mask, deterministic=deterministic)
        return self.from_embeddings(
            embeddings, keys, deterministic=deterministic, return_intermediates=return_intermediates
        )

    def _classifier_dropout(self) -> nn.Dropout:
        rate = self.config.classifier_dropout
        return nn.Dropout(self.config.hidden_dropout_prob if rate is None else rate)


class BertForSequenceClassification(_BertWithHead):
    """Logits (batch, label) from the pooled first token."""

    def setup(self):
        self.bert = BertModel(self.config)
        self.dropout = self._classifier_dropout()
        self.classifier = _dense(self.config, self.config.num_labels)

    def head(self, hidden: Hidden, deterministic: bool) -> Array:
        return self.classifier(self.dropout(self.bert.pool(hidden), deterministic=deterministic))


class BertForTokenClassification(_BertWithHead):
    """Logits (batch, token, label)."""

    def setup(self):
        self.bert = BertModel(self.config, add_pooling_layer=False)
        self.dropout = self._classifier_dropout()
        self.classifier = _dense(self.config, self.config.num_labels)

    def head(self, hidden: Hidden, deterministic: bool) -> Array:
        return self.classifier(self.dropout(hidden, deterministic=deterministic))


class BertForQuestionAnswering(_BertWithHead):
    """Logits (batch, token, 2): of the answer's start and end."""

    def setup(self):
        self.bert = BertModel(self.config, add_pooling_layer=False)
        self.qa_outputs = _dense(self.config, 2)

    def head(self, hidden: Hidden, deterministic: bool) -> Array:
        return self.qa_outputs(hidden)


class BertForMaskedLM(_BertWithHead):
    """Logits (batch, token, vocabulary), the output matrix tied to the word embeddings."""

    def setup(self):
        self.bert = BertModel(self.config, add_pooling_layer=False)
        self.transform = _dense(self.config, self.config.hidden_size)
        self.transform_layer_norm = LayerNorm(epsilon=self.config.layer_norm_eps)
        self.decoder_bias = self.param("decoder_bias", nn.initializers.zeros, (self.config.vocab_size,))

    def head(self, hidden: Hidden, deterministic: bool) -> Array:
        hidden = self.config.hidden_act_of(-1)(self.transform(hidden))
        hidden = self.transform_layer_norm(hidden)
        return hidden @ self.bert.embeddings.word_embeddings.T + self.decoder_bias


# By the name that HF's config.json gives in `architectures`.
ARCHITECTURES: dict[str, type[_BertWithHead]] = {
    model.__name__: model
    for model in (BertForSequenceClassification, BertForTokenClassification, BertForQuestionAnswering, BertForMaskedLM)
}


def init_params(model: nn.Module, seed: int = 0) -> dict[str, Any]:
    """Fresh parameters, a nested dict of float32 arrays."""
    input_ids = jnp.zeros((1, 2), jnp.int32)
    config: BertConfig = model.config  # pyright: ignore[reportAttributeAccessIssue]
    tokens = config.embedding.encode(input_ids, config.vocab_size)
    return jax.jit(model.init)(jax.random.key(seed), tokens)["params"]


def param_shapes(model: nn.Module) -> dict[str, Any]:
    """The parameters as shapes and types, without computing any."""
    return jax.eval_shape(lambda: init_params(model))


def num_params(model: nn.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(model)))
