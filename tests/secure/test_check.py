import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import checkpoint as remat  # pyright: ignore[reportPrivateImportUsage]

from flaxmpc import secure
from flaxmpc.data.batches import movie_sentences
from flaxmpc.models import folder as folders
from flaxmpc.models import zoo
from flaxmpc.nn.activation import ACTIVATIONS
from flaxmpc.secure.magnitudes import Instrumented
from flaxmpc.serve.private import SecureClassifier, check

X = np.linspace(-2, 2, 8, dtype=np.float32)


def relative(got, want):
    return np.abs(got - want) / np.maximum(np.abs(want), 1e-3)


# ------------------------------------------------------------------------------------------ the limits are SPU's own

# A function, an argument below its limit and one above, and the operation and quantity that have the limit. Just above
# it, truncating shares may give the right result by chance, as a wrong carry makes up for the bit that was lost. So
# products are taken to 4 times theirs, where nothing of them is left in the ring.
LIMITS = {
    "product": (lambda x: x * x, 0.9 * 2**13, 2.0 * 2**13, "mul result"),
    "product with a constant": (lambda x: x * 1.5, 0.6 * 2**26, 4 / 1.5 * 2**26, "mul result"),
    "sum of products": (lambda x: x[None] @ x[:, None], 0.3 * 2**13, 0.5**0.5 * 2**13, "dot_general result"),
    "power": (lambda x: x**3, 0.9 * 2 ** (26 / 3), 1.5 * 2 ** (26 / 3), "integer_pow result"),
    "rsqrt": (jax.lax.rsqrt, 0.9 * 2**17, 1.2 * 2**17, "rsqrt operand"),
    "sqrt": (jnp.sqrt, 0.9 * 2**17, 1.2 * 2**17, "sqrt operand"),
    "denominator": (lambda x: 2.0**20 / (x + 0.25), 0.9 * 2**18, 2.2 * 2**18, "div denominator"),
    "numerator": (lambda x: x / (0.0 * x + 8.25), 0.9 * 2**25, 4.0 * 2**25, "div numerator"),
    "log": (lambda x: jnp.log(x) - 12.0, 0.9 * 2**19, 2.2 * 2**19, "log operand"),
}


# The same of exponentials, and what they are computed by. "taylor" is off by x^2/512: by a sixth at its limit.
EXPONENTIALS = {
    "large": (lambda x: jnp.exp(x) * 1e-4, 17.9, 24.0, "exp result", {"exp_mode": "pade"}),
    "larger than exact": (jnp.exp, 8.5, 16.0, "exp positive operand by taylor", {"exp_mode": "taylor"}),
    "small": (jnp.exp, -480.0, -520.0, "exp negative operand by taylor", {"exp_mode": "taylor"}),
    "clipped": (jnp.exp, 21.0, 25.0, "exp operand by pade", {"exp_mode": "pade", "fraction_bits": 8}),
    "logistic": (jax.lax.logistic, 480.0, 520.0, "logistic positive operand by taylor", {"exp_mode": "taylor"}),
}


def holds_between(fn, below, above, quantity, f, within, **settings):
    for value, fits in ((below, True), (above, False)):
        x = np.full(8, value, np.float32)
        margins = secure.check(fn, [(x,)], **settings)
        assert (margins.margin_bits > 0) == fits
        if not fits:
            assert f"{margins.worst.primitive} {margins.worst.quantity}" == quantity
        assert (relative(f(x), fn(x)).max() < within) == fits


@pytest.mark.parametrize("name", LIMITS)
def test_on_either_side_of_a_limit_spu_is_right_and_wrong(group, name):
    fn, below, above, quantity = LIMITS[name]
    holds_between(fn, below, above, quantity, secure.jit(fn, parties=group("ABY3")), 0.1)


@pytest.mark.parametrize("name", EXPONENTIALS)
def test_exponentials_have_the_limits_of_what_they_are_computed_by(name):
    fn, below, above, quantity, settings = EXPONENTIALS[name]
    holds_between(fn, below, above, quantity, secure.jit(fn, "ABY3", **settings), 0.17, **settings)


@pytest.mark.parametrize("fn", [jnp.exp, jax.nn.softplus, jax.nn.silu, jax.lax.logistic])
def test_exponentials_are_right_by_default_where_parties_for_models_have_them_wrong(group, fn):
    x = np.array([-1e6, -1000, -600, -30, -10, 0, 10, 16, 600, 1000], np.float32)
    x = x[:8] if fn is jnp.exp else x
    for f in (secure.jit(fn, "ABY3"), secure.jit(fn, parties=group("ABY3"))):
        np.testing.assert_allclose(f(x), fn(x), rtol=2e-3, atol=1e-4)
    assert np.abs(secure.jit(fn, "ABY3", exp_mode=secure.MODEL_EXP_MODE)(x) - fn(x)).max() > 0.9


def test_a_small_ring_has_exponentials_of_one_kind():
    x = np.array([-2.0, 0.0, 1.0], np.float32)
    f = secure.jit(jnp.exp, "REF2K", ring="FM32", fraction_bits=10)  # whose results are the same at every run
    assert f.config.exp_mode == "taylor"
    np.testing.assert_allclose(f(x), np.exp(x), atol=0.1)
    assert secure.check(jnp.exp, [(x,)], ring="FM32", fraction_bits=10).worst.quantity == "positive operand by taylor"
    for refusing in (secure.jit, lambda fn, **settings: secure.check(fn, [(x,)], **settings)):
        with pytest.raises(ValueError, match=r"exp_mode 'pade' is for the ring FM64 with .* not FM32 with 10"):
            refusing(jnp.exp, ring="FM32", fraction_bits=10, exp_mode="pade")


# Of an operand. Left out are those whose error fixed point itself makes: a logarithm of what is nearly 0.
UNARY = {
    **{
        name: getattr(jax.lax, name)
        for name in [
            "exp",
            "exp2",
            "expm1",
            "log",
            "log1p",
            "sinh",
            "cosh",
            "tan",
            "tanh",
            "asin",
            "acos",
            "atan",
            "asinh",
            "acosh",
            "atanh",
            "erf",
            "erfc",
            "erf_inv",
            "lgamma",
            "digamma",
            "sqrt",
            "rsqrt",
            "cbrt",
            "logistic",
            "sin",
            "cos",
            "square",
            "bessel_i0e",
            "bessel_i1e",
        ]
        if hasattr(jax.lax, name)
    },
    "x^0.1": lambda x: x**0.1,
    "x^1.5": lambda x: x**1.5,
    "x^4.": lambda x: jax.lax.pow(x, jnp.full_like(x, 4.0)),
    "x^-1.3": lambda x: x**-1.3,
    "x^-5.": lambda x: jax.lax.pow(x, jnp.full_like(x, -5.0)),
    "2^x": lambda x: jnp.power(2.0, x),
    "x^x": lambda x: jnp.power(x, x),
    "x^3": lambda x: x**3,
    "1/x": lambda x: 1 / x,
    "x/3": lambda x: x / 3,
    "atan2": lambda x: jnp.arctan2(x, 2.0),
    "hypot": lambda x: jnp.hypot(x, 3.0),
    "logaddexp": lambda x: jnp.logaddexp(x, -x),
    "softplus": jax.nn.softplus,
    "silu": jax.nn.silu,
    "selu": jax.nn.selu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "ndtr": jax.scipy.special.ndtr,
    "sinc": jnp.sinc,
}


# Of two.
BINARY = {
    "div": jax.lax.div,
    "rem": jax.lax.rem,
    "pow": jax.lax.pow,
    "atan2": jnp.arctan2,
    "hypot": jnp.hypot,
    "logaddexp": jnp.logaddexp,
    "softmax": lambda x, y: jax.nn.softmax(jnp.stack([x, y]), 0)[0],
    "std": lambda x, y: jnp.std(jnp.stack([x, y]), 0),
}


def silently_wrong(functions, operands, exp_mode):
    """Names and operands where shares are off by more than rounding makes, and `secure.check` has margin left."""
    every = secure.jit(lambda *xs: {name: f(*xs) for name, f in functions.items()}, "ABY3", exp_mode=exp_mode)
    on_shares, found = every(*operands), []
    for name, fn in functions.items():
        exact = np.asarray(fn(*map(jnp.asarray, operands)), np.float64)
        change = np.zeros(exact.shape)
        for steps in itertools.product((-(2.0**-16), 0, 2.0**-16), repeat=len(operands)):
            near = fn(*(jnp.asarray(x) + step for x, step in zip(operands, steps, strict=True)))
            with np.errstate(invalid="ignore"):
                change = np.maximum(change, np.abs(np.asarray(near, np.float64) - exact))
        allowed = 0.01 * np.abs(exact) + 0.006 + 4 * change
        looked_into = Instrumented(fn, tuple(x[0] for x in operands), secure.Config(exp_mode=exp_mode))
        for place in np.flatnonzero(np.isfinite(allowed) & (np.abs(on_shares[name] - exact) > allowed)):
            values = [x[place] for x in operands]
            if min(operation.margin_bits for operation in looked_into(values)) >= 2:
                found.append((name, *map(float, values)))
    return found


@pytest.mark.parametrize("exp_mode", secure.EXP_MODES)
def test_a_value_is_right_or_has_no_margin(exp_mode):
    sizes = np.geomspace(1e-3, 1e7, 31, dtype=np.float32)
    x = np.concatenate([-sizes[::-1], [0], sizes]).astype(np.float32)
    assert not silently_wrong(UNARY, (x,), exp_mode)
    few = np.concatenate([-sizes[::-4], [0], sizes[::4]]).astype(np.float32)
    assert not silently_wrong(BINARY, [each.ravel() for each in np.meshgrid(few, few)], exp_mode)
    always_right = ("tanh", "atan", "asinh", "logistic", "softplus", "silu", "2^x") if exp_mode == "pade" else ()
    for name in always_right:
        few = x[(np.abs(x) < 1e4) & (x < (15 if name == "2^x" else np.inf))]
        assert secure.check(UNARY[name], [(few,)], exp_mode=exp_mode).margin_bits >= 2, name


@pytest.mark.parametrize("fn", [jnp.linalg.cholesky, lambda a: jnp.abs(jnp.linalg.qr(a)[1])])
def test_factors_of_matrices_that_are_too_large_have_no_margin(group, fn):
    matrix = np.array([[5, 1, -2], [1, 4, 0.5], [-2, 0.5, 6]], np.float32)
    for scale, fits in ((1, True), (1e5, False)):
        a = matrix * np.float32(scale)
        assert (secure.check(fn, [(a,)]).margin_bits >= 2) == fits
        assert np.allclose(secure.jit(fn, parties=group("ABY3"))(a), fn(a), atol=1e-2 * scale**0.5) == fits


@pytest.mark.parametrize("fn", [jax.lax.erf, jnp.tanh, jnp.abs, jax.nn.relu, jnp.floor, lambda x: -x, lambda x: x - 1])
def test_what_is_no_product_has_the_range_of_the_encoding(group, fn):
    x = np.array([2.0**40, -(2.0**42), 3.0, -5.0], np.float32)
    assert secure.check(fn, [(x,)]).margin_bits >= 2
    assert relative(secure.jit(fn, parties=group("ABY3"))(x), fn(x)).max() < 0.01


def test_a_larger_ring_has_more_room():
    def margin(ring, bits):
        return secure.check(jnp.square, [(X,)], ring=ring, fraction_bits=bits).margin_bits

    assert margin("FM64", 18) == 24  # 2^26 against 4
    assert margin("FM64", 16) == 28
    assert margin("FM128", 18) == 24 + 64
    assert margin("FM32", 8) == 12


# ------------------------------------------------------------------------------------------------- what it looks at


def test_the_message_names_the_first_operation_that_is_too_large():
    def f(x):
        with jax.named_scope("block.method/block.other"):
            y = x * x
        return y * y

    margins = secure.check(f, [(np.float32(2e4),)])
    assert margins.worst.magnitude == pytest.approx(1.6e17)
    with pytest.raises(secure.OverflowRisk, match=r"block: mul \(\) \(test_check.py:\d+\): result up to 4e\+08, limit"):
        margins.require()
    assert secure.check(f, [(np.float32(60.0),)]).require(2.0).margin_bits == pytest.approx(26 - 4 * math.log2(60))
    with pytest.raises(secure.OverflowRisk, match=r"mul .* 2\.4 bits of margin, fewer than 3"):
        secure.check(f, [(np.float32(60.0),)]).require(3.0)


def test_all_calls_are_looked_into():
    @jax.custom_jvp
    def cube(x):
        return x * x * x

    cube.defjvp(lambda primals, tangents: (cube(*primals), tangents[0]))

    def f(x):
        def turn(carry, w):
            return carry * w, jax.jit(cube)(w)

        y, cubes = jax.lax.scan(turn, x, jnp.array([2.0, 30.0, 4.0]))
        z = jax.lax.cond(x.sum() > 0, lambda: y * 3.0, lambda: y * 5.0 * y)
        w = jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, remat(cube)(s[1])), (0, z / 1e3))
        return w[1], cubes

    margins = secure.check(f, [(np.ones(3, np.float32),)])
    magnitudes = [op.magnitude for op in margins.operations if op.primitive == "mul"]
    carry, square, third, taken, square_in_loop, third_in_loop = (m for m in magnitudes if m > 0)
    assert (carry, square, third, taken) == (240.0, 900.0, 27000.0, 720.0)
    assert (square_in_loop, third_in_loop) == pytest.approx((0.72**2, 0.72**3))  # the first turn's are the largest


def test_all_calls_are_looked_into_however_they_grow():
    margins = secure.check(lambda x: jax.lax.fori_loop(0, 5, lambda i, y: y * y, x), [(np.float32(2.0),)])
    assert [op.magnitude for op in margins.operations if op.primitive == "mul"] == [2.0**32]


@pytest.mark.parametrize("name", ["gelu_puma", "gelu_bumblebee", "gelu_bolt", "gelu_secformer", "gelu_shaft", "gelu"])
def test_what_a_selection_drops_may_overflow(group, name):
    """Far outside its interval a piece of these overflows, but is not used."""
    part = ACTIVATIONS.resolve(name)
    x = np.array([-5000.0, -1.0, 2.0, 5000.0], np.float32)
    assert secure.check(part, [(x,)]).margin_bits > 2
    assert np.abs(secure.jit(part, parties=group("ABY3"))(x) - part(jnp.asarray(x))).max() < 0.5


def test_what_a_selection_drops_is_followed_through_what_only_moves_numbers():
    """Stacked, reshaped, summed or multiplied by a matrix: what is dropped later still counts for nothing."""
    matrix = jnp.array([[1.0, 2.0], [3.0, 4.0]])

    def f(x, bound):
        pieces = (matrix @ jnp.stack([x**4, x**6]).reshape(2, -1)).reshape(2, *x.shape)
        kept = jnp.where(jnp.stack([x, x]) < bound, pieces.transpose(0, 2, 1).transpose(0, 2, 1), 0.0)
        return kept[0] + kept.sum(0)

    x = np.array([[1.0, 5000.0], [2.0, 3.0]], np.float32)
    assert secure.check(f, [(x, np.float32(100.0))]).margin_bits > 2
    assert secure.check(f, [(x, np.float32(1e4))]).margin_bits < 0


def test_what_a_selection_keeps_may_not(group):
    def f(x):
        return jnp.where(x > 1000.0, 1.0, x**4)

    assert secure.check(f, [(np.float32(5000.0),)]).margin_bits > 2
    assert secure.check(f, [(np.float32(150.0),)]).margin_bits < 0
    got = secure.jit(f, parties=group("ABY3"))(np.array([5000.0, 150.0], np.float32))
    assert got[0] == 1.0
    assert relative(got[1], 150.0**4) > 0.5


def test_a_value_that_is_not_finite_has_no_margin():
    margins = secure.check(lambda x: jnp.log(x) * 0.0, [(np.float32(0.0),)])
    assert margins.margin_bits == -math.inf
    assert json.loads(json.dumps(margins.as_dict()))["margin_bits"] is None


def test_batches_are_one():
    margins = secure.check(lambda x: (x * x, x[0] * 3.0), [(X,), (10 * X[:4],), (X,)])
    assert [(op.magnitude, op.shape) for op in margins.operations] == [(400.0, (4,)), (60.0, ())]
    assert margins.table(1) == [margins.worst]
    record = margins.as_dict()
    assert record["margin_bits"] == margins.margin_bits
    assert record["operations"][0]["magnitude"] == 400.0


def test_what_cannot_be_checked():
    with pytest.raises(ValueError, match="no batch"):
        secure.check(jnp.sin, [])
    with pytest.raises(TypeError, match="batches is a list of tuples of arguments, not a single ndarray"):
        secure.check(jnp.sin, X)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"batch 0 is a tuple of arguments, not a single ndarray: \(x,\)"):
        secure.check(jnp.sin, [X])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"batch 1\[0\] holds inf"):
        secure.check(jnp.sin, [(1.0,), (np.float32(np.inf),)])
    with pytest.raises(ValueError, match="unknown ring"):
        secure.check(jnp.sin, [(1.0,)], ring="FM65")


# ------------------------------------------------------------------------------------------ jumps, integers, domains

# A function, arguments that it is right for, and some that it is not, and the operation that is named.
RISKS = {
    "integers": (lambda x: x * x > 0, (np.int32(20_000),), (np.int32(50_000),), "mul"),
    "a sum of integers": (jnp.sum, (np.full(4, 2**26, np.int32),), (np.full(4, 2**30, np.int32),), "reduce_sum"),
    "a product of integers": (jnp.dot, (np.full(4, 2**13, np.int32),) * 2, (np.full(4, 2**15, np.int32),) * 2, "dot_"),
    "to an integer": (
        lambda x: x.astype(jnp.int32) > 0,
        (np.float32(5e8),),
        (np.float32(3e9),),
        "convert_element_type",
    ),
    "floor": (lambda x: jnp.floor(x / 3), (X + 2.9,), (X[:1] * 0 + 6,), "floor"),
    "ceil": (lambda x: jnp.ceil(x / 3), (X + 2.9,), (X[:1] * 0 + 6,), "ceil"),
    "round": (lambda x: jnp.round(x / 3), (X + 2.9,), (X[:1] * 0 + 7.5,), "round"),
    "trunc": (lambda x: (x / 3).astype(jnp.int32), (X + 2.9,), (X[:1] * 0 + 6,), "convert_element_type"),
    "sign": (lambda x: jnp.sign(x / 3 - 2), (X + 2.9,), (X[:1] * 0 + 6,), "sign"),
    "remainder": (lambda x, y: x % y, (X, 0 * X + 3), (0 * X + 0.3, 0 * X + 0.1), "rem"),
    "log": (jnp.log, (X + 3,), (X,), "log"),
    "sqrt": (jnp.sqrt, (X + 3,), (X,), "sqrt"),
    "rsqrt": (jax.lax.rsqrt, (X + 3,), (0 * X,), "rsqrt"),
}


@pytest.mark.parametrize("name", RISKS)
def test_what_it_warns_of(group, name):
    """What passes is right on shares; the rest is not, or not in every run."""
    fn, good, bad, operation = RISKS[name]
    secure.check(fn, [good]).require()
    got, want = secure.jit(fn, parties=group("ABY3"))(*good), jax.jit(fn)(*good)
    np.testing.assert_allclose(got, want, atol=2e-3)
    with pytest.raises(secure.OverflowRisk, match=rf"too small for {operation}"):
        secure.check(fn, [bad]).require()


# They once had no bits left, and are right.
ALARMS = {
    "median": (jnp.median, X),
    "quantile": (lambda x: jnp.quantile(x, 0.3), X),
    "softmax of some": (lambda x: jax.nn.softmax(x, where=jnp.arange(8) < 5), X),
    "softmax of some, known at run time": (lambda x, m: jax.nn.softmax(x, where=m), X, X > -1),
    "a maximum of some": (lambda x: jnp.max(x, initial=-jnp.inf, where=x > 1), X),
    "clip": (lambda x: jnp.clip(x, -jnp.inf, 1.0), X),
    "a constant divisor": (lambda x: x / 1e6, 3e6 * X),
    "a constant divisor, an array": (lambda x: x / jnp.full(8, 1e6), 3e6 * X),
    "floor of arguments": (jnp.floor, np.array([2, -3.5, 0], np.float32)),
    "floor of their sums": (lambda x: jnp.floor(x + x[::-1] - 1), np.array([2, -3.5, 0.25], np.float32)),
    "quotients that are whole": (
        lambda x, y: [x // y, x % y],
        np.array([6, 9, -8], np.float32),
        np.array([3, 1.5, 4], np.float32),
    ),
    "a hash": (lambda x: (x * jnp.uint32(2654435761)) >> 16, np.array([1, 2**31], np.uint32)),
    "a counter": (lambda x: jax.lax.fori_loop(0, 5, lambda i, y: y + i // 2, x), np.array([1, 2], np.int32)),
    "what only moves": (jnp.transpose, X),
}


@pytest.mark.parametrize("name", ALARMS)
def test_no_false_alarm(group, name):
    fn, *args = ALARMS[name]
    secure.check(fn, [tuple(args)]).require()
    for got, want in zip(
        jax.tree.leaves(secure.jit(fn, parties=group("ABY3"))(*args)), jax.tree.leaves(jax.jit(fn)(*args)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=2e-3)


def test_nothing_to_overflow_is_no_error():
    margins = secure.check(jnp.transpose, [(X,)])
    assert (margins.operations, margins.margin_bits, margins.as_dict()["margin_bits"]) == ((), math.inf, None)
    with pytest.raises(ValueError, match="only moves values"):
        _ = margins.worst


def test_the_place_is_the_users():
    """Of a function that has no line of the user's, the line that asks."""
    for margins in (secure.check(jnp.log, [(X + 3,)]), secure.check(jnp.linalg.norm, [(X,)])):
        assert {op.source.partition(":")[0] for op in margins.operations} == {"test_check.py"}


# ------------------------------------------------------------------------------------------------- a small BERT

TEXTS = ["a gripping, beautifully acted film.", "a tedious mess. a tedious, lifeless mess.", "good", "a very bad film"]


def large_weight(layer):
    layer["intermediate"]["kernel"] *= 2.0**12


def activation_outlier(layer):
    layer["intermediate"]["bias"][7] = 4e4


def score_outlier(layer):
    for name in ("query", "key"):
        layer["attention"][name]["bias"][3] = 800.0


@pytest.fixture(scope="module")
def small_folder(write_classifier, tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("small"))


@pytest.fixture
def small(small_folder):
    """A copy for every test, as they change its weights."""
    loaded = folders.load(small_folder)
    return loaded._replace(params=jax.tree.map(np.array, loaded.params))


def test_a_model_that_passes_is_right_on_shares(small, group):
    margins = check(small, TEXTS).require()
    assert margins.margin_bits > 4
    predictions = SecureClassifier(small, group("ABY3")).classify(TEXTS).predictions
    assert max(prediction.difference for prediction in predictions) < 0.02


@pytest.mark.parametrize(
    ("plant", "operation"),
    [
        (large_weight, r"bert/layer_1: (integer_pow|square) .*layers\.py"),
        (activation_outlier, r"bert/layer_1: (integer_pow|square) .*layers\.py"),
        (score_outlier, r"bert/layer_1/attention: (integer_pow|square) .*attention\.py"),
    ],
)
def test_planted_overflows_are_found_and_are_real(small, group, plant, operation):
    plant(small.params["bert"]["layer_1"])
    with pytest.raises(secure.OverflowRisk, match=operation):
        check(small, TEXTS).require()
    predictions = SecureClassifier(small, group("ABY3")).classify(TEXTS).predictions
    assert any(prediction.error or prediction.difference > 0.1 for prediction in predictions)


def test_the_shipped_model_passes():
    margins = check(folders.load(zoo.find(zoo.DEFAULT)), movie_sentences()["validation"]["sentence"][:10])
    print(f"{zoo.DEFAULT}: {margins.require()}")


def test_the_line_of_a_margin_is_of_this_function():
    """`jnp.var` is traced once for all functions; JAX remembers the line of the first that called it."""

    def first(x):
        return jnp.var(x)

    def second(x):
        return jnp.var(x) + 1

    for function in (first, second):
        lines = {op.source for op in secure.check(function, [(np.ones(7, np.float32),)]).operations}
        assert lines == {f"test_check.py:{function.__code__.co_firstlineno + 1}"}
