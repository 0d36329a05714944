"""RoBERTa (Liu et al., arXiv 1907.11692): BERT's encoder, positions that start after padding's, another classifier.

Its kin are the same model of other words: XLM-RoBERTa (Conneau et al., arXiv 1911.02116), of a hundred languages, and
CamemBERT (Martin et al., arXiv 1911.03894), of French.
"""

import dataclasses
from typing import ClassVar

from flaxmpc.models.base import Family, WithHead, encoder_names, register
from flaxmpc.models.config import EncoderConfig
from flaxmpc.models.heads import (
    LM_HEAD_NAMES,
    LM_HEAD_TIED,
    LM_HEADS,
    AnswerHead,
    FirstTokenHead,
    MaskedLMHead,
    TokenHead,
)


@dataclasses.dataclass(frozen=True)
class RobertaConfig(EncoderConfig):
    """The shape of a RoBERTa and its parts; the defaults are HF's."""

    model_type: ClassVar[str] = "roberta"

    vocab_size: int = 50265
    pad_token_id: int = 1

    @property
    def first_position(self) -> int:
        return self.pad_token_id + 1


class _Roberta(WithHead):
    base_model_prefix: ClassVar[str] = "roberta"


class RobertaForSequenceClassification(FirstTokenHead, _Roberta):
    """RoBERTa that gives a label for a text, see `FirstTokenHead`."""


class RobertaForTokenClassification(TokenHead, _Roberta):
    """RoBERTa that gives a label for every token, see `TokenHead`."""


class RobertaForQuestionAnswering(AnswerHead, _Roberta):
    """RoBERTa that gives the answer to a question in the text, see `AnswerHead`."""


class RobertaForMaskedLM(MaskedLMHead, _Roberta):
    """RoBERTa that gives the words that stood at masked tokens, see `MaskedLMHead`."""


ROBERTA = register(
    Family(
        RobertaConfig,
        (
            RobertaForSequenceClassification,
            RobertaForTokenClassification,
            RobertaForQuestionAnswering,
            RobertaForMaskedLM,
        ),
        names=(
            *encoder_names("roberta"),
            *LM_HEAD_NAMES,
        ),
        tied={"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight", **LM_HEAD_TIED},
        heads=LM_HEADS,
    )
)

# The vocabularies are HF's defaults; the published models have others.
XLM_ROBERTA = register(ROBERTA.kin("xlm-roberta", "XLMRoberta", vocab_size=30522))
CAMEMBERT = register(ROBERTA.kin("camembert", "Camembert", vocab_size=30522))
