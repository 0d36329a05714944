"""A model folder: config.json, model.safetensors and the tokenizer's files. HF's folders and ours are one format."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flaxmpc.errors import unknown
from flaxmpc.models.bert import ARCHITECTURES, BertForSequenceClassification, init_params, param_shapes
from flaxmpc.models.config import BertConfig
from flaxmpc.models.weights import read_params, write_params


class LoadedModel(NamedTuple):
    """A model, its parameters and its tokenizer.

    Attributes:
        model: a Linen module with `embed` and `from_embeddings`.
        params: nested dict of float32 arrays.
        tokenizer: a transformers tokenizer.
        folder: where it was read.
    """

    model: Any
    params: dict[str, Any]
    tokenizer: Any
    folder: Path


def _vocabulary(folder: Path) -> str:
    """The name of the file that a folder's tokenizer can be made from."""
    for name in ("tokenizer.json", "vocab.txt"):
        if (folder / name).is_file():
            return name
    raise FileNotFoundError(f"{folder} has no tokenizer: tokenizer.json or vocab.txt is needed")


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a folder.

    Raises:
        FileNotFoundError: the folder has neither tokenizer.json nor vocab.txt.
        ValueError: the file is damaged.
    """
    vocabulary = folder / _vocabulary(folder)
    # Without torch, transformers says that it has only tokenizers; that is all it is here for.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import BertTokenizerFast

    try:
        return BertTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"{vocabulary} cannot be read as a tokenizer: {error}") from error


def load(folder: str | Path, architecture: str | None = None) -> LoadedModel:
    """Reads a model as it was saved; its weights must fit exactly.

    Args:
        folder: HF's or ours.
        architecture: a name in `ARCHITECTURES`; None takes what config.json says.

    Raises:
        FileNotFoundError: the folder, its config.json, weights or tokenizer do not exist.
        ValueError: an unknown architecture or part, or a damaged file.
        WeightsError: the weights do not fit, with the list of misfits.
    """
    folder = Path(folder)
    config = BertConfig.from_folder(folder)
    if architecture is None:
        declared = json.loads((folder / "config.json").read_text("utf-8")).get("architectures")
        architecture = declared[0] if declared else BertForSequenceClassification.__name__
    if architecture not in ARCHITECTURES:
        raise unknown("architecture", architecture, ARCHITECTURES)
    model = ARCHITECTURES[architecture](config)
    params = read_params(folder / "model.safetensors", param_shapes(model))
    return LoadedModel(model, params, load_tokenizer(folder), folder)


def load_pretrained(
    folder: str | Path,
    architecture: type[Any] = BertForSequenceClassification,
    *,
    seed: int = 0,
    **changes: Any,
) -> LoadedModel:
    """Reads a pre-trained encoder and puts a fresh head on it, to be fine-tuned.

    Args:
        folder: HF's or ours.
        architecture: the class of the new model.
        seed: of the head.
        **changes: fields of the config that are to be other than in the file, such as `id2label`.

    Raises:
        FileNotFoundError, ValueError, WeightsError: see `load`; what the file has beyond the encoder is passed over.
    """
    folder = Path(folder)
    model = architecture(dataclasses.replace(BertConfig.from_folder(folder), **changes))
    fresh = init_params(model, seed)
    params = read_params(folder / "model.safetensors", fresh, fresh=fresh)
    return LoadedModel(model, params, load_tokenizer(folder), folder)


def save(
    folder: str | Path,
    model: Any,
    params: Mapping[str, Any],
    tokenizer_from: str | Path,
    *,
    word_embedding_bits: int = 32,
    matrix_bits: int = 32,
) -> Path:
    """Writes config.json, model.safetensors (see `write_params` for the bits) and the tokenizer's files.

    Args:
        tokenizer_from: the folder whose tokenizer it is.

    Raises:
        FileNotFoundError: `tokenizer_from` has no tokenizer.
        ValueError: the config holds a part that is not registered, or is of a folded model.
    """
    if model.config.folded:
        raise ValueError("a folded model is not stored: store the model itself, it is folded when it is loaded to run")
    folder, tokenizer_from = Path(folder), Path(tokenizer_from)
    tokenizer_files = (_vocabulary(tokenizer_from), "tokenizer_config.json")
    config = {"architectures": [type(model).__name__], **model.config.to_dict()}
    write_params(folder / "model.safetensors", params, word_embedding_bits=word_embedding_bits, matrix_bits=matrix_bits)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    for name in tokenizer_files:
        source = tokenizer_from / name
        if source.is_file() and source.resolve() != (folder / name).resolve():
            shutil.copy(source, folder / name)
    return folder
