"""DistilBERT (Sanh et al., arXiv 1910.01108): BERT's encoder without token types and pooler, half as many layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Array

from flaxmpc.models.base import TEXTS, Family, WithHead, first_token, register
from flaxmpc.models.config import EncoderConfig
from flaxmpc.models.heads import AnswerHead, MaskedLMHead, TokenHead
from flaxmpc.nn.activation import ActivationPart
from flaxmpc.nn.layers import activate
from flaxmpc.nn.lazy import State, force


@dataclasses.dataclass(frozen=True)
class DistilBertConfig(EncoderConfig):
    """The shape of a DistilBERT and its parts; the defaults are HF's."""

    model_type: ClassVar[str] = "distilbert"
    has_token_types: ClassVar[bool] = False
    hf_fields: ClassVar[Mapping[str, str]] = {
        "dim": "hidden_size",
        "hidden_dim": "intermediate_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "activation": "hidden_act",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
        "seq_classif_dropout": "classifier_dropout",
    }

    num_hidden_layers: int = 6
    type_vocab_size: int = 0
    classifier_dropout: Any = 0.2
    classifier_activation: Any = "relu"


class _DistilBert(WithHead):
    base_model_prefix: ClassVar[str] = "distilbert"


class DistilBertForSequenceClassification(_DistilBert):
    """Logits (batch, label) from the first token: dense, activation, dense."""

    task: ClassVar[str] = TEXTS
    reads_first: ClassVar[bool] = True

    def setup_head(self) -> None:
        self.dropout = self._classifier_dropout()
        self.pre_classifier = self._dense(self.config.hidden_size)
        self.classifier = self._dense(self.config.num_labels)

    @property
    def head_matrices(self) -> tuple[str, str]:
        return ("pre_classifier", "classifier")

    def head(self, hidden: State, deterministic: bool) -> Array:
        pooled = activate(self.pre_classifier(first_token(hidden)), self.config.classifier_activation)
        return force(self.classifier(self._dropped(pooled, deterministic)))


class DistilBertForTokenClassification(TokenHead, _DistilBert):
    """DistilBERT that gives a label for every token, see `TokenHead`."""


class DistilBertForQuestionAnswering(AnswerHead, _DistilBert):
    """DistilBERT that gives the answer to a question in the text, see `AnswerHead`."""


class DistilBertForMaskedLM(MaskedLMHead, _DistilBert):
    """DistilBERT that gives the words that stood at masked tokens, see `MaskedLMHead`."""

    @property
    def act(self) -> ActivationPart:
        return self.config.hidden_act_of(-1)


_LAYER, _THEIRS = r"distilbert/layer_(\d+)/", r"distilbert.transformer.layer.\1."

DISTILBERT = register(
    Family(
        DistilBertConfig,
        (
            DistilBertForSequenceClassification,
            DistilBertForTokenClassification,
            DistilBertForQuestionAnswering,
            DistilBertForMaskedLM,
        ),
        names=(
            (r"distilbert/embeddings/(word|position)_embeddings", r"distilbert.embeddings.\1_embeddings.weight"),
            (r"distilbert/embeddings/layer_norm/", "distilbert.embeddings.LayerNorm."),
            (f"{_LAYER}attention/query/", f"{_THEIRS}attention.q_lin."),
            (f"{_LAYER}attention/key/", f"{_THEIRS}attention.k_lin."),
            (f"{_LAYER}attention/value/", f"{_THEIRS}attention.v_lin."),
            (f"{_LAYER}attention/output/", f"{_THEIRS}attention.out_lin."),
            (rf"{_LAYER}attention/(\w+)$", rf"{_THEIRS}attention.\2"),
            (f"{_LAYER}attention_layer_norm/", f"{_THEIRS}sa_layer_norm."),
            (f"{_LAYER}intermediate/", f"{_THEIRS}ffn.lin1."),
            (f"{_LAYER}output/", f"{_THEIRS}ffn.lin2."),
            (f"{_LAYER}output_layer_norm/", f"{_THEIRS}output_layer_norm."),
            (r"(pre_classifier|classifier|qa_outputs)/", r"\1."),
            (r"transform/", "vocab_transform."),
            (r"transform_layer_norm/", "vocab_layer_norm."),
            (r"decoder/", "vocab_projector."),
        ),
        tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
        heads=("pre_classifier.", "classifier.", "qa_outputs.", "vocab_"),
    )
)
