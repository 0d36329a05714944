"""flaxmpc: Transformers in Flax that run under secure multi-party computation.

Importing it imports nothing else: a public name is loaded when it is first used, and spu, torch and transformers where
they are used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flaxmpc import nn, secure
    from flaxmpc.models.base import init_params
    from flaxmpc.models.bert import (
        ARCHITECTURES,
        PRESETS,
        BertConfig,
        BertForMaskedLM,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        preset,
    )
    from flaxmpc.models.folder import LoadedModel, load, load_pretrained, save
    from flaxmpc.serve.private import private

__version__ = "0.1.0"

__all__ = [
    "ARCHITECTURES",
    "PRESETS",
    "BertConfig",
    "BertForMaskedLM",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "LoadedModel",
    "init_params",
    "load",
    "load_pretrained",
    "nn",
    "preset",
    "private",
    "save",
    "secure",
]

# The modules whose names are public here, and those that are public themselves.
_HOMES = ("models.base", "models.bert", "models.folder", "serve.private")
_MODULES = ("nn", "secure")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
