"""flaxmpc: Transformers in Flax that run under secure multi-party computation.

Importing it imports neither spu, torch nor transformers: they load where they are used.
"""

from flaxmpc import nn, secure
from flaxmpc.convert.fold import fold
from flaxmpc.models.bert import (
    ARCHITECTURES,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    init_params,
)
from flaxmpc.models.config import PRESETS, BertConfig, preset
from flaxmpc.models.folder import LoadedModel, load, load_pretrained, save

__version__ = "0.1.0"

__all__ = [
    "ARCHITECTURES",
    "PRESETS",
    "BertConfig",
    "BertForMaskedLM",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "LoadedModel",
    "fold",
    "init_params",
    "load",
    "load_pretrained",
    "nn",
    "preset",
    "save",
    "secure",
]
