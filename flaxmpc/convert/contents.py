"""Computes digests of what a run learns from: data and models are known by their content, wherever they lie."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from flaxmpc.data.batches import SPLITS, Split
from flaxmpc.data.tasks import Task
from flaxmpc.models.config import EncoderConfig
from flaxmpc.models.folder import LoadedModel
from flaxmpc.models.params import flatten
from flaxmpc.models.tokenizer import as_text

Digests: TypeAlias = Mapping[str, str]
"""The digest of each input of a run, by what it is: "data", "teacher", ..."""


def of_task(task: Task) -> str:
    """The digest of a task: texts, labels, their names and their order, of all splits."""
    return _digest([task.id2label, task.metrics, *(of_split(getattr(task, name)) for name in SPLITS)])


def of_split(split: Split) -> str:
    """The digest of a split: the texts, or the tokens where there are none, and the labels."""
    rows = split.texts if split.texts is not None else [np.asarray(row).tolist() for row in split.input_ids]
    return _digest([list(rows), np.array(split.sizes), split.answers] if split.by_token else [list(rows), split.labels])


def of_model(loaded: LoadedModel) -> str:
    """The digest of a model: weights, config and tokenizer."""
    return _model(loaded.params, loaded.model.config, loaded.tokenizer)


def of_encoder(base: LoadedModel, stored: EncoderConfig) -> str:
    """The digest of a pre-trained encoder, without its fresh head, and with `stored`, the config of its folder."""
    prefix = base.model.base_model_prefix
    return _model({prefix: base.params[prefix]}, stored, base.tokenizer)


def _model(params: Mapping[str, Any], config: EncoderConfig, tokenizer: Any) -> str:
    leaves = [part for path, leaf in sorted(flatten(params).items()) for part in (path, np.asarray(leaf))]
    return _digest([config.to_dict(), as_text(tokenizer), *leaves])


def _digest(parts: Iterable[Any]) -> str:
    """The digest of arrays and JSON values. Each starts with its shape or length, lest two run together."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        array = isinstance(part, np.ndarray)
        content = np.ascontiguousarray(part).tobytes() if array else json.dumps(part).encode()
        found.update(f"{part.dtype.str}{part.shape}".encode() if array else str(len(content)).encode())
        found.update(content)
    return found.hexdigest()
