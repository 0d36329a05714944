"""BERT in Linen, with pluggable parts. Post-LayerNorm, as published; `apply` is the pure function that SPU compiles."""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxmpc.models.base import EncoderOutput, Hidden, WithHead, first_token
from flaxmpc.models.config import BertConfig
from flaxmpc.nn.layers import Dense, Norm, PostNormBlock, activate
from flaxmpc.nn.lazy import Lazy, State, force
from flaxmpc.nn.mask import Mask
from flaxmpc.nn.normalization import EXACT


class BertEmbeddings(nn.Module):
    """Word + position + token type, LayerNorm, dropout. ValueError: more tokens than the model has positions."""

    config: BertConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        config = self.config

        def table(name: str, rows: int) -> Any:
            initial = nn.initializers.normal(config.initializer_range)
            return self.param(name, initial, (rows, config.hidden_size), self.param_dtype)

        self.word_embeddings = table("word_embeddings", config.vocab_size)
        self.position_embeddings = table("position_embeddings", config.max_position_embeddings)
        self.token_type_embeddings = table("token_type_embeddings", config.type_vocab_size)
        self.layer_norm = Norm(epsilon=config.layer_norm_eps, dtype=self.dtype, param_dtype=self.param_dtype)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def __call__(self, tokens: Array, token_types: Array | None, *, deterministic: bool) -> Hidden:
        lookup = self.config.embedding.lookup
        length, most = tokens.shape[1], self.config.max_position_embeddings
        if length > most:
            raise ValueError(f"a text has {length} tokens, but the model has {most} positions")
        positions_PxH = self.position_embeddings
        if token_types is None:  # all are 0; added before the cut, so that the owner adds, whatever the length
            positions_PxH = positions_PxH + self.token_type_embeddings[0]
        x_BxTxH = lookup(self.word_embeddings, tokens) + positions_PxH[:length]
        if token_types is not None:
            x_BxTxH = x_BxTxH + lookup(self.token_type_embeddings, token_types)
        return self.dropout(self.layer_norm(x_BxTxH), deterministic=deterministic)


class BertModel(nn.Module):
    """Embeddings and encoder; the pooler (first token, dense, tanh) where a head asks for it."""

    config: BertConfig
    add_pooling_layer: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        config = self.config
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        initial: dict[str, Any] = {"kernel_init": nn.initializers.normal(config.initializer_range), **types}
        self.embeddings = BertEmbeddings(config, **types)
        self.layers = [
            PostNormBlock(
                attention_part=config.attention_of(i),
                hidden_act=config.hidden_act_of(i),
                norms=config.layer_norms_of(i),
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                epsilon=config.layer_norm_eps,
                hidden_dropout=config.hidden_dropout_prob,
                attention_dropout=config.attention_probs_dropout_prob,
                name=f"layer_{i}",
                **initial,
            )
            for i in range(config.num_hidden_layers)
        ]
        if self.add_pooling_layer:
            self.pooler = Dense(config.hidden_size, **initial)

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
        x_BxTxH = self.embeddings(input_ids, token_type_ids, deterministic=deterministic)
        parts = [part for i in range(self.config.num_hidden_layers) for part in self.config.layer_norms_of(i)]
        if attention_mask is None or all(part == EXACT for part in parts):
            return x_BxTxH
        mask_BxTx1 = jnp.asarray(attention_mask, x_BxTxH.dtype)[..., None]
        return x_BxTxH * mask_BxTx1 + x_BxTxH[:, :1] * (1 - mask_BxTx1)

    def encode(self, x: State, mask: Mask, *, deterministic: bool = True) -> EncoderOutput:
        """Embeddings (batch, token, hidden), or a lazy state of them (`defer`), through all layers."""
        embeddings = x
        unit = x.unit if isinstance(x, Lazy) else None
        found = []
        for i, layer in enumerate(self.layers):
            last = i == len(self.layers) - 1
            x, seen = layer(x, mask, None, deterministic, None if last else unit)
            found.append((x, seen))
        return EncoderOutput.of(embeddings, found)

    def pool(self, hidden: State) -> Float[Array, "batch hidden"]:
        return jnp.tanh(force(self.pooler(first_token(hidden))))


class _Bert(WithHead):
    """A BertModel named `bert`, and a head."""

    base_model_prefix: ClassVar[str] = "bert"

    def _encoder(self, add_pooling_layer: bool = False) -> BertModel:
        return BertModel(self.config, add_pooling_layer, self.dtype, self.param_dtype)

    def _classifier_dropout(self) -> nn.Dropout:
        rate = self.config.classifier_dropout
        return nn.Dropout(self.config.hidden_dropout_prob if rate is None else rate)


class BertForSequenceClassification(_Bert):
    """Logits (batch, label) from the pooled first token."""

    def setup(self):
        self.bert = self._encoder(add_pooling_layer=True)
        self.dropout = self._classifier_dropout()
        self.classifier = self._dense(self.config.num_labels)

    def head(self, hidden: State, deterministic: bool) -> Array:
        return force(self.classifier(self.dropout(self.bert.pool(hidden), deterministic=deterministic)))


class BertForTokenClassification(_Bert):
    """Logits (batch, token, label)."""

    def setup(self):
        self.bert = self._encoder()
        self.dropout = self._classifier_dropout()
        self.classifier = self._dense(self.config.num_labels)

    def head(self, hidden: State, deterministic: bool) -> Array:
        if not isinstance(hidden, Lazy):  # which is for evaluation
            hidden = self.dropout(hidden, deterministic=deterministic)
        return force(self.classifier(hidden))


class BertForQuestionAnswering(_Bert):
    """Logits (batch, token, 2): of the answer's start and end."""

    def setup(self):
        self.bert = self._encoder()
        self.qa_outputs = self._dense(2)

    def head(self, hidden: State, deterministic: bool) -> Array:
        return force(self.qa_outputs(hidden))


class BertForMaskedLM(_Bert):
    """Logits (batch, token, vocabulary), the output matrix tied to the word embeddings."""

    def setup(self):
        self.bert = self._encoder()
        self.transform = self._dense(self.config.hidden_size)
        self.transform_layer_norm = Norm(
            epsilon=self.config.layer_norm_eps, dtype=self.dtype, param_dtype=self.param_dtype
        )
        self.decoder_bias = self.param(
            "decoder_bias", nn.initializers.zeros, (self.config.vocab_size,), self.param_dtype
        )

    def head(self, hidden: State, deterministic: bool) -> Array:
        hidden = activate(self.transform(hidden), self.config.hidden_act_of(-1))
        return force(self.transform_layer_norm(hidden) @ self.bert.embeddings.word_embeddings.T) + self.decoder_bias


# By the name that HF's config.json gives in `architectures`.
ARCHITECTURES: dict[str, type[_Bert]] = {
    model.__name__: model
    for model in (BertForSequenceClassification, BertForTokenClassification, BertForQuestionAnswering, BertForMaskedLM)
}
