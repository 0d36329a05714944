"""BERT, post-LayerNorm, as published (Devlin et al., arXiv 1810.04805)."""

import dataclasses
from typing import Any, ClassVar

from flaxmpc.errors import unknown
from flaxmpc.models.base import Family, WithHead, encoder_names, register
from flaxmpc.models.config import EncoderConfig
from flaxmpc.models.heads import AnswerHead, MaskedLMHead, PooledHead, TokenHead
from flaxmpc.nn.activation import ActivationPart


@dataclasses.dataclass(frozen=True)
class BertConfig(EncoderConfig):
    """The shape of a BERT and its parts; the defaults are BERT-Base's."""

    model_type: ClassVar[str] = "bert"


class _Bert(WithHead):
    base_model_prefix: ClassVar[str] = "bert"


class BertForSequenceClassification(PooledHead, _Bert):
    """BERT that gives a label for a text, see `PooledHead`."""


class BertForTokenClassification(TokenHead, _Bert):
    """BERT that gives a label for every token, see `TokenHead`."""


class BertForQuestionAnswering(AnswerHead, _Bert):
    """BERT that gives the answer to a question in the text, see `AnswerHead`."""


class BertForMaskedLM(MaskedLMHead, _Bert):
    """BERT that gives the words that stood at masked tokens, see `MaskedLMHead`."""

    @property
    def act(self) -> ActivationPart:
        return self.config.hidden_act_of(-1)


BERT = register(
    Family(
        BertConfig,
        (BertForSequenceClassification, BertForTokenClassification, BertForQuestionAnswering, BertForMaskedLM),
        names=(
            *encoder_names("bert"),
            (r"(classifier|qa_outputs)/", r"\1."),
            (r"transform/", r"cls.predictions.transform.dense."),
            (r"transform_layer_norm/", r"cls.predictions.transform.LayerNorm."),
            (r"decoder/", r"cls.predictions."),
        ),
        tied={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        heads=("classifier.", "qa_outputs.", "cls."),
    )
)

# By the name that HF's config.json gives in `architectures`.
ARCHITECTURES = {model.__name__: model for model in BERT.models}


# Turc et al., arXiv 1908.08962 (tiny to medium); Devlin et al., arXiv 1810.04805 (base, large); Wang et al.,
# arXiv 2002.10957 (MiniLM, whose six-layer version is every second layer of MiniLM-L12-H384).
PRESETS: dict[str, BertConfig] = {
    "tiny": BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512),
    "mini": BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024),
    "small": BertConfig(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048),
    "medium": BertConfig(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048),
    "base": BertConfig(),
    "large": BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "minilm-l6": BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
}


def preset(name: str, **changes: Any) -> BertConfig:
    """A preset by name, with fields changed: `preset("base", attention="2quad_freediv", hidden_act="quad")`.

    Raises:
        ValueError: an unknown preset; the message lists the known ones and the closest.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return dataclasses.replace(PRESETS[name], **changes)
