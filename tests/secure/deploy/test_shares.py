"""What a share must be: of all that can be shared, what SPU makes passes; nothing else does, whatever it is."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hostile import ARRAY, WRAPPED, chunk, good, hostile, meta

from flaxmpc import secure
from flaxmpc.secure._spu import load_spu
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy import shares
from flaxmpc.secure.protocol import Config

SHAPES = [(), (1,), (3, 2), (0, 4), (2, 1, 4)]
CONFIG = Config()


def made(shape: Sequence[int], dtype: str, visibility: str = "secret", config: Config = CONFIG) -> list[m.Share]:
    """Every party's share of ones, as SPU makes it."""
    spu = load_spu()
    io = spu.Io(config.world_size, config.runtime_config())
    return [
        m.Share.pack(share)
        for share in io.make_shares(np.ones(shape, dtype), spu.parse_visibility(f"VIS_{visibility.upper()}"))
    ]


@pytest.mark.parametrize("ring", ["FM32", "FM64", "FM128"])
@pytest.mark.parametrize("protocol", ["ABY3", "SEMI2K", "CHEETAH"])
def test_what_spu_makes_passes(protocol, ring):
    config = Config(protocol, ring, 10)
    passed = set()
    for dtype, visibility, shape in itertools.product(shares.ELEMENTS.values(), ("secret", "public"), SHAPES):
        array = m.Array(shape, dtype, visibility)
        if ring == "FM32" and dtype.endswith("int64"):
            with pytest.raises(ValueError, match=f"its dtype is {dtype}, which does not fit into ring FM32"):
                shares.num_bytes(array, config)
            continue
        every = made(shape, dtype, visibility, config)
        for share in every:
            shares.check(share, array, config)
            shares.check(share, None, config)
            assert shares.described(share.meta) == array
            assert sum(map(len, share.chunks)) - 8 * len(share.chunks) <= shares.num_bytes(array, config)
        shares.check_result(every, array, config)
        passed.add(dtype)
    assert len(passed) == (9 if ring == "FM32" else 11)


def test_what_spu_parts_into_chunks_passes(monkeypatch):
    spu = load_spu()
    settings = CONFIG.runtime_config()
    count = shares.CHUNK_BYTES // 16
    for more in (0, 1):
        array = np.zeros(count + more, np.int8)
        assert spu.Io(3, settings).get_share_chunk_count(array, spu.Visibility.VIS_SECRET) == 1 + more
    monkeypatch.setattr(shares, "CHUNK_BYTES", 100)
    settings.share_max_chunk_size = 100
    share = m.Share.pack(spu.Io(3, settings).make_shares(np.ones(15, np.float32), spu.Visibility.VIS_SECRET)[0])
    assert len(share.chunks) == 3
    shares.check(share, None, CONFIG)
    with pytest.raises(ValueError, match="it has 2 chunks, not 3 with 240 bytes"):
        shares.check(m.Share(share.meta, share.chunks[:2]), None, CONFIG)
    with pytest.raises(ValueError, match="its chunk's offset is 200, not 0"):
        shares.check(m.Share(share.meta, share.chunks[::-1]), None, CONFIG)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (meta((1, 4)), r"its shape is \(1, 4\), not \(2, 4\)"),
        (meta((4, 2)), r"its shape is \(4, 2\), not \(2, 4\)"),
        (meta(()), r"its shape is \(\), not \(2, 4\)"),
        (meta(WRAPPED), r"its shape is \(4294967296, 4294967296\), not \(2, 4\)"),
        (meta((-2, -4)), r"its shape is \(-2, -4\), not \(2, 4\)"),
        (meta((1,) * 5000), r"its shape is \(1, 1, 1, 1, 1, 1, \.\.\.\), not \(2, 4\)"),
        (meta(data_type=6), "its data type is 'DT_I32', not 'DT_F32'"),
        (meta(data_type=12), "its data type is 'DT_F64', not 'DT_F32'"),
        (meta(data_type=99), "its data type is '99', not 'DT_F32'"),
        (meta(is_complex=True), "its complex is True, not False"),
        (meta(visibility=2, storage_type="Pub2k<FM64>"), "its visibility is 'VIS_PUBLIC', not 'VIS_SECRET'"),
        (meta(visibility=3, storage_type="Priv2k<FM64,0>"), "its visibility is 'VIS_PRIVATE', not 'VIS_SECRET'"),
        (
            meta(storage_type="aby3.BShr<PT_U64,64>"),
            "its storage type is 'aby3.BShr<PT_U64,64>', not 'aby3.AShr<FM64>'",
        ),
        (meta(storage_type="aby3.AShr<FM32>"), "its storage type is 'aby3.AShr<FM32>', not 'aby3.AShr<FM64>'"),
        (meta(storage_type="x" * 1000), "its storage type is 'x+...x+', not 'aby3.AShr<FM64>'"),
        (meta() + b"\x30\x01", "it is written otherwise than SPU writes it"),
        (meta() + meta()[:2], "it is written otherwise than SPU writes it"),
        (b"", "its data type is 'DT_INVALID', not 'DT_F32'"),
        (b"garbage", "its meta is none that SPU writes"),
        (b"\x2a\x02\xff\xfe", "its meta is none that SPU writes"),
    ],
)
def test_another_meta_is_named(content, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        shares.check(m.Share(content, good().chunks), ARRAY, CONFIG)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "it has 0 chunks, not 1 with 128 bytes"),
        (good().chunks * 2, "it has 2 chunks, not 1 with 128 bytes"),
        ([chunk(128, 0, bytes(64)), chunk(128, 64, bytes(64))], "it has 2 chunks, not 1 with 128 bytes"),
        ([b""], "its announced size is 0, not 128"),
        ([chunk(256, 0, bytes(256))], "its announced size is 256, not 128"),
        ([chunk(256, 0, bytes(128))], "its announced size is 256, not 128"),
        ([chunk(128, 0, bytes(4096))], "its chunk's size is 4096, not 128"),  # SPU writes beyond its memory
        ([chunk(128, 0, bytes(127))], "its chunk's size is 127, not 128"),
        ([chunk(128, 1, bytes(128))], "its chunk's offset is 1, not 0"),
        ([chunk(128, 1 << 63, bytes(128))], "its chunk's offset is 9223372036854775808, not 0"),
        ([good().chunks[0] + b"\x20\x01"], "it is written otherwise than SPU writes it"),
        ([good().chunks[0] * 2], "it is written otherwise than SPU writes it"),
        ([b"\xff" * 140], "it has a chunk that is none that SPU writes"),
    ],
)
def test_other_chunks_are_named(content, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        shares.check(m.Share(meta(), content), ARRAY, CONFIG)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (meta(WRAPPED), r"its shape is \(4294967296, 4294967296\), which no array has that is shared"),
        (meta((0, *WRAPPED)), r"its shape is \(0, 4294967296, 4294967296\), which no array has that is shared"),
        (meta((-1,)), r"its shape is \(-1,\), which no array has that is shared"),
        (meta((1,) * 33), r"its shape is \(1, 1, .*\), which no array has that is shared"),
        (meta((2, 5)), "its announced size is 128, not 160"),
        (meta(data_type=10), "its data type is DT_F16, not one of DT_I1, .* DT_F64"),
        (meta(is_complex=True), "its data type is complex DT_F32, not one of DT_I1, .* DT_F64"),
        (meta(visibility=3, storage_type="Priv2k<FM64,0>"), "its visibility is 'private', not one of secret, public"),
        (meta(visibility=2), "its storage type is 'aby3.AShr<FM64>', not 'Pub2k<FM64>'"),
    ],
)
def test_what_an_owner_stores_must_be_of_some_array(content, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        shares.check(m.Share(content, good().chunks), None, CONFIG)


# ---------------------------------------------------------------------------------------------------------------- fuzz


def refusal(share: m.Share, array: m.Array | None) -> str:
    """Why it is refused, in one line; empty if it is not."""
    try:
        shares.check(share, array, CONFIG)
    except ValueError as error:
        return str(error)
    return ""


def test_what_passes_of_anything_is_what_spu_makes():
    chance = random.Random(0)
    right = good()
    passed = described = 0
    for _ in range(1500):
        share = hostile(chance)
        reasons = refusal(share, ARRAY), refusal(share, None)
        assert all(len(reason) < 300 and reason.isprintable() for reason in reasons)
        if not reasons[0]:
            assert share.meta == right.meta
            assert [len(content) for content in share.chunks] == [len(content) for content in right.chunks]
            passed += 1
        if not reasons[1]:
            array = shares.described(share.meta)
            one = made(array.shape, array.dtype, array.visibility)[0]
            assert share.meta == one.meta
            assert [len(content) for content in share.chunks] == [len(content) for content in one.chunks]
            described += array != ARRAY
    assert passed > 25  # so that it would be seen if all were refused
    assert described > 5


# -------------------------------------------------------------------------------------------------------------- results


def results(parties: secure.InProcess, fn: Callable[..., Any], x: np.ndarray) -> list[m.Share]:
    """Every party's share of what a function gives."""
    seen = []
    fetch = parties.fetch
    try:
        parties.fetch = lambda name: seen.append(fetch(name)) or seen[-1]
        secure.jit(fn, parties=parties)(x)
    finally:
        parties.fetch = fetch
    return [m.Share.pack(share) for share in seen[-1]]


@pytest.mark.parametrize("protocol", ["ABY3", "SEMI2K", "CHEETAH"])
def test_results_pass_however_they_are_stored(group, protocol):
    import jax.numpy as jnp

    parties = group(protocol)
    x = np.array([0.5, 1.5, -2], np.float32)
    functions = {
        "float32": lambda v: v * v,
        "bool": lambda v: v > 0,
        "int32": lambda v: (v > 0).astype(jnp.int32),
    }
    for dtype, fn in functions.items():
        every = results(parties, fn, x)
        shares.check_result(every, m.Array((3,), dtype), parties.config)
        shares.check_result(every, None, parties.config)
        with pytest.raises(ValueError, match=rf"^party 0's share: it is {dtype} \(3,\), not {dtype} \(4,\)$"):
            shares.check_result(every, m.Array((4,), dtype), parties.config)
    every = results(parties, lambda _: jnp.ones(2), x)
    assert shares.described(every[0].meta).visibility == "public"
    shares.check_result(every, m.Array((2,), "float32"), parties.config)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: m.Share(meta((1, 4)), s.chunks), r"its shape is \(1, 4\), not \(2, 4\)"),
        (lambda s: m.Share(s.meta, []), r"it has 0 bytes for float32 \(2, 4\)"),
        (lambda s: m.Share(s.meta, [chunk(128, 0, bytes(4096))]), "its chunk's size is 4096, not 128"),
        (lambda s: m.Share(s.meta, [chunk(1 << 60, 0, bytes(128))]), "it has 1 chunks, not 8589934592 with .* bytes"),
        (lambda s: m.Share(b"garbage", s.chunks), "its meta is none that SPU writes"),
        (lambda s: m.Share(s.meta, [b"\xff" * 9]), "it has a chunk that is none that SPU writes"),
    ],
)
def test_a_party_that_answers_with_something_else_is_named(change, reason):
    every = made((2, 4), "float32")
    with pytest.raises(ValueError, match=f"^party 2's share: {reason}$"):
        shares.check_result([*every[:2], change(every[2])], ARRAY, CONFIG)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            meta(storage_type="semi2k.AShr<FM64>"),
            "its storage type is 'semi2k.AShr<FM64>', which is none of secret values",
        ),
        (meta(storage_type="aby3.AShr<FM32>"), "its storage type is 'aby3.AShr<FM32>', which is none of secret values"),
        (meta(visibility=2), "its storage type is 'aby3.AShr<FM64>', which is none of public values"),
        (meta(visibility=3), "its visibility is 'private', not one of secret, public"),
        (meta(WRAPPED), r"its shape is \(4294967296, 4294967296\), which no array has that is shared"),
        (meta(data_type=6), r"it is int32 \(2, 4\), not float32 \(2, 4\)"),
    ],
)
def test_parties_that_all_answer_with_something_else_are_refused(content, reason):
    with pytest.raises(ValueError, match=f"^party 0's share: {reason}$"):
        shares.check_result([m.Share(content, good().chunks)] * 3, ARRAY, CONFIG)
