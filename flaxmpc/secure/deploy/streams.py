"""What is too large for one message goes as pieces after it: how they are made, and how they are read within limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import grpc
import msgspec

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.rpc import Refused, pieces

_MOST_CHUNKS = 64  # of a share; SPU's have 128 MiB
_MOST_META = 4096  # bytes


def frame_bytes(size: int) -> int:
    """The most that SPU writes around a share of so many bytes."""
    return 64 * (1 + size // (128 << 20))


def of_shares(shares: Mapping[str, m.Share]) -> Iterator[m.Piece]:
    """The pieces of shares, by name. That of an empty array has no chunks, and goes as an empty one."""
    for name, share in shares.items():
        for chunk in share.chunks or [b""]:
            yield from pieces(name, chunk, share.meta)


def of_contents(contents: Iterable[bytes]) -> Iterator[m.Piece]:
    """The pieces of contents, which have their places as names."""
    for place, content in enumerate(contents):
        yield from pieces(str(place), content)


def shares(stream: Iterable[m.Piece], most: Callable[[str], int]) -> Iterator[m.Put]:
    """The shares of a stream, one after another; no more is held than the one that is being read.

    Args:
        stream: see `of_shares`.
        most: bytes of the share of a name; may refuse the name.

    Raises:
        Refused: a share that is larger, or has no meta or too much of it.
    """
    name, meta, chunks, limit = None, b"", list[bytearray](), 0
    for piece in stream:
        if piece.name != name:
            if name is not None:
                yield m.Put(name, m.Share(meta, [bytes(chunk) for chunk in chunks if chunk]))
            limit = most(piece.name)
            name, meta, chunks = piece.name, b"", []
        if piece.meta is not None:
            meta = piece.meta
            chunks.append(bytearray())
        if not chunks:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "a share must begin with its meta")
        if len(meta) > _MOST_META or len(chunks) > _MOST_CHUNKS:
            had = f"{len(meta)} bytes of meta and {len(chunks)} chunks"
            reason = f"the share of {name!r} has {had}, more than {_MOST_META} or {_MOST_CHUNKS}"
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, reason)
        chunks[-1] += piece.content
        if sum(map(len, chunks)) > limit:
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, f"the share of {name!r} is larger than {limit} bytes")
    if name is not None:
        yield m.Put(name, m.Share(meta, [bytes(chunk) for chunk in chunks if chunk]))


def contents(stream: Iterable[m.Piece], count: int, most: int, what: str) -> list[bytes]:
    """All contents of a stream.

    Args:
        stream: see `of_contents`.
        count: how many there are.
        most: bytes of all together.
        what: they are, for the message.

    Raises:
        Refused: another number of contents, or larger ones.
    """
    found, left = [bytearray() for _ in range(count)], most
    place = -1
    for piece in stream:
        if piece.name != str(place):
            place += 1
        if piece.name != str(place) or place == count:
            reason = f"piece {piece.name!r} is not of the {count} contents, in their order"
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, reason)
        left -= len(piece.content)
        if left < 0:
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{what} has more than max_request_bytes {most}")
        found[place] += piece.content
    if place != count - 1:
        raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"{place + 1} contents, {count} are needed")
    return [bytes(content) for content in found]


def of_model(header: m.Publish, bundle: bytes) -> tuple[m.Publish, list[bytes]]:
    """A model as it is sent: the header without the programs' code, and the contents that follow it."""
    codes = [code for program in header.programs.values() for code in (program.code, *program.joint.values())]
    empty = {
        name: msgspec.structs.replace(program, code=b"", joint=dict.fromkeys(program.joint, b""))
        for name, program in header.programs.items()
    }
    return msgspec.structs.replace(header, programs=empty), [*codes, bundle]


def model(header: m.Publish, stream: Iterable[m.Piece], most: int) -> tuple[m.Publish, bytes]:
    """The model and its bundle, see `of_model`; `most`: bytes of its contents. Refused: see `contents`."""
    count = sum(1 + len(program.joint) for program in header.programs.values()) + 1
    *codes, bundle = contents(stream, count, most, f"model {header.name!r}")
    each = iter(codes)
    whole = {
        name: msgspec.structs.replace(program, code=next(each), joint={number: next(each) for number in program.joint})
        for name, program in header.programs.items()
    }
    return msgspec.structs.replace(header, programs=whole), bundle
