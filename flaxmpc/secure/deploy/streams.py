"""Sends what is too large for one message as pieces after it, and reads them within limits."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec
from grpc import StatusCode

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.errors import Refused
from flaxmpc.secure.deploy.shares import CHUNK_BYTES

_PIECE = 1 << 20  # bytes
_MOST_CHUNKS = 64  # a share has so many; SPU's have 128 MiB
_MOST_META = 4096  # bytes


def frame_bytes(size: int) -> int:
    """The most that SPU writes around a share of so many bytes."""
    return 64 * (1 + size // CHUNK_BYTES)


def pieces(name: str, content: bytes, meta: bytes | None = None) -> Iterator[m.Piece]:
    """The pieces of a content, at least one."""
    for start in range(0, max(1, len(content)), _PIECE):
        yield m.Piece(name, content[start : start + _PIECE], meta if start == 0 else None)


def of_shares(shares: Mapping[str, m.Share]) -> Iterator[m.Piece]:
    """The pieces of shares, by name. An empty array's share has no chunks, and goes as an empty one."""
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
        stream: pieces as `of_shares` makes them.
        most: says how many bytes the share of a name may have; may refuse the name.

    Raises:
        Refused: a share that is larger, or has no meta or too much of it.
    """
    for name, group in itertools.groupby(stream, key=lambda piece: piece.name):
        limit, meta, chunks = most(name), b"", list[bytearray]()
        for piece in group:
            if piece.meta is not None:
                meta = piece.meta
                chunks.append(bytearray())
            if not chunks:
                raise Refused(StatusCode.INVALID_ARGUMENT, "a share must begin with its meta")
            if len(meta) > _MOST_META or len(chunks) > _MOST_CHUNKS:
                had = f"{len(meta)} bytes of meta and {len(chunks)} chunks"
                reason = f"the share of {name!r} has {had}, more than {_MOST_META} or {_MOST_CHUNKS}"
                raise Refused(StatusCode.INVALID_ARGUMENT, reason)
            chunks[-1] += piece.content
            if sum(map(len, chunks)) > limit:
                raise Refused(StatusCode.RESOURCE_EXHAUSTED, f"the share of {name!r} is larger than {limit} bytes")
        yield m.Put(name, m.Share(meta, [bytes(chunk) for chunk in chunks if chunk]))


def contents(stream: Iterable[m.Piece], count: int, most: int, what: str) -> list[bytes]:
    """All contents of a stream.

    Args:
        stream: pieces as `of_contents` makes them.
        count: the number of contents.
        most: bytes of all together.
        what: names them in the message.

    Raises:
        Refused: another number of contents, or larger ones.
    """
    found, left = list[bytes](), most
    for name, group in itertools.groupby(stream, key=lambda piece: piece.name):
        if name != str(len(found)) or len(found) == count:
            raise Refused(StatusCode.INVALID_ARGUMENT, f"piece {name!r} is not of the {count} contents, in their order")
        content = bytearray()
        for piece in group:
            left -= len(piece.content)
            if left < 0:
                raise Refused(StatusCode.RESOURCE_EXHAUSTED, f"{what} has more than max_request_bytes {most}")
            content += piece.content
        found.append(bytes(content))
    if len(found) != count:
        raise Refused(StatusCode.INVALID_ARGUMENT, f"{len(found)} contents, {count} are needed")
    return found


def of_model(header: m.Publish, bundle: bytes) -> tuple[m.Publish, list[bytes]]:
    """A model as it is sent: the header without the programs' code, and the contents that follow it."""
    codes = [code for program in header.programs.values() for code in (program.code, *program.joint.values())]
    return _with_codes(header, itertools.repeat(b"")), [*codes, bundle]


def model(header: m.Publish, stream: Iterable[m.Piece], most: int) -> tuple[m.Publish, bytes]:
    """The model and its bundle, as `of_model` sent them, of at most so many bytes. Refused: as by `contents`."""
    count = sum(1 + len(program.joint) for program in header.programs.values()) + 1
    *codes, bundle = contents(stream, count, most, f"model {header.name!r}")
    return _with_codes(header, iter(codes)), bundle


def _with_codes(header: m.Publish, codes: Iterator[bytes]) -> m.Publish:
    """A model's header with other code in its programs."""
    programs = {
        name: msgspec.structs.replace(program, code=next(codes), joint={count: next(codes) for count in program.joint})
        for name, program in header.programs.items()
    }
    return msgspec.structs.replace(header, programs=programs)
