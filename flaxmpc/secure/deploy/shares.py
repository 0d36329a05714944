"""Checks that a share is exactly what it must be before SPU sees it.

SPU believes what comes with a share. It computes with the shape that it finds there, whatever the program takes, and
copies all bytes that were sent into memory for as many as were announced.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from flaxmpc.errors import brief
from flaxmpc.secure._spu import load_spu
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.party import VISIBILITIES
from flaxmpc.secure.protocol import Config

CHUNK_BYTES = 128 << 20
"""SPU parts a share's bytes at this size."""

_MAX_DIMS = 32  # numpy's
_MAX_ELEMENTS = 1 << 40
_STORAGE_TYPE = 5  # number of the field, the only text

ELEMENTS: Mapping[str, str] = MappingProxyType(
    {
        "i1": "bool",
        **{f"i{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
        **{f"ui{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
        **{f"f{bits}": f"float{bits}" for bits in (32, 64)},
    }
)
"""The dtypes that are shared, by the name that they have in a program."""

# By SPU's own name.
_DTYPES = {f"DT_{element.upper().replace('UI', 'U')}": dtype for element, dtype in ELEMENTS.items()}


class _Kind(NamedTuple):
    """Fields of a share that do not depend on its shape; `item_bytes` are those of an element, at one party."""

    data_type: Any
    visibility: Any
    storage_type: str
    item_bytes: int


@functools.cache
def _kind(dtype: str, visibility: str, config: Config) -> _Kind:
    """The fields as SPU makes them. ValueError: no such dtype or visibility, or one that doesn't fit into the ring."""
    spu = load_spu()
    if dtype not in _DTYPES.values():
        raise ValueError(f"its dtype is {brief(dtype)}, not one of {', '.join(_DTYPES.values())}")
    _check_visibility(visibility)
    io = spu.Io(config.world_size, config.runtime_config())
    try:
        share = io.make_shares(np.zeros(1, dtype), spu.parse_visibility(f"VIS_{visibility.upper()}"))[0]
    except RuntimeError as error:
        raise ValueError(f"its dtype is {dtype}, which does not fit into ring {config.ring}") from error
    meta = _parsed(share.meta)
    return _Kind(meta.data_type, meta.visibility, meta.storage_type, _parsed_chunk(share.share_chunks[0]).total_bytes)


def _check_visibility(visibility: str) -> None:
    if visibility not in VISIBILITIES:
        raise ValueError(f"its visibility is {brief(visibility)}, not one of {', '.join(VISIBILITIES)}")


def num_bytes(array: m.Array, config: Config) -> int:
    """Bytes of one party's share of an array, without what frames it. ValueError: its shape or dtype is not shared."""
    return _num_elements(array.shape) * _kind(array.dtype, array.visibility, config).item_bytes


def _num_elements(shape: Sequence[int]) -> int:
    """The product of the dimensions, where SPU's own might wrap. ValueError: no array that is shared has them."""
    if len(shape) > _MAX_DIMS or min(shape, default=0) < 0 or math.prod(dim or 1 for dim in shape) > _MAX_ELEMENTS:
        raise ValueError(f"its shape is {brief(tuple(shape))}, which no array has that is shared")
    return math.prod(shape)


def check(share: m.Share, array: m.Array | None, config: Config) -> None:
    """Checks that a share is byte for byte what SPU makes of an array, but for the secret bytes themselves.

    Args:
        share: one party's.
        array: the array that it must be a share of; None: the one that it says itself.
        config: the parties' settings.

    Raises:
        ValueError: it is not; one line with the part, how it is, and how it must be.
    """
    array = array or described(share.meta)
    kind = _kind(array.dtype, array.visibility, config)
    needed = load_spu().ValueMeta()
    needed.data_type, needed.visibility, needed.storage_type = kind.data_type, kind.visibility, kind.storage_type
    if array.shape:  # SPU writes none for a scalar
        needed.shape = list(array.shape)
    if share.meta != needed.SerializeToString():
        _compare(_FIELDS, _parsed(share.meta), needed)
    _check_chunks(share.chunks, num_bytes(array, config))


def check_result(shares: Sequence[m.Share], array: m.Array | None, config: Config) -> None:
    """Checks that all parties' shares of one result belong together, and can be opened.

    What a program computes is stored in more ways than what is shared: as bits too, and as few as it takes.

    Args:
        shares: every party's, by rank.
        array: the result's shape and dtype, if they are known; it may be public.
        config: the parties' settings.

    Raises:
        ValueError: they do not; one line with the party.
    """
    for rank, share in enumerate(shares):
        try:
            if share.meta != shares[0].meta:
                _compare(_FIELDS, _parsed(share.meta), _parsed(shares[0].meta))
            found = described(share.meta)
            if array is not None and (found.shape, found.dtype) != (array.shape, array.dtype):
                raise ValueError(f"it is {found.dtype} {found.shape}, not {array.dtype} {array.shape}")
            storage = _parsed(share.meta).storage_type
            own = rf"{config.protocol.lower()}\.(AShr<{config.ring}>|BShr<\w+,\d{{1,3}}>)"
            if not re.fullmatch(rf"Pub2k<{config.ring}>" if found.visibility == "public" else own, storage):
                raise ValueError(f"its storage type is {brief(storage)}, which is none of {found.visibility} values")
            total = _parsed_chunk(share.chunks[0]).total_bytes if share.chunks else 0
            if total < _num_elements(found.shape):  # an element has a byte at least; the rest SPU finds
                raise ValueError(f"it has {total} bytes for {found.dtype} {found.shape}")
            _check_chunks(share.chunks, total)
        except ValueError as error:
            raise ValueError(f"party {rank}'s share: {error}") from error


def described(meta: bytes) -> m.Array:
    """The array that a share's meta describes. ValueError: it is none that is shared."""
    found = _parsed(meta)
    shape, dtype = tuple(found.shape.dims), _DTYPES.get(_name(found.data_type))
    _num_elements(shape)
    if found.is_complex or dtype is None:
        complex_ = "complex " if found.is_complex else ""
        raise ValueError(f"its data type is {complex_}{_name(found.data_type)}, not one of {', '.join(_DTYPES)}")
    visibility = _name(found.visibility).removeprefix("VIS_").lower()
    _check_visibility(visibility)
    return m.Array(shape, dtype, visibility)


def _parsed(meta: bytes) -> Any:
    parsed = load_spu().ValueMeta()
    if not _is_readable(meta) or not parsed.ParseFromString(meta):
        raise ValueError("its meta is none that SPU writes")
    return parsed


def _is_readable(meta: bytes) -> bool:
    """Whether a meta's text is text: where it is not, SPU's parser writes a line to standard error, however often."""
    try:
        fields = UnknownFieldSet(Empty.FromString(meta))
    except DecodeError:
        return False
    return all(field.data.isascii() for field in fields if field.field_number == _STORAGE_TYPE and field.wire_type == 2)


def _parsed_chunk(chunk: bytes) -> Any:
    parsed = load_spu().ValueChunk()
    if not parsed.ParseFromString(chunk):
        raise ValueError("it has a chunk that is none that SPU writes")
    return parsed


def _name(value: Any) -> str:
    """The name of a value of SPU's enumerations, which may be a number that has none."""
    return str(int(value)) if value.name == "???" else value.name


_FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "data type": lambda meta: _name(meta.data_type),
    "complex": lambda meta: meta.is_complex,
    "visibility": lambda meta: _name(meta.visibility),
    "shape": lambda meta: tuple(meta.shape.dims),
    "storage type": lambda meta: meta.storage_type,
}

_CHUNK_FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "announced size": lambda chunk: chunk.total_bytes,
    "chunk's offset": lambda chunk: chunk.chunk_offset,
    "chunk's size": lambda chunk: len(chunk.content),
}


def _compare(fields: Mapping[str, Callable[[Any], Any]], found: Any, needed: Any) -> None:
    """ValueError for the first field that differs."""
    for name, field in fields.items():
        if field(found) != field(needed):
            raise ValueError(f"its {name} is {brief(field(found))}, not {brief(field(needed))}")
    raise ValueError("it is written otherwise than SPU writes it")


def _check_chunks(chunks: Sequence[bytes], total: int) -> None:
    """Checks that chunks hold `total` bytes as SPU parts them, and nothing else."""
    count = -(-total // CHUNK_BYTES)
    if len(chunks) != count:
        raise ValueError(f"it has {len(chunks)} chunks, not {count} with {total} bytes")
    for offset, chunk in zip(range(0, total, CHUNK_BYTES), chunks, strict=True):
        needed = load_spu().ValueChunk()
        needed.total_bytes, needed.chunk_offset = total, offset
        size = min(CHUNK_BYTES, total - offset)
        needed.content = chunk[-size:]  # it comes last
        if len(chunk) < size or chunk != needed.SerializeToString():
            needed.content = bytes(size)
            _compare(_CHUNK_FIELDS, _parsed_chunk(chunk), needed)
