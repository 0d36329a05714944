"""Weights from and to safetensors under HF's names: a declarative table of names, and one readable list of misfits."""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from flaxmpc import files
from flaxmpc.errors import brief, listed
from flaxmpc.models.base import Family, family_of_params
from flaxmpc.models.config import no_model_folder
from flaxmpc.models.params import flatten, unflatten
from flaxmpc.models.quantize import GROUP, dequantize, quantize

# HF's names of leaves; a kernel is transposed there.
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}

# In HF's files, but no parameter.
_BUFFER = re.compile(r"(^|\.)position_ids$")

# What a pre-trained encoder may lack, and has fresh then: the pooler, and an attention's scalars.
_MAY_LACK = re.compile(r"^\w+/pooler/|/attention/\w+$")

_WORDS = ".embeddings.word_embeddings.weight"

_FLOATS = ("float32", "float16", "bfloat16", "float64")

_SCALES = ".quantization_scale"

_DIGEST = "sha256"  # in the metadata of a file of ours: of its tensors

# Of the names and shapes at a file's start; a model of 128 layers has a quarter of a megabyte.
_MOST_HEADER = 4 << 20
_MOST_SHARDS = 1_000


def hf_name(path: str, family: Family) -> str:
    """HF's name for one of our parameters, "bert/layer_0/attention/query/kernel" say.

    A public layer's, which HF does not have, is that of the layer of its number, after "public.".

    Raises:
        ValueError: the path is none of the family's.
    """
    if public := re.match(f"{family.prefix}/embeddings/(layer_[0-9]+/.*)", path):
        return "public." + hf_name(f"{family.prefix}/{public[1]}", family)
    for ours, theirs in family.names:
        match = re.match(ours, path)
        if match:
            leaf = path[match.end() :]
            return match.expand(theirs) + (_LEAVES[leaf] if leaf else "")
    raise ValueError(f"no HF name is known for the parameter {path!r}")


_SHOWN = 50  # of each kind of misfit


class WeightsError(ValueError):
    """What does not fit between a model and a file: `missing`, `unexpected` and `wrong_shape`, in HF's names."""

    def __init__(self, path: Path, missing: list[str], unexpected: list[str], wrong_shape: list[str]):
        self.missing, self.unexpected, self.wrong_shape = missing, unexpected, wrong_shape
        parts = [("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong_shape)]
        lines = [f"\n  {kind}: {name:.200}" for kind, names in parts for name in names[:_SHOWN]]
        lines += [f"\n  {kind}: {len(names) - _SHOWN} more" for kind, names in parts if len(names) > _SHOWN]
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
            declared = _declared(folder)
            source = other if other.suffix == ".index" else folder
            call = f"{declared}.from_pretrained({str(source)!r}{argument}).save_pretrained({str(folder)!r})"
            return FileNotFoundError(
                f"{folder} has its weights in {other.name}, {whose} format; safetensors are read. Where that framework "
                f'and torch are, transformers converts them: python -c "from transformers import {declared}; {call}"'
            )
    return FileNotFoundError(f"{path} does not exist: a model folder holds config.json and model.safetensors")


def _declared(folder: Path) -> str:
    """The architecture that config.json names. It comes to stand in a command, so it is a name and nothing else."""
    try:
        declared = files.read_object(folder / "config.json")["architectures"][0]
        return declared if re.fullmatch(r"[A-Za-z0-9]{1,80}", declared) else "AutoModel"
    except (OSError, ValueError, LookupError, TypeError):
        return "AutoModel"


def _files(path: Path) -> list[Path]:
    """The file, or the shards that HF's index beside it names; see `flaxmpc.files.inside`."""
    index = path.with_name(f"{path.name}.index.json")
    if path.is_file() or path.is_symlink() or not index.is_file():
        if not path.is_file() and not path.is_symlink():
            raise _absent(path)
        return [files.inside(path)]
    try:
        names = sorted(set(files.read_object(index)["weight_map"].values()))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read as an index of safetensors: {error!r:.80}") from error
    if len(names) > _MOST_SHARDS:
        raise ValueError(f"{index} names {len(names)} shards; at most {_MOST_SHARDS} are read")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} names {brief(name)}: shards stand beside it")
        if not path.with_name(name).is_file():
            raise FileNotFoundError(f"{index} names {listed([name])}, which does not exist")
    return [files.inside(path.with_name(name)) for name in names]


class _Tensor(NamedTuple):
    """A tensor of a file that is open, and not read yet. Its type is numpy's name of it."""

    path: Path
    file: Any
    name: str
    shape: tuple[int, ...]
    type: str

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.name)


_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I8": "int8", "U8": "uint8"}


def _open(path: Path, opened: contextlib.ExitStack) -> dict[str, _Tensor]:
    """The tensors of a file, or of all shards, by their names there."""
    found: dict[str, _Tensor] = {}
    for part in _files(path):
        try:
            with part.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
            if _MOST_HEADER < length < part.stat().st_size:
                raise ValueError(f"its header has {length} bytes; at most {_MOST_HEADER} are read")
            file = opened.enter_context(safe_open(part, "np"))
            for name in file.keys():  # noqa: SIM118  it is no mapping
                tensor = file.get_slice(name)
                type_ = str(tensor.get_dtype())
                found[name] = _Tensor(part, file, name, tuple(tensor.get_shape()), _TYPES.get(type_, type_.lower()))
        except (SafetensorError, TypeError, ValueError) as error:
            raise ValueError(f"{part} cannot be read as safetensors: {error!s:.200}") from error
    return found


class _Weight(NamedTuple):
    """A matrix or vector of floats; where it is stored in few bits, with the scales of its rows."""

    stored: _Tensor
    scales: _Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        *rows, columns = self.stored.shape or (1,)
        packed = self.scales is not None and self.stored.type == "uint8"  # two to a byte
        return (*rows, 2 * columns) if packed else self.stored.shape

    def check(self) -> None:
        """ValueError: a type or scales that `read` cannot make floats of."""
        stored, scales = self.stored, self.scales
        if scales is None and stored.type not in _FLOATS:
            raise ValueError(f"{stored.path}: {stored.name} is {stored.type}; weights are {', '.join(_FLOATS)}")
        if scales is not None:
            needed = (*self.shape[:-1], self.shape[-1] // GROUP)
            right = stored.type in ("int8", "uint8") and scales.type == "float16"
            if not right or len(self.shape) != 2 or self.shape[1] % GROUP or scales.shape != needed:
                raise ValueError(
                    f"{stored.path}: {stored.name} is {stored.type} {stored.shape} with scales {scales.type} "
                    f"{scales.shape}; int8 or uint8 with float16, one for {GROUP} of a row, are read"
                )

    def read(self) -> np.ndarray:
        """As float32. ValueError: not finite."""
        value = self.stored.read()
        if self.scales is not None:
            value = dequantize(value, self.scales.read())
        with np.errstate(over="ignore"):
            value = value.astype(np.float32)
        if not np.isfinite(value).all():
            raise ValueError(f"{self.stored.path}: {self.stored.name} holds non-finite weights")
        return value


def _weights(path: Path, opened: contextlib.ExitStack, family: Family) -> dict[str, _Weight]:
    """The weights of a file under names that start with the encoder's where HF's may leave it out; none is read yet.

    Raises:
        FileNotFoundError: no such file; where weights in another format are there, says how to convert them.
        ValueError: not a safetensors file, or a link.
    """
    stored = _open(path, opened)
    found = {}
    for name, tensor in stored.items():
        if not name.endswith(_SCALES) and not _BUFFER.search(name):
            new = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            found[new] = _Weight(tensor, stored.get(name + _SCALES))
    if not any(name.startswith(f"{family.prefix}.") for name in found):
        found = {
            name if name.startswith(family.heads) else f"{family.prefix}.{name}": weight
            for name, weight in found.items()
        }
    return found


def read_params(
    path: Path, shapes: Mapping[str, Any], *, fresh: Callable[[], Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """The parameters of a model from a file with HF's names or ours (the same).

    Where there is no such file but HF's index of its shards, from all shards. Weights are read once all are known to
    fit: a file may say that it has a million times what the model needs.

    Args:
        path: the safetensors file.
        shapes: the model's parameters, as arrays or shapes (`param_shapes`).
        fresh: makes initialised parameters, of which the head is taken, and the pooler and the scalars of an attention
            part where the file lacks them; what the file has beyond the encoder is passed over. Without, the fit must
            be exact.

    Raises:
        FileNotFoundError: no such file; where weights in another format are there, says how to convert them.
        ValueError: not a safetensors file, a link, weights that are no floats or not finite; or an output matrix that
            is not the word embeddings'.
        WeightsError: everything that does not fit, in one list.
    """
    with contextlib.ExitStack() as opened:
        family = family_of_params(shapes)
        weights = _weights(path, opened, family)
        wanted = flatten(shapes)
        encoder = f"{family.prefix}/"
        missing, wrong_shape, own = [], [], set()
        taken: dict[str, _Weight] = {}
        for ours, shape in wanted.items():
            theirs = hf_name(ours, family)
            weight = weights.get(theirs)
            if fresh is not None and (not ours.startswith(encoder) or (weight is None and _MAY_LACK.search(ours))):
                own.add(ours)
            elif weight is None:
                missing.append(theirs)
            else:
                taken[ours] = weight
                expected = shape.shape[::-1] if ours.endswith("/kernel") else shape.shape
                if weight.shape != expected:
                    wrong_shape.append(f"{theirs}: {weight.shape} in the file, {expected} in the model")
        named = {hf_name(ours, family) for ours in wanted}
        unexpected = sorted(set(weights) - named - set(family.tied)) if fresh is None else []
        if missing or unexpected or wrong_shape:
            raise WeightsError(path, missing, unexpected, wrong_shape)
        for weight in taken.values():
            weight.check()
        _check_whole(weights)
        if "decoder/bias" in wanted and fresh is None:
            _refuse_untied(path, weights, family)
        initial = flatten(fresh()) if fresh is not None else {}
        params = {ours: np.asarray(initial[ours]) for ours in own}
        for ours, weight in taken.items():
            value = weight.read()
            params[ours] = np.ascontiguousarray(value.T if ours.endswith("/kernel") else value)
    return unflatten({ours: params[ours] for ours in wanted})


def _check_whole(weights: Mapping[str, _Weight]) -> None:
    """ValueError: a file of ours whose tensors are not those that were written."""
    opened = {weight.stored.path: weight.stored.file for weight in weights.values()}
    for path, file in opened.items():
        digest = (file.metadata() or {}).get(_DIGEST)
        if digest is not None and digest != _digest((name, file.get_tensor(name)) for name in sorted(file.keys())):
            raise ValueError(f"{path} is damaged, its weights are not those that were written: make it anew")


def _digest(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """SHA-256 of tensors in the order of their names, with these, types and shapes."""
    found = hashlib.sha256()
    for name, value in tensors:
        found.update(f"{name} {value.dtype.str} {value.shape};".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()


def _refuse_untied(path: Path, weights: Mapping[str, _Weight], family: Family) -> None:
    """A masked LM's output matrix and bias stand in HF's files twice, unless they are trained apart."""
    for own, tied in family.tied.items():
        if own in weights and tied in weights:
            weights[own].check()
            alike = weights[own].shape == weights[tied].shape
            if not alike or not np.array_equal(weights[own].read(), weights[tied].read()):
                raise ValueError(f"{path}: {own} is not {tied}; only models that share them are supported")


def _bits(name: str, value: np.ndarray, word_embedding_bits: int, matrix_bits: int) -> int:
    if value.ndim != 2 or value.shape[1] % 64:
        return 32
    return word_embedding_bits if name.endswith(_WORDS) else matrix_bits


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
    family = family_of_params(params)
    for ours, leaf in flatten(params).items():
        name = hf_name(ours, family)
        value = np.asarray(leaf, np.float32)
        value = np.ascontiguousarray(value.T if ours.endswith("/kernel") else value)
        bits = _bits(name, value, word_embedding_bits, matrix_bits)
        if bits == 32:
            tensors[name] = value
        else:
            tensors[name], tensors[name + _SCALES] = quantize(value, bits)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by save_file: what it writes only the owner may read, whatever the umask.
    files.write(path, _sealed(save(tensors, metadata={"format": "pt"}), _digest(sorted(tensors.items()))))


def _sealed(content: bytes, digest: str) -> bytes:
    """The file with its digest. Of two entries of its metadata, safetensors changes the order from run to run."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"][_DIGEST] = digest
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[end:]))
