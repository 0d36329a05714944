"""A model folder: config.json, model.safetensors and the tokenizer's files. HF's folders and ours are one format."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flaxmpc import files
from flaxmpc.errors import brief, unknown
from flaxmpc.models import bert, distilbert, electra, mpnet, roberta, zoo  # noqa: F401  families are registered
from flaxmpc.models.base import TEXTS, WithHead, architectures, family_of, init_params, param_shapes
from flaxmpc.models.config import EncoderConfig, read_fields
from flaxmpc.models.tokenizer import load_tokenizer, save_tokenizer
from flaxmpc.models.weights import read_params, write_params


class LoadedModel(NamedTuple):
    """A model, its parameters and its tokenizer.

    Attributes:
        model: a Linen module with `embed` and `from_embeddings`.
        params: nested dict of float32 arrays.
        tokenizer: a transformers tokenizer.
        folder: the folder that it was read from.
    """

    model: Any
    params: dict[str, Any]
    tokenizer: Any
    folder: Path


def load(model: str | Path, architecture: str | None = None) -> LoadedModel:
    """Reads a model as it was saved; its weights must fit exactly.

    Args:
        model: a model folder, HF's or ours; or a name, of the zoo, or on the hub as OWNER/NAME or OWNER/NAME@REVISION,
            see `flaxmpc.models.zoo.find`. The hub learns which model is fetched from it, and no text.
        architecture: HF's name of a class; None takes what config.json says.

    Raises:
        FileNotFoundError: the folder, its config.json, weights or tokenizer do not exist, nor are to be had.
        ConnectionError: the download from the hub broke off.
        ValueError: an unknown architecture or part, or a file that is damaged, a link (see `flaxmpc.files.inside`), or
            asks for more than any published model.
        WeightsError: the weights do not fit, with the list of misfits.
    """
    folder = zoo.with_weights(model) if isinstance(model, str) else model
    read = read_model(folder, architecture)
    params = read_params(folder / "model.safetensors", param_shapes(read))
    return LoadedModel(read, params, load_tokenizer(folder), folder)


def read_model(folder: Path, architecture: str | None = None) -> Any:
    """A model without its parameters, as config.json describes it.

    Raises:
        FileNotFoundError, ValueError: see `load`.
    """
    config = read_config(folder)
    if architecture is None:
        declared = files.read_object(folder / "config.json").get("architectures")
        if not isinstance(declared, (list, type(None))):
            raise ValueError(f"{folder / 'config.json'}: architectures is a list of names, not {brief(declared)}")
        architecture = declared[0] if declared else family_of(config.model_type).models[0].__name__
    known = architectures()
    if not isinstance(architecture, str) or architecture not in known:
        raise unknown("architecture", architecture, known)
    if known[architecture] not in family_of(config.model_type).models:
        raise ValueError(f"{folder / 'config.json'}: a {architecture} is none of model_type {config.model_type!r}")
    return known[architecture](config)


def read_config(folder: str | Path) -> EncoderConfig:
    """The config of a folder, of the family that its model_type names; BERT's where it names none.

    Raises:
        FileNotFoundError: there is none, or no such folder.
        ValueError: it is not JSON, of an unknown family, or see `EncoderConfig.from_dict`; the message names the file.
    """
    path, fields = read_fields(folder)
    try:
        return family_of(fields.get("model_type", bert.BertConfig.model_type)).config.from_dict(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_pretrained(
    encoder: str | Path,
    task: str = TEXTS,
    *,
    seed: int = 0,
    **changes: Any,
) -> LoadedModel:
    """Reads a pre-trained encoder and puts a fresh head on it, to be fine-tuned; a head in the file is passed over.

    Args:
        encoder: a model folder or a name, see `load`.
        task: what the head is for, see `WithHead.task`.
        seed: what the head's random weights are made from.
        **changes: fields of the config that are to be other than in the file, such as `id2label`.

    Raises:
        FileNotFoundError, ConnectionError, ValueError, WeightsError: see `load`; what the file has beyond the encoder
            is passed over.
    """
    folder = zoo.with_weights(encoder) if isinstance(encoder, str) else encoder
    config = dataclasses.replace(read_config(folder), **changes)
    model = family_of(config.model_type).model_for(task)(config)
    params = read_params(folder / "model.safetensors", param_shapes(model), fresh=lambda: init_params(model, seed))
    return LoadedModel(model, params, load_tokenizer(folder), folder)


def described(model: WithHead) -> dict[str, Any]:
    """What config.json says of a model. ValueError: the config holds a part that is not registered."""
    return {"architectures": [type(model).__name__], **model.config.to_dict()}


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
    config = described(model)
    (folder / "config.json").unlink(missing_ok=True)
    write_params(folder / "model.safetensors", params, word_embedding_bits=word_embedding_bits, matrix_bits=matrix_bits)
    save_tokenizer(tokenizer, folder)
    files.write_json(folder / "config.json", config)
    return folder
