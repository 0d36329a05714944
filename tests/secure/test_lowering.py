"""What SPU by itself computes otherwise than JAX: right, or refused by name."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from flaxmpc import secure

PROTOCOLS = ("REF2K", "SEMI2K", "ABY3")


def array(dtype):
    return lambda *values: np.array(values, dtype)


f32, i8, i16, i32, u8, u16, u32, flags = map(
    array, ("float32", "int8", "int16", "int32", "uint8", "uint16", "uint32", "bool")
)
KEY = jax.random.key(0)
MANY = i32(-(2**31), 2**31 - 1, -(2**31) + 1, 20_000_000, 10, -10, 6, 5, 0, -1)
DIVISORS = (1, -1, 2, 3, -3, 7, 10, 641, 1_000_003, 2**30, 2**31 - 1, -(2**31), 0)
QUOTIENTS = (f32(6, 7.5, -7.5, 9, 5, 100, 1e4, 0.5, -6, 20000.25), f32(3, 2.5, 2.5, -3, -2, 0.25, 8, 0.5, 3, 0.75))


def operations(*functions):
    """The results of several functions, as int32: on what they give is computed further."""
    return lambda *args: [jnp.asarray(f(*args)).astype(jnp.int32) for f in functions]


UNSIGNED = operations(
    lambda a, b: a - b,
    lambda a, b: a + b,
    lambda a, b: a * b,
    lambda a, b: -a,
    lambda a, b: ~a,
    lambda a, b: a << 2,
    lambda a, b: a >> 2,
    lambda a, b: a // b,
    lambda a, b: a % b,
    lambda a, b: a**3,
    lambda a, b: jnp.cumsum(a),
    lambda a, b: a.sum(dtype=a.dtype),
    lambda a, b: jnp.dot(a, b),
    lambda a, b: jnp.maximum(a, b) & b,
    lambda a, b: lax.fori_loop(0, 3, lambda i, x: x * b + a, a),
)

RAMP = np.linspace(-2, 1, 12, dtype=np.float32).reshape(4, 3)
SQUARES = [jnp.asarray(np.array([[0, 1], [2, 3]], np.float32) + i) for i in range(3)]


def in_turns(step, turns=2):
    """Every way to call a function of what it gave before, in a loop or a branch."""
    return lambda x: [
        lax.scan(lambda c, _: (step(c), 0), x, None, turns)[0],
        lax.fori_loop(0, turns, lambda _, c: step(c), x),
        lax.while_loop(lambda state: state[0] < turns, lambda state: (state[0] + 1, step(state[1])), (0, x))[1],
        lax.cond(x.sum() > -100, step, lambda c: c, x),
        lax.switch(jnp.int32(x.sum() > 100), [step, lambda c: c], x),
        lax.scan(lambda c, _: (lax.cond(c.sum() > -100, step, lambda c: c, c), 0), x, None, turns)[0],
    ]


def through_turns(x):
    """Constants that a loop starts from, or goes through."""
    rows = jnp.stack(SQUARES)
    return [
        *(lax.scan(lambda c, _: (c.T + x, c), SQUARES[0], None, turns) for turns in (1, 3)),
        *(
            lax.while_loop(
                lambda state, n=n: state[0] < n, lambda state: (state[0] + 1, state[1].T + x), (0, SQUARES[0])
            )
            for n in (1, 2)
        ),
        *(
            lax.scan(lambda c, row: (c @ row.T * 0.3, c + row.T), x, rows, reverse=reverse, unroll=unroll)
            for unroll in (1, 2, 3)
            for reverse in (False, True)
        ),
        lax.map(lambda row: row.T @ x, rows),
        lax.cond(x.sum() > -100, lambda c, square: c + square.T, lambda c, square: c - square.T, x, SQUARES[1]),
        jax.grad(lambda c: lax.scan(lambda c, row: (jnp.tanh(c @ row.T * 0.3), 0), c, rows)[0].sum())(x),
    ]


CASES = {
    # what depends on no argument
    "uniform": (lambda x: x + jax.random.uniform(jax.random.key(0), x.shape), f32(1, 2, 3)),
    "normal": (lambda x: x + jax.random.normal(jax.random.PRNGKey(1), x.shape), f32(1, 2, 3)),
    "bernoulli": (lambda x: x * jax.random.bernoulli(KEY, 0.5, x.shape), f32(1, 2, 3)),
    "randint": (lambda x: x + jax.random.randint(KEY, x.shape, 0, 1000), i32(1, 2, 3)),
    "permutation": (lambda x: jax.random.permutation(KEY, x), f32(1, 2, 3, 4, 5)),
    "choice": (lambda x: jax.random.choice(KEY, x, (4,)), f32(1, 2, 3, 4, 5)),
    "dropout": (
        lambda x: nn.Dropout(0.5, deterministic=False).apply({}, x, rngs={"dropout": KEY}),
        np.ones((4, 5), np.float32),
    ),
    "random, all in a loop": (
        lambda x: (
            x + lax.scan(lambda c, k: (c + jax.random.uniform(k), None), jnp.zeros(()), jax.random.split(KEY, 3))[0]
        ),
        f32(1),
    ),
    "bits of a constant": (lambda x: x * jnp.frexp(jnp.float32(48.0))[0], f32(1, 2)),
    # integers of a width
    "uint8": (UNSIGNED, u8(3, 250, 255, 0), u8(5, 9, 255, 7)),
    "uint16": (UNSIGNED, u16(3, 60000, 65535, 0), u16(5, 9, 65535, 7)),
    "int8": (UNSIGNED, i8(-128, 100, 127, -3), i8(-1, 100, -128, 7)),
    "int16": (UNSIGNED, i16(-(2**15), 20000, 3, -3), i16(-1, 20000, -5, 7)),
    "uint32": (
        lambda a, b: [x.astype(jnp.float32) / 2**10 for x in (a - b, a + b, a * b, -a, a // b, a % b, ~a)],
        u32(3, 2**32 - 1, 2**31, 7),
        u32(5, 3, 2**32 - 1, 7),
    ),
    "a hash": (lambda x: (x.astype(jnp.uint32) * jnp.uint32(2654435761)) >> 16, i32(1, 2, 12345, -7)),
    "a hash of int32": (lambda x: (x * jnp.int32(-1640531535)) >> 16, i32(1, 2, 12345, -7)),
    "a generator": (lambda x: x * 1103515245 + 12345, i32(12345, -7)),
    "shift_right_logical": (lambda x: [lax.shift_right_logical(x, k) for k in (0, 1, 31)], i32(-7, 9, -(2**31))),
    "shift_right_arithmetic": (lambda x: [x >> k for k in (0, 1, 31)], i32(-7, 9, -(2**31))),
    "shift_left": (lambda x: [x << k for k in (0, 1, 31)], i32(-7, 9, -(2**31))),
    "a narrower type": (
        lambda x: [x.astype(t).astype(jnp.float32) for t in ("uint8", "int8", "uint16", "int16", "uint32")],
        i32(300, -1, 200, 70000),
    ),
    "the sign bit": (lambda x: x.astype(jnp.int32) > 0, u32(2**32 - 1, 5)),
    "bits of integers": (lambda x: lax.bitcast_convert_type(x, jnp.uint32) > 5, i32(-1, 7, 3)),
    # exact quotients
    "int32": (lambda a, b: [lax.div(a, b), lax.rem(a, b)], MANY, i32(1, -1, 3, 7, 10, 10, 3, 0, 0, 2)),
    "constant divisors": (lambda a: [(lax.div(a, np.int32(d)), lax.rem(a, np.int32(d))) for d in DIVISORS], MANY),
    "divmod": (lambda a: [jnp.divmod(a, 3), a // 7, a % -7], i32(20_000_000, 2**31 - 1, -7)),
    "a counter": (lambda x: lax.fori_loop(0, 9, lambda i, y: y + (i // 2) * (i % 3) + (i >> 1), x), i32(1, 2)),
    "floats": (lambda a, b: [a // b, a % b, jnp.divmod(a, b), jnp.fmod(a, b), lax.rem(a, b)], *QUOTIENTS),
    "floats by a constant": (lambda a: [(a // d, a % d) for d in (3.0, 1.0, 0.25, -2.5)], QUOTIENTS[0]),
    "floats that are always a constant": (lambda a: jnp.where(True, 7.5, a) % jnp.abs(a), f32(7, -3)),
    "jumps at exact places": (
        lambda x: [jnp.floor(x), jnp.ceil(x), jnp.round(x), lax.round(x), jnp.trunc(x), x.astype(int), jnp.sign(x)],
        f32(0.5, 1.5, 2.5, -0.5, -1.5, 2, -2, 0, 0.25, -3.75),
    ),
    # order
    "argsort": (jnp.argsort, i32(3, 1, 2, 1, 3, 1)),
    "argsort of floats": (jnp.argsort, f32(3, 1, 2, 1, 3, 1)),
    "argsort of bools": (jnp.argsort, flags(True, False, True, False, False)),
    "argsort, descending": (lambda x: jnp.argsort(x, descending=True), i32(3, 1, 2, 1, 3)),
    "argsort of columns": (lambda x: jnp.argsort(x, axis=0), f32(1, 5, 1, 2, 0, 5).reshape(3, 2)),
    "sort of pairs": (lambda x, y: lax.sort((x, y, 2 * y), num_keys=1), f32(2, 1, 2, 1), f32(1, 2, 3, 4)),
    "lexsort": (lambda x, y: jnp.lexsort((x, y)), i32(3, 1, 2, 1, 3), i32(1, 1, 0, 0, 0)),
    "unique": (
        lambda x: jnp.unique(x, return_index=True, return_inverse=True, return_counts=True, size=4),
        i32(3, 1, 2, 1, 3),
    ),
    "top_k": (lambda x: lax.top_k(x, 3), f32(1, 5, 5, 2, 2, 5, 0, 2).reshape(2, 4)),
    "top_k of uint8": (lambda x: lax.top_k(x, 2), u8(3, 255, 255)),
    "top_k, values alone": (lambda x: lax.top_k(x, 2)[0], f32(3, 1, 3)),
    "approx_top_k": (
        lambda x: [lax.approx_max_k(x, 2), lax.approx_min_k(x, 2, 0)],
        f32(0, 2, 0, 2, 1, 0).reshape(2, 3),
    ),
    "argmax": (lambda x: [jnp.argmax(x), jnp.argmin(x)], f32(1, 3, 1, 3, 1)),
    "argmax of bools": (lambda x: [jnp.argmax(x), jnp.argmin(x)], flags(False, True, True, False)),
    "cumlogsumexp": (lambda x: [lax.cumlogsumexp(x), lax.cumlogsumexp(x, 0, reverse=True)], f32(-2.5, 0.3, 1, -1)),
    # powers that are as good as 0, and their neighbours
    "powers": (
        lambda x: [x**1.5, x**0.1, x**2.2, lax.pow(x, jnp.full_like(x, 5.0)), x ** f32(0.1, 1, 3.5, 7, 0, 0.5, 2.5)],
        f32(0, *(2.0**k for k in (-18, -16, -13, -10, -3)), 1.5),
    ),
    "powers below 1": (lambda x: [x**-4.0, x**-1.5, x ** f32(-9, -0.1, -40)], f32(3, 200, 10)),
    "powers of negative numbers": (lambda x: [lax.pow(x, k * jnp.ones_like(x)) for k in (2.0, 3.0)], f32(-2, -0.01, 0)),
    "powers with secret exponents": (
        lambda x, y: x**y,
        f32(0, 0, 0, 1e-3, 0.01, 0.5, 0.5, 2, 2, 300, 3),
        f32(1.5, 0.1, 3, 4, 5, 33, 0, -33, 3, -5, 0),
    ),
    "powers with whole secret exponents": (lambda x, k: lax.pow(x, k), f32(0, 0.5, 2, -2, 3), i32(3, 33, -40, 3, 0)),
    "a constant to a secret power": (lambda x: [2**x, 0.5**-x], f32(-33, -32, -100, -1, 3)),
    # XLA reorders the dimensions of these constants
    "a constant beside three dimensions": (
        lambda x: [
            jnp.einsum("cl,crk->lrk", RAMP, x),
            jnp.einsum("crk,lc->rkl", x, RAMP.T),
            jnp.einsum("chd,bc->bhd", np.stack([RAMP, 2 * RAMP], 1), x[:, 0].T),
            jnp.einsum("crk,ck->k", x, RAMP[:, :2]),
        ],
        np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 3, 2),
    ),
    "an image of another size": (
        lambda x: jax.image.resize(x, (1, 5, 3), "bilinear"),
        np.linspace(-1, 1, 6, dtype=np.float32).reshape(1, 3, 2),
    ),
    # nor are constants in loops and branches to be read in another order
    "a constant in turns": (in_turns(lambda c: c + SQUARES[0].T), np.eye(2, dtype=np.float32)),
    "a constant in a product in turns": (
        in_turns(lambda c: jnp.einsum("ij,kjl->kil", SQUARES[0], c) * 0.5),
        np.eye(2, dtype=np.float32)[None],
    ),
    "whole constants in turns": (in_turns(lambda c: c + SQUARES[0].astype(int).T), np.eye(2, dtype=np.int32)),
    "flags in turns": (in_turns(lambda c: jnp.where((SQUARES[0] > 1).T, c, -c)), np.eye(2, dtype=np.float32)),
    "a constant of another shape in turns": (
        in_turns(lambda c: c + SQUARES[0].reshape(4)[::-1].reshape(2, 2).T),
        np.eye(2, dtype=np.float32),
    ),
    "constants through turns": (through_turns, np.eye(2, dtype=np.float32)),
    # what ABY3 cannot do with bits
    "a bit at a secret place": (lambda x, i: [x[i], lax.dynamic_slice(x, (i,), (1,))], flags(False, True), i32(1)[0]),
    # what ends the process by itself
    "checkpoint": (jax.grad(lambda x: jax.checkpoint(jnp.sin)(x).sum()), f32(1, 2)),  # pyright: ignore[reportPrivateImportUsage]
    "remat": (
        lambda x: nn.remat(nn.Dense)(3).apply({"params": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}, x),
        f32(1, 2),
    ),
    "gradient of a grouped convolution": (
        jax.grad(lambda w, x: (lax.conv_general_dilated(x, w, (1,), "SAME", feature_group_count=2) ** 2).sum()),
        np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 1, 3),
        np.linspace(-1, 2, 20, dtype=np.float32).reshape(2, 2, 5),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_as_in_jax(group, name):
    fn, *args = CASES[name]
    want = jax.tree.map(np.asarray, jax.jit(fn)(*args))
    for protocol in PROTOCOLS:
        got = secure.jit(fn, parties=group(protocol))(*args)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for ours, exact in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert (ours.dtype, ours.shape) == (exact.dtype, exact.shape)
            np.testing.assert_allclose(
                ours, exact, atol=0 if exact.dtype.kind in "biu" else 2e-3, rtol=1e-6, err_msg=protocol
            )


def random_product(rng) -> Any:
    """Two arrays, and the dimension numbers of a product of them: batch, contracted and free ones in any order."""
    counts = dict(zip("bclr", rng.integers(0, (2, 3, 3, 3)), strict=True))
    sides = [[f"{kind}{i}" for kind in kinds for i in range(counts[kind])] for kinds in ("bcl", "bcr")]
    sizes = {name: int(rng.integers(1, 4)) for name in {*sides[0], *sides[1]}}
    orders = [list(rng.permutation(side)) for side in sides]
    numbers = [
        tuple(tuple(order.index(f"{kind}{i}") for i in range(counts[kind])) for order in orders) for kind in "cb"
    ]
    arrays = [rng.normal(size=[sizes[name] for name in order]).astype(np.float32) for order in orders]
    return arrays, tuple(numbers)


@pytest.mark.parametrize("constant", [0, 1])
def test_products_with_constants_in_any_order_of_dimensions(group, constant):
    rng = np.random.default_rng(constant)
    products = [random_product(rng) for _ in range(80)]

    def every(operands):
        found = []
        for (arrays, numbers), operand in zip(products, operands, strict=True):
            lhs, rhs = (arrays[0], operand) if constant == 0 else (operand, arrays[1])
            found.append(lax.dot_general(lhs, rhs, numbers))
        return found

    operands = [arrays[1 - constant] for arrays, _ in products]
    for ours, exact in zip(secure.jit(every, parties=group("REF2K"))(operands), jax.jit(every)(operands), strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-3)


@pytest.mark.parametrize("visibility", ["secret", "public"])
@pytest.mark.parametrize("ring", ["FM64", "FM128"])
def test_in_every_ring_and_in_the_clear(ring, visibility):
    """Also for public values: they are held in the ring as well."""
    for name in ("uint8", "int8", "int32", "a hash", "floats", "shift_right_logical", "sort of pairs"):
        fn, *args = CASES[name]
        got = secure.jit(fn, "REF2K", ring=ring, visibility=visibility)(*args)
        for ours, exact in zip(jax.tree.leaves(got), jax.tree.leaves(jax.jit(fn)(*args)), strict=True):
            np.testing.assert_allclose(ours, exact, atol=1e-3, err_msg=name)


def test_a_narrow_ring_holds_what_it_can():
    parties = secure.InProcess("REF2K", ring="FM32", fraction_bits=8)
    fn, *args = CASES["uint8"]
    for ours, exact in zip(secure.jit(fn, parties=parties)(*args), jax.jit(fn)(*args), strict=True):
        np.testing.assert_array_equal(ours, exact)
    with pytest.raises(secure.SecureError, match=r"rem .*the exact division of int32 needs a larger ring"):
        secure.jit(lambda x: lax.rem(x, x), parties=parties)(i32(5))
    for power in (lambda x: x**1.5, jnp.cbrt):
        with pytest.raises(secure.SecureError, match=r"cannot compute pow .*need a larger ring than FM32$"):
            secure.jit(power, parties=parties)(f32(0.5))
    with pytest.raises(secure.SecureError, match=r"add .*uint32 has numbers that the ring FM32 cannot hold"):
        secure.jit(lambda x: x + 1, parties=parties)(u32(5))


secure_division = secure.jit(lambda a, b: [a // b, a % b], "REF2K")


@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1).filter(bool)),
        min_size=8,
        max_size=8,
    )
)
def test_random_quotients(pairs):
    a, b = np.array(pairs, np.int32).T
    for ours, exact in zip(secure_division(a, b), (a // b, a % b), strict=True):
        np.testing.assert_array_equal(ours, exact.astype(np.int32))


secure_remainder = secure.jit(lambda a, b: [a // b, a % b], "REF2K")


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(-(2**20), 2**20), st.integers(-(2**12), 2**12).filter(bool)), min_size=8, max_size=8)
)
def test_random_quotients_of_floats(pairs):
    """Numbers that fixed point has exactly, so quotients that are whole, too."""
    a, b = np.array(pairs).T / np.array([[64.0], [64.0]])
    whole = np.abs(a / b) < 2**13
    quotient, remainder = secure_remainder(a.astype(np.float32), b.astype(np.float32))
    np.testing.assert_array_equal(remainder[whole], (a % b)[whole])
    np.testing.assert_array_equal(quotient[whole], (a // b)[whole])


@settings(max_examples=30)
@given(st.lists(st.integers(-2, 2), min_size=7, max_size=7))
def test_random_ties(values):
    x = np.array(values, np.float32)
    np.testing.assert_array_equal(secure_argsort(x), np.argsort(x, kind="stable"))


secure_argsort = secure.jit(jnp.argsort, "REF2K")


REFUSED = {
    "a secret key": (lambda key: jax.random.uniform(key, (2,)), "random_wrap", u32(0, 1)),
    "a key of each turn": (
        lambda x: lax.scan(lambda c, k: (c + jax.random.uniform(k), None), x, jax.random.split(KEY, 3))[0],
        "random_bits",
        f32(1),
    ),
    "bits of a float": (lambda x: lax.bitcast_convert_type(x, jnp.int32), "bitcast_convert_type", f32(1)),
    "frexp": (jnp.frexp, "bitcast_convert_type", f32(1)),
    "signbit": (jnp.signbit, "bitcast_convert_type", f32(1)),
    "nextafter": (lambda x: jnp.nextafter(x, x + 1), "nextafter", f32(1)),
    "bytes of an integer": (lambda x: lax.bitcast_convert_type(x, jnp.uint8), "bitcast_convert_type", i32(1)),
    "secret shift": (lambda x, k: x << k, "shift_left", i32(1), i32(2)),
    "shift beyond": (lambda x: x >> 32, "shift_right_arithmetic", i32(1)),
    "clz": (lax.clz, "clz", i32(1)),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 5, 10), "reduce_precision", f32(1)),
    "debug.print": (lambda x: [jax.debug.print("{}", x), x][1], "debug_(callback|print)", f32(1)),
    "debug.print of nothing": (lambda x: [jax.debug.print("here"), x][1], "debug_(callback|print)", f32(1)),
    "pure_callback": (lambda x: jax.pure_callback(np.sin, x, x), "pure_callback", f32(1)),
    "rng_uniform": (lambda x: x + lax.rng_uniform(0.0, 1.0, (1,)), "rng_uniform", f32(1)),
    "float16": (lambda x: x.astype(jnp.float16) * 2, "convert_element_type", f32(1)),
    "bfloat16": (lambda x: x.astype(jnp.bfloat16) * 2, "convert_element_type", f32(1)),
    "a divisor too small": (lambda x: x % np.float32(1e-7), "rem", f32(1)),
    "a remainder by 0": (lambda x: x // 0.0, "rem", f32(1)),
    "in a branch": (lambda x: lax.cond(x[0] > 0, lambda: lax.clz(x), lambda: x), "clz", i32(1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_line(group, name):
    fn, primitive, *args = REFUSED[name]
    with pytest.raises(secure.SecureError, match=rf"^SPU cannot compute {primitive} \(test_lowering.py:\d+\): [^\n]+$"):
        secure.jit(fn, parties=group("ABY3"))(*args)


def test_what_is_known_is_no_part_of_the_program(group):
    """Of a mask of zeros the program holds one zero; of random numbers all, and no code that makes them."""
    program = secure.jit(lambda x: x + jnp.zeros((64, 64)).at[0].set(1.0)[1:], parties=group("REF2K")).program(f32(1))
    assert len(program) < 40_000
    text = secure.jit(lambda x: x + jax.random.normal(KEY, (3,)), parties=group("REF2K")).program(f32(1))
    assert "shift" not in text
    assert "while" not in text


def test_constants_of_equal_shape_are_other_programs(group):
    """The program's text, by which it is kept, holds large constants whole."""
    constants = [np.random.default_rng(seed).random((64, 64), np.float32) for seed in (0, 1)]
    x = np.ones((64, 64), np.float32)
    for constant in constants:
        np.testing.assert_allclose(
            secure.jit(lambda x, c=constant: x * c, parties=group("REF2K"))(x), constant, atol=1e-4
        )


def _uniform_in_turns(x):
    return lax.scan(lambda carry, key: (carry + jax.random.uniform(key), None), x, jax.random.split(KEY, 3))[0]


def test_the_line_is_of_this_function_and_of_none_that_jax_traced_before(group):
    """JAX keeps what it traced of `uniform`, with the lines of whoever asked first."""
    jax.jit(lambda key: jax.random.uniform(key, (), jnp.float32)).trace(KEY)
    line = _uniform_in_turns.__code__.co_firstlineno + 1
    with pytest.raises(secure.SecureError, match=rf"\(test_lowering\.py:{line}\)"):
        secure.jit(_uniform_in_turns, parties=group("REF2K"))(np.float32(1))
