"""What a hostile client or owner sends: shares, and programs."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from flaxmpc.secure._spu import load_spu
from flaxmpc.secure.deploy import messages as m

ARRAY = m.Array((2, 4), "float32")
WRAPPED = (1 << 32, 1 << 32)  # 2^64 elements: none, in 64 bits


def meta(
    shape: Sequence[int] = ARRAY.shape,
    data_type: int = 11,
    visibility: int = 1,
    storage_type: str = "aby3.AShr<FM64>",
    *,
    is_complex: bool = False,
) -> bytes:
    """By default of `ARRAY`."""
    spu = load_spu()
    message = spu.ValueMeta()
    message.data_type, message.visibility = spu.DataType(data_type), spu.Visibility(visibility)
    message.shape, message.storage_type, message.is_complex = list(shape), storage_type, is_complex
    return message.SerializeToString()


def chunk(total: int, offset: int, content: bytes) -> bytes:
    message = load_spu().ValueChunk()
    message.total_bytes, message.chunk_offset, message.content = total, offset, content
    return message.SerializeToString()


def good() -> m.Share:
    return m.Share(meta(), [chunk(128, 0, bytes(128))])


def bent(chance: random.Random, content: bytes) -> bytes:
    """With some bits and bytes changed, added or left out."""
    result = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        at = chance.randrange(len(result) or 1)
        match chance.choice(("flip", "flip", "insert", "delete", "cut", "double")):
            case "flip" if result:
                result[at] ^= 1 << chance.randrange(8)
            case "delete":
                del result[at : at + 1]
            case "cut":
                del result[at:]
            case "double":
                result *= 2
            case _:
                result[at:at] = chance.randbytes(chance.choice((1, 1, 4)))
    return bytes(result)


def hostile(chance: random.Random) -> m.Share:
    """Of the right share, or near it, or anything."""
    right = good()
    pick = chance.choice

    def any_meta() -> bytes:
        dims = (0, 1, 2, 4, 8, -1, -2, -4, 1 << 28, 1 << 31, 1 << 32, (1 << 61) - 1, 1 << 62, -(1 << 63))
        storage = (
            "aby3.AShr<FM64>", "aby3.AShr<FM32>", "aby3.AShr<FM128>", "aby3.BShr<PT_U64,64>", "aby3.BShr<PT_U8,1>",
            "semi2k.AShr<FM64>", "cheetah.AShr<FM64>", "Pub2k<FM64>", "Priv2k<FM64,1>", "", "<", ">", "x<y>",
            "aby3.AShr<", "aby3.BShr<PT_U64,99999999>",
        )  # fmt: skip
        return meta(
            pick(
                (ARRAY.shape, ARRAY.shape, (8,), (4, 2), [pick(dims) for _ in range(chance.randrange(5))], (1,) * 500)
            ),
            pick((11,) * 13 + (*range(13), 99)),
            pick((1,) * 9 + (0, 2, 3, 7)),
            pick((*storage[:1] * 20, *storage)),
            is_complex=pick((False,) * 9 + (True,)),
        )

    def any_chunk() -> bytes:
        sizes = (0, 1, 127, 128, 129, 256, 4096)
        total = pick((128, 128, *sizes, 1 << 32, (1 << 64) - 1))
        return chunk(total, pick((0, 0, 0, 1, 64, 128, 1 << 63)), chance.randbytes(pick((128, *sizes))))

    def noise() -> bytes:
        return chance.randbytes(pick((0, 1, 8, 40, 300)))

    metas: tuple[Callable[[], bytes], ...] = (
        lambda: right.meta,
        any_meta,
        any_meta,
        any_meta,
        lambda: bent(chance, right.meta),
        noise,
    )
    chunks: tuple[Callable[[], Any], ...] = (
        lambda: right.chunks,
        lambda: right.chunks,
        list,
        lambda: right.chunks * 2,
        lambda: [any_chunk() for _ in range(pick((1, 1, 1, 2, 3)))],
        lambda: [bent(chance, right.chunks[0])],
        lambda: [noise()],
    )
    return m.Share(pick(metas)(), pick(chunks)())
