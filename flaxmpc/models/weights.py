"""Weights from and to safetensors under HF's names: a declarative table of names, and one readable list of misfits."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flaxmpc.models.params import flatten, unflatten
from flaxmpc.models.quantize import dequantize, quantize

# Our module -> HF's. The leaves follow: kernel -> weight (transposed), a LayerNorm's scale -> weight, bias -> bias.
_MODULES = [
    (r"bert/embeddings/(word|position|token_type)_embeddings", r"bert.embeddings.\1_embeddings.weight"),
    (r"bert/embeddings/layer_norm/", r"bert.embeddings.LayerNorm."),
    (r"bert/layer_(\d+)/attention/(query|key|value)/", r"bert.encoder.layer.\1.attention.self.\2."),
    (r"bert/layer_(\d+)/attention/(shift|scale)", r"bert.encoder.layer.\1.attention.self.\2"),
    (r"bert/layer_(\d+)/attention/output/", r"bert.encoder.layer.\1.attention.output.dense."),
    (r"bert/layer_(\d+)/attention_layer_norm/", r"bert.encoder.layer.\1.attention.output.LayerNorm."),
    (r"bert/layer_(\d+)/(intermediate|output)/", r"bert.encoder.layer.\1.\2.dense."),
    (r"bert/layer_(\d+)/output_layer_norm/", r"bert.encoder.layer.\1.output.LayerNorm."),
    (r"bert/pooler/", r"bert.pooler.dense."),
    (r"(classifier|qa_outputs)/", r"\1."),
    (r"transform/", r"cls.predictions.transform.dense."),
    (r"transform_layer_norm/", r"cls.predictions.transform.LayerNorm."),
    (r"decoder_bias", r"cls.predictions.bias"),
]
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}

# In HF's files, but no parameters, or tied to one.
_REDUNDANT = re.compile(r"position_ids$|^cls\.predictions\.decoder\.(weight|bias)$")

# What a pre-trained encoder may lack: a head, the pooler, and the scalars of an attention part.
_FRESH = re.compile(r"^(?!bert/)|^bert/pooler/|/attention/(shift|scale)$")

_SCALES = ".quantization_scale"


def hf_name(path: str) -> str:
    """HF's name for one of our parameters, "bert/layer_0/attention/query/kernel" say.

    Raises:
        ValueError: the path is none of a BERT's.
    """
    for ours, theirs in _MODULES:
        match = re.match(ours, path)
        if match:
            leaf = path[match.end() :]
            return match.expand(theirs) + (_LEAVES[leaf] if leaf else "")
    raise ValueError(f"no HF name is known for the parameter {path!r}")


class WeightsError(ValueError):
    """What does not fit between a model and a file: `missing`, `unexpected` and `wrong_shape`, in HF's names."""

    def __init__(self, path: Path, missing: list[str], unexpected: list[str], wrong_shape: list[str]):
        self.missing, self.unexpected, self.wrong_shape = missing, unexpected, wrong_shape
        parts = [("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong_shape)]
        lines = [f"\n  {kind}: {name}" for kind, names in parts for name in names]
        super().__init__(f"{path} does not fit the model:{''.join(lines)}")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, as float32, under names that start with `bert.` where HF's may leave it out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, or one with non-finite weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a model folder holds config.json and model.safetensors")
    try:
        with safe_open(path, "np") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    tensors = {}
    for name, value in stored.items():
        if name.endswith(_SCALES):
            continue
        if name + _SCALES in stored:
            value = dequantize(value, stored[name + _SCALES])
        value = value.astype(np.float32)
        if not np.isfinite(value).all():
            raise ValueError(f"{path}: {name} holds non-finite weights")
        tensors[name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")] = value
    if not any(name.startswith("bert.") for name in tensors):
        own = ("classifier.", "qa_outputs.", "cls.")
        tensors = {name if name.startswith(own) else f"bert.{name}": value for name, value in tensors.items()}
    return {name: value for name, value in tensors.items() if not _REDUNDANT.search(name)}


def read_params(path: Path, shapes: Mapping[str, Any], *, fresh: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The parameters of a model from a file with HF's names or ours (the same).

    Args:
        path: the safetensors file.
        shapes: the model's parameters, as arrays or shapes (`param_shapes`).
        fresh: initialised parameters to take where the file lacks a head, the pooler or the scalars of an attention
            part; then what the file has beyond the model is passed over. Without, the fit must be exact.

    Raises:
        FileNotFoundError, ValueError: see `read_tensors`.
        WeightsError: everything that does not fit, in one list.
    """
    tensors = read_tensors(path)
    wanted = flatten(shapes)
    initial = flatten(fresh) if fresh is not None else {}
    params, missing, wrong_shape = {}, [], []
    for ours, shape in wanted.items():
        theirs = hf_name(ours)
        value = tensors.pop(theirs, None)
        if value is None:
            if ours in initial and _FRESH.search(ours):
                params[ours] = np.asarray(initial[ours])
            else:
                missing.append(theirs)
            continue
        value = value.T if ours.endswith("/kernel") else value
        if value.shape != shape.shape:
            wrong_shape.append(f"{theirs}: {value.shape} in the file, {shape.shape} in the model")
        params[ours] = np.ascontiguousarray(value)
    unexpected = sorted(tensors) if fresh is None else []
    if missing or unexpected or wrong_shape:
        raise WeightsError(path, missing, unexpected, wrong_shape)
    return unflatten(params)


def _bits(name: str, value: np.ndarray, word_embedding_bits: int, matrix_bits: int) -> int:
    if value.ndim != 2 or value.shape[1] % 64:
        return 32
    return word_embedding_bits if name == "bert.embeddings.word_embeddings.weight" else matrix_bits


def write_params(
    path: Path, params: Mapping[str, Any], *, word_embedding_bits: int = 32, matrix_bits: int = 32
) -> None:
    """Writes parameters under HF's names, so that HF reads what has its shapes, and `read_params` everything.

    Args:
        path: the safetensors file.
        params: a model's.
        word_embedding_bits, matrix_bits: 32, 8 or 4 bits for the table of words, and for every other matrix whose
            rows are a multiple of 64 long; vectors stay float32.
    """
    tensors: dict[str, np.ndarray] = {}
    for ours, leaf in flatten(params).items():
        name = hf_name(ours)
        value = np.asarray(leaf, np.float32)
        value = np.ascontiguousarray(value.T if ours.endswith("/kernel") else value)
        bits = _bits(name, value, word_embedding_bits, matrix_bits)
        if bits == 32:
            tensors[name] = value
        else:
            tensors[name], tensors[name + _SCALES] = quantize(value, bits)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
