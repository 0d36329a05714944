"""ELECTRA (Clark et al., arXiv 2003.10555): BERT's encoder after embeddings that may be narrower than its states."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flaxmpc.models.base import Family, WithHead, encoder_names, register
from flaxmpc.models.config import MOST_WIDE, EncoderConfig
from flaxmpc.models.heads import AnswerHead, FirstTokenHead, MaskedLMHead, TokenHead


@dataclasses.dataclass(frozen=True)
class ElectraConfig(EncoderConfig):
    """The shape of an ELECTRA and its parts; the defaults are HF's, which are ELECTRA-Small's.

    Attributes:
        embedding_size: numbers in a row of the tables of embeddings.
    """

    model_type: ClassVar[str] = "electra"
    whole_numbers: ClassVar[Mapping[str, tuple[int, int]]] = {"embedding_size": (1, MOST_WIDE)}

    embedding_size: int = 128
    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    classifier_activation: Any = "gelu"

    @property
    def embedding_width(self) -> int:
        return self.embedding_size


class _Electra(WithHead):
    base_model_prefix: ClassVar[str] = "electra"


class ElectraForSequenceClassification(FirstTokenHead, _Electra):
    """ELECTRA that classifies texts, see `FirstTokenHead`."""


class ElectraForTokenClassification(TokenHead, _Electra):
    """ELECTRA that gives a label for every token, see `TokenHead`."""


class ElectraForQuestionAnswering(AnswerHead, _Electra):
    """ELECTRA that gives the answer to a question in the text, see `AnswerHead`."""


class ElectraForMaskedLM(MaskedLMHead, _Electra):
    """ELECTRA's generator, which gives the words that stood at masked tokens, see `MaskedLMHead`."""


ELECTRA = register(
    Family(
        ElectraConfig,
        (
            ElectraForSequenceClassification,
            ElectraForTokenClassification,
            ElectraForQuestionAnswering,
            ElectraForMaskedLM,
        ),
        names=(
            (r"electra/embeddings/projection/", "electra.embeddings_project."),
            *encoder_names("electra"),
            (r"classifier_(dense|out_proj)/", r"classifier.\1."),
            (r"(classifier|qa_outputs)/", r"\1."),
            (r"transform/", "generator_predictions.dense."),
            (r"transform_layer_norm/", "generator_predictions.LayerNorm."),
            (r"decoder/", "generator_lm_head."),
        ),
        tied={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
        heads=("classifier.", "qa_outputs.", "generator_"),
    )
)
