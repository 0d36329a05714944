"""Weights from and to safetensors under HF's names: a declarative table of names, and one readable list of misfits."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from flaxmpc import files
from flaxmpc.models.config import no_model_folder
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

# In HF's files, but no parameter; and what is tied to one.
_BUFFER = re.compile(r"(^|\.)position_ids$")
_TIED = re.compile(r"^cls\.predictions\.decoder\.(weight|bias)$")
_WORDS = "bert.embeddings.word_embeddings.weight"

# What is fresh on a pre-trained encoder: the head; and where they are lacking the pooler and an attention's scalars.
_HEAD = re.compile(r"^(?!bert/)")
_MAY_LACK = re.compile(r"^bert/pooler/|/attention/(shift|scale)$")

_FLOATS = ("float32", "float16", "bfloat16", "float64")

_SCALES = ".quantization_scale"

_DIGEST = "sha256"  # in the metadata of a file of ours: of its tensors


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


# Weights in formats that are not read: the files, whose they are, and how transformers is told to read them.
_OTHER_FORMATS = (
    ("pytorch_model*.bin", "PyTorch's", ""),
    ("flax_model*.msgpack", "Flax's", ", from_flax=True"),
    ("tf_model*.h5", "TensorFlow's", ", from_tf=True"),
    ("*.ckpt.index", "TensorFlow's", ", from_tf=True"),
)


def _absent(path: Path) -> FileNotFoundError:
    """The error for weights that are not there; says what is, and how to convert it."""
    folder = path.parent
    if not folder.is_dir():
        return no_model_folder(folder)
    for pattern, whose, argument in _OTHER_FORMATS:
        for other in sorted(folder.glob(pattern)):
            try:
                declared = json.loads((folder / "config.json").read_text("utf-8"))["architectures"][0]
            except (OSError, ValueError, LookupError, TypeError):
                declared = "BertModel"
            source = other if other.suffix == ".index" else folder
            call = f"{declared}.from_pretrained({str(source)!r}{argument}).save_pretrained({str(folder)!r})"
            return FileNotFoundError(
                f"{folder} has its weights in {other.name}, {whose} format; safetensors are read. Where that framework "
                f'and torch are, transformers converts them: python -c "from transformers import {declared}; {call}"'
            )
    return FileNotFoundError(f"{path} does not exist: a model folder holds config.json and model.safetensors")


def _files(path: Path) -> list[Path]:
    """The file, or the shards that HF's index beside it names."""
    index = path.with_name(f"{path.name}.index.json")
    if path.is_file() or not index.is_file():
        if not path.is_file():
            raise _absent(path)
        return [path]
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read as an index of safetensors: {error!r}") from error
    for name in names:
        if Path(str(name)).name != name:
            raise ValueError(f"{index} names {name!r}: shards stand beside it")
        if not path.with_name(name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which does not exist")
    return [path.with_name(name) for name in names]


def _stored(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, or of all shards, as they are stored."""
    stored: dict[str, np.ndarray] = {}
    for part in _files(path):
        try:
            with safe_open(part, "np") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
                digest = (file.metadata() or {}).get(_DIGEST)
        except (SafetensorError, TypeError) as error:  # a TypeError: a type that numpy has not
            raise ValueError(f"{part} cannot be read as safetensors: {error}") from error
        if digest is not None and digest != _digest(tensors):
            raise ValueError(f"{part} is damaged, its weights are not those that were written: make it anew")
        stored |= tensors
    return stored


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of all tensors, their names, types and shapes."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype.str} {value.shape};".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, as float32, under names that start with `bert.` where HF's may leave it out.

    Where there is no such file but HF's index of its shards, those of all shards.

    Raises:
        FileNotFoundError: no such file; where weights in another format are there, says how to convert them.
        ValueError: not a safetensors file, or one with weights that are no floats, or not finite.
    """
    stored = _stored(path)
    tensors = {}
    for name, value in stored.items():
        if name.endswith(_SCALES) or _BUFFER.search(name):
            continue
        if name + _SCALES in stored:
            value = dequantize(value, stored[name + _SCALES])
        if value.dtype.name not in _FLOATS:
            raise ValueError(f"{path}: {name} is {value.dtype.name}; weights are {', '.join(_FLOATS)}")
        with np.errstate(over="ignore"):
            value = value.astype(np.float32)
        if not np.isfinite(value).all():
            raise ValueError(f"{path}: {name} holds non-finite weights")
        tensors[name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")] = value
    if not any(name.startswith("bert.") for name in tensors):
        own = ("classifier.", "qa_outputs.", "cls.")
        tensors = {name if name.startswith(own) else f"bert.{name}": value for name, value in tensors.items()}
    return tensors


def read_params(path: Path, shapes: Mapping[str, Any], *, fresh: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The parameters of a model from a file with HF's names or ours (the same).

    Args:
        path: the safetensors file.
        shapes: the model's parameters, as arrays or shapes (`param_shapes`).
        fresh: initialised parameters, of which the head is taken, and the pooler and the scalars of an attention part
            where the file lacks them; what the file has beyond the encoder is passed over. Without, the fit must be
            exact.

    Raises:
        FileNotFoundError, ValueError: see `read_tensors`; or an output matrix that is not the word embeddings'.
        WeightsError: everything that does not fit, in one list.
    """
    tensors = read_tensors(path)
    wanted = flatten(shapes)
    if "decoder_bias" in wanted and fresh is None:
        _refuse_untied(path, tensors)
    tensors = {name: value for name, value in tensors.items() if not _TIED.search(name)}
    initial = flatten(fresh) if fresh is not None else {}
    params, missing, wrong_shape = {}, [], []
    for ours, shape in wanted.items():
        theirs = hf_name(ours)
        value = tensors.pop(theirs, None)
        if ours in initial and (_HEAD.search(ours) or (value is None and _MAY_LACK.search(ours))):
            params[ours] = np.asarray(initial[ours])
            continue
        if value is None:
            missing.append(theirs)
            continue
        kernel = ours.endswith("/kernel")
        expected = shape.shape[::-1] if kernel else shape.shape
        if value.shape != expected:
            wrong_shape.append(f"{theirs}: {value.shape} in the file, {expected} in the model")
        params[ours] = np.ascontiguousarray(value.T if kernel else value)
    unexpected = sorted(tensors) if fresh is None else []
    if missing or unexpected or wrong_shape:
        raise WeightsError(path, missing, unexpected, wrong_shape)
    return unflatten(params)


def _refuse_untied(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A masked LM's output matrix and bias stand in HF's files twice, unless they are trained apart."""
    prefix = "cls.predictions."
    pairs = ((f"{prefix}decoder.weight", _WORDS), (f"{prefix}decoder.bias", f"{prefix}bias"))
    for own, tied in pairs:
        if own in tensors and tied in tensors and not np.array_equal(tensors[own], tensors[tied]):
            raise ValueError(f"{path}: {own} is not {tied}; only models that share them are supported")


def _bits(name: str, value: np.ndarray, word_embedding_bits: int, matrix_bits: int) -> int:
    if value.ndim != 2 or value.shape[1] % 64:
        return 32
    return word_embedding_bits if name == _WORDS else matrix_bits


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
    # Not by save_file: what it writes only the owner may read, whatever the umask.
    files.write(path, _sealed(save(tensors, metadata={"format": "pt"}), _digest(tensors)))


def _sealed(content: bytes, digest: str) -> bytes:
    """The file with its digest. Of two entries of its metadata, safetensors changes the order from run to run."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"][_DIGEST] = digest
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[end:]))
