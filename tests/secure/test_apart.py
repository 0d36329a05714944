"""Products and divisions are computed as they were written: no number overflows that nobody wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flaxmpc import secure

THOUSAND, WHOLE = np.full(1000, 100.0, np.float32), np.array([0.125, 0.1251, 0.1252], np.float32)


def fifth(scale):
    """(s x)^5 by two squares and a product, s beside x each time."""
    return lambda x: jnp.square(jnp.square(x * scale)) * (x * scale)


# Each has numbers of at most 2^26 as it is written, and larger ones as XLA would write it.
CASES = {
    "a quotient's quotient": (lambda a, b, c: (a / b) / c, (3e5, 1e4, 1e4)),
    "a quotient of quotients": (lambda a, b, c, d: (a / b) / (c / d), (1e5, 1e5, 1e5, 1e5)),
    "by a quotient": (lambda a, b, c: a / (b / c), (1e4, 1e5, 1e5)),
    "in a loop": (lambda a, b: jax.lax.fori_loop(0, 3, lambda i, x: x + (a / b) / b, a * 0), (3e5, 1e4)),
    "means": (lambda a, b: jnp.mean(a) * jnp.mean(b), (THOUSAND, THOUSAND)),
    "constants of one number": (fifth(0.125), (200.0,)),
    "constants of as many numbers": (fifth(WHOLE), (np.full(3, 200.0, np.float32),)),
    "constants, one product": (lambda a, b: (a * 1e-3) * (b * 1e-3), (1e5, 1e5)),
    "constants, barrier": (lambda a, b: jnp.stack(jax.lax.optimization_barrier((a * 0.5, b))).prod(0), (1e3, 1e3)),
    "small constants": (lambda a: (a * 1e-3) * 1e-3, (1e5,)),
    "a constant that is smaller than a unit": (lambda a: a * 1e-6, (1e6,)),
}


@pytest.mark.parametrize("protocol", ["REF2K", "SEMI2K", "ABY3"])
@pytest.mark.parametrize("shape", [(), (1, 1), (2,)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_as_it_is_written(group, name, shape, protocol):
    f, args = CASES[name]
    args = [np.full(shape, x, np.float32) if isinstance(x, float) else x for x in args]
    out = np.asarray(secure.jit(f, parties=group(protocol))(*args))
    np.testing.assert_allclose(out, f(*args), rtol=0.02, atol=2**-16)


OPERATIONS = {"/": np.divide, "*": np.multiply, "+": np.add}
NUMBERS = st.sampled_from([0.001, 0.125, 0.5, 3.0, 40.0, 1e3, 3e4])
TREES = st.recursive(
    st.one_of(st.tuples(st.just("argument"), NUMBERS), st.tuples(st.just("constant"), NUMBERS)),
    lambda inner: st.tuples(st.sampled_from(list(OPERATIONS)), inner, inner),
    max_leaves=7,
)


def error(tree, arguments, seen):
    """The value of a tree, and how far fixed point may be from it. `seen` gets all values."""
    kind, *inner = tree
    unit = 2.0**-18
    if kind in ("argument", "constant"):
        if kind == "argument":
            arguments.append(inner[0])
        seen.append(inner[0])
        return inner[0], unit
    (a, da), (b, db) = (error(each, arguments, seen) for each in inner)
    value = float(OPERATIONS[kind](a, b))
    seen.append(value)
    # Two units of each truncation; a quotient's error is that of its reciprocal, to a few bits, times the dividend.
    own = {"+": da + db, "*": abs(a) * db + abs(b) * da + 2 * unit}
    return value, own[kind] if kind in own else da / b + value / b * db + 16 * unit * (1 + a + value)


def computed(tree, arguments):
    kind, *inner = tree
    if kind == "constant":
        return inner[0]
    if kind == "argument":
        return next(arguments)
    a, b = (computed(each, arguments) for each in inner)
    return a / b if kind == "/" else a * b if kind == "*" else a + b


@settings(max_examples=60)
@given(tree=TREES, shape=st.sampled_from([(), (1,), (3,)]))
def test_random_products_and_quotients(tree, shape):
    arguments, seen = [], []
    value, bound = error(tree, arguments, seen)
    assume(arguments)
    assume(max(seen) < 2**24 and min(seen) > 2**-8)
    out = secure.jit(lambda *xs: computed(tree, iter(xs)), "REF2K")(*(np.full(shape, x, np.float32) for x in arguments))
    np.testing.assert_allclose(np.asarray(out), np.full(shape, value), rtol=1e-6, atol=2 * bound)
