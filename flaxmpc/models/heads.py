"""Heads that several families have. A family's model is a head's class and the family's, in this order."""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from flaxmpc.models.base import ANSWERS, TEXTS, TOKENS, WORDS, WithHead, first_token
from flaxmpc.nn.activation import ACTIVATIONS, ActivationPart
from flaxmpc.nn.layers import activate, param
from flaxmpc.nn.lazy import State, force


class PooledHead(WithHead):
    """Logits (batch, label) from the encoder's pooler: the first token, dense, activation. As in BERT."""

    task: ClassVar[str] = TEXTS
    reads_first: ClassVar[bool] = True
    pools: ClassVar[bool] = True

    @property
    def head_matrices(self) -> tuple[str, str]:
        return f"{self.base_model_prefix}/pooler", "classifier"

    def setup_head(self) -> None:
        self.dropout = self._classifier_dropout()
        self.classifier = self._dense(self.config.num_labels)

    def head(self, hidden: State, deterministic: bool) -> Array:
        pooled = activate(self.encoder.pooler(first_token(hidden)), self.config.classifier_activation)
        return force(self.classifier(self._dropped(pooled, deterministic)))


class FirstTokenHead(WithHead):
    """Logits (batch, label) from the first token: dense, activation, dense. As in RoBERTa and ELECTRA."""

    task: ClassVar[str] = TEXTS
    reads_first: ClassVar[bool] = True

    def setup_head(self) -> None:
        self.dropout = self._classifier_dropout()
        self.classifier_dense = self._dense(self.config.hidden_size)
        self.classifier_out_proj = self._dense(self.config.num_labels)

    @property
    def head_matrices(self) -> tuple[str, str]:
        return ("classifier_dense", "classifier_out_proj")

    def head(self, hidden: State, deterministic: bool) -> Array:
        first = self._dropped(first_token(hidden), deterministic)
        pooled = activate(self.classifier_dense(first), self.config.classifier_activation)
        return force(self.classifier_out_proj(self._dropped(pooled, deterministic)))


class TokenHead(WithHead):
    """Logits (batch, token, label)."""

    task: ClassVar[str] = TOKENS

    def setup_head(self) -> None:
        self.dropout = self._classifier_dropout()
        self.classifier = self._dense(self.config.num_labels)

    def head(self, hidden: State, deterministic: bool) -> Array:
        return force(self.classifier(self._dropped(hidden, deterministic)))


class AnswerHead(WithHead):
    """Logits (batch, token, 2): of the answer's start and end."""

    task: ClassVar[str] = ANSWERS

    @property
    def num_outputs(self) -> int:
        return 2

    def setup_head(self) -> None:
        self.qa_outputs = self._dense(self.num_outputs)

    def head(self, hidden: State, deterministic: bool) -> Array:
        return force(self.qa_outputs(hidden))


class TiedOutput(nn.Module):
    """The bias (vocabulary,) of an output matrix that is the table of words."""

    vocab_size: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, products: Array) -> Array:
        return products + param(self, "bias", nn.initializers.zeros, (self.vocab_size,))


class MaskedLMHead(WithHead):
    """Logits (batch, token, vocabulary): dense, activation, LayerNorm, and the table of words as output matrix."""

    task: ClassVar[str] = WORDS
    reads_embeddings: ClassVar[bool] = True

    @property
    def num_outputs(self) -> int:
        return self.config.vocab_size

    def setup_head(self) -> None:
        self.transform = self._dense(self.config.embedding_width)
        self.transform_layer_norm = self._norm()
        self.decoder = TiedOutput(self.config.vocab_size, self.param_dtype)

    @property
    def act(self) -> ActivationPart:
        return ACTIVATIONS["gelu"]

    def head(self, hidden: State, deterministic: bool) -> Array:
        hidden = self.transform_layer_norm(activate(self.transform(hidden), self.act))
        return self.decoder(force(hidden @ self.encoder.embeddings.word_embeddings.T))


# HF's names of the heads in RoBERTa and MPNet, see `Family`.
LM_HEAD_NAMES = (
    (r"classifier_(dense|out_proj)/", r"classifier.\1."),
    (r"(classifier|qa_outputs)/", r"\1."),
    (r"transform/", "lm_head.dense."),
    (r"transform_layer_norm/", "lm_head.layer_norm."),
    (r"decoder/", "lm_head."),
)
LM_HEAD_TIED = {"lm_head.decoder.bias": "lm_head.bias"}
LM_HEADS = ("classifier.", "qa_outputs.", "lm_head.")
