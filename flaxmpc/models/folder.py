"""A model folder: config.json, model.safetensors and the tokenizer's files. HF's folders and ours are one format."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flaxmpc import files
from flaxmpc.errors import brief, unknown
from flaxmpc.models.base import init_params, param_shapes
from flaxmpc.models.bert import ARCHITECTURES, BertForSequenceClassification
from flaxmpc.models.config import BertConfig
from flaxmpc.models.tokenizer import load_tokenizer, save_tokenizer
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


def load(folder: str | Path, architecture: str | None = None) -> LoadedModel:
    """Reads a model as it was saved; its weights must fit exactly.

    Args:
        folder: HF's or ours.
        architecture: a name in `ARCHITECTURES`; None takes what config.json says.

    Raises:
        FileNotFoundError: the folder, its config.json, weights or tokenizer do not exist.
        ValueError: an unknown architecture or part, or a file that is damaged, a link (see `flaxmpc.files.inside`), or
            asks for more than any published model.
        WeightsError: the weights do not fit, with the list of misfits.
    """
    folder = Path(folder)
    model = read_model(folder, architecture)
    params = read_params(folder / "model.safetensors", param_shapes(model))
    return LoadedModel(model, params, load_tokenizer(folder), folder)


def read_model(folder: Path, architecture: str | None = None) -> Any:
    """A model without its parameters, as config.json describes it.

    Raises:
        FileNotFoundError, ValueError: see `load`.
    """
    config = BertConfig.from_folder(folder)
    if architecture is None:
        declared = files.read_object(folder / "config.json").get("architectures")
        if not isinstance(declared, (list, type(None))):
            raise ValueError(f"{folder / 'config.json'}: architectures is a list of names, not {brief(declared)}")
        architecture = declared[0] if declared else BertForSequenceClassification.__name__
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise unknown("architecture", architecture, ARCHITECTURES)
    return ARCHITECTURES[architecture](config)


def load_pretrained(
    folder: str | Path,
    architecture: type[Any] = BertForSequenceClassification,
    *,
    seed: int = 0,
    **changes: Any,
) -> LoadedModel:
    """Reads a pre-trained encoder and puts a fresh head on it, to be fine-tuned; a head in the file is passed over.

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
    params = read_params(folder / "model.safetensors", param_shapes(model), fresh=lambda: init_params(model, seed))
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
    """Writes model.safetensors (see `write_params` for the bits), the tokenizer's files and config.json.

    A save that is killed leaves a folder without config.json, which is no model: never parts of two.

    Args:
        tokenizer_from: the folder whose tokenizer it is.

    Raises:
        FileNotFoundError, ValueError: `tokenizer_from` has no tokenizer that can be read, see `load_tokenizer`.
        ValueError: the config holds a part that is not registered.
    """
    folder, tokenizer = Path(folder), load_tokenizer(tokenizer_from)
    config = {"architectures": [type(model).__name__], **model.config.to_dict()}
    (folder / "config.json").unlink(missing_ok=True)
    write_params(folder / "model.safetensors", params, word_embedding_bits=word_embedding_bits, matrix_bits=matrix_bits)
    save_tokenizer(tokenizer, folder)
    files.write_json(folder / "config.json", config)
    return folder
