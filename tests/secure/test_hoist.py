"""What a function makes of its parameters alone is computed once; the rest is the same function."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc import secure

RNG = np.random.default_rng(0)
PARAMS = {
    "kernel": RNG.normal(size=(6, 4)).astype(np.float32),
    "bias": RNG.normal(size=4).astype(np.float32),
    "table": RNG.normal(size=(9, 6)).astype(np.float32),
}
X = RNG.normal(size=(3, 6)).astype(np.float32)


def primitives(function, *args) -> list[str]:
    return [eqn.primitive.name for eqn in jax.make_jaxpr(function)(*args).jaxpr.eqns]


def centred(params, x):
    kernel = params["kernel"] - params["kernel"].mean(-1, keepdims=True)
    return x @ (2.0 * kernel) + params["bias"]


def in_functions(params, x):
    return jax.jit(lambda x: jax.nn.relu(x @ jnp.tanh(params["kernel"])))(x) * jax.checkpoint(jnp.exp)(params["bias"])  # pyright: ignore[reportPrivateImportUsage]


def only_params(params, x):
    return params["kernel"].sum(), params["bias"]


def only_inputs(params, x):
    return jnp.sin(x), 3.0


def in_a_loop(params, x):
    return jax.lax.fori_loop(0, 3, lambda _, y: y + x @ params["kernel"], jnp.zeros((len(x), 4)))


def random_numbers(params, x):
    return x * jax.random.normal(jax.random.key(0), x.shape) + params["table"][: len(x)]


def wide_constants(params, x):
    order = np.array([2, 0, 1])  # of 64 bits, which a trace makes 32
    return x @ params["kernel"][order.repeat(2) * 2 % 6] * np.float64(0.1), params["table"][order] * order[:, None]


def twice(params, x):
    square = jax.jit(jnp.square)
    return square(params["bias"]) + square(x[:, :4]) + square(square(params["bias"]))


FUNCTIONS = [centred, in_functions, only_params, only_inputs, in_a_loop, random_numbers, wide_constants, twice]
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


@every_function
def test_the_split_function_is_the_function(function):
    g, weights = secure.hoist(function, PARAMS, X)
    assert all(isinstance(weight, np.ndarray) for weight in weights.values())
    for x in (X, -X, X[:1], np.concatenate([X, X])):  # other values, and other shapes
        expected = function(PARAMS, x)
        for ours in (g(weights, x), jax.jit(g)(weights, x)):
            assert jax.tree.structure(ours) == jax.tree.structure(expected)
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@every_function
def test_the_split_function_is_the_function_on_shares(function, group):
    g, weights = secure.hoist(function, PARAMS, X)
    ours = secure.jit(g, parties=group("ABY3"))(weights, X)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(function(PARAMS, X)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


@every_function
@pytest.mark.parametrize("dtype", [None, "float32", "float64"])
def test_the_weights_have_their_own_types_in_whatever_they_are_computed(function, dtype):
    _, weights = secure.hoist(function, PARAMS, X, dtype=dtype)
    assert {weight.dtype for weight in weights.values()} <= {np.dtype("float32")}


@every_function
def test_shapes_alone_give_the_shapes_of_the_weights(function):
    params, inputs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (PARAMS, X))
    _, planned = secure.hoist(function, params, inputs)
    g, weights = secure.hoist(function, PARAMS, inputs)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in planned.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in weights.items()
    }
    assert g.structs == planned


def test_what_depends_on_parameters_alone_is_left_to_nobody_else():
    g, weights = secure.hoist(centred, PARAMS, X)
    assert set(primitives(g, weights, X)) == {"dot_general", "add", "broadcast_in_dim"}
    assert {name: weight.shape for name, weight in weights.items()} == {"bias": (4,), "mul": (6, 4)}
    kernel = PARAMS["kernel"]
    np.testing.assert_allclose(weights["mul"], 2.0 * (kernel - kernel.mean(-1, keepdims=True)), atol=1e-6)


def test_computing_in_double_precision_is_more_exact():
    params = {"x": np.float32(1e8), "y": np.float32(1.0)}

    def lost(params, x):
        return x * ((params["x"] + params["y"]) - params["x"])

    assert list(secure.hoist(lost, params, X)[1].values()) == [0.0]
    assert list(secure.hoist(lost, params, X, dtype="float64")[1].values()) == [1.0]


def test_what_only_repeats_or_moves_a_parameter_is_the_same_weight_for_every_length():
    def moves(params, x):
        positions = params["table"][: x.shape[0]]
        repeated = jnp.broadcast_to(jnp.square(params["bias"])[:, None], (4, x.shape[0]))
        return x + positions, repeated.T + x[:, :4], params["kernel"].T.reshape(-1)[:, None, None] * x

    g, weights = secure.hoist(moves, PARAMS, X)
    assert sorted(weight.shape for weight in weights.values()) == [(4,), (6, 4), (9, 6)]
    for length in (1, 5, 9):
        x = RNG.normal(size=(length, 6)).astype(np.float32)
        assert secure.hoist(moves, PARAMS, x)[1].keys() == weights.keys()
        for a, b in zip(g(weights, x), moves(PARAMS, x), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5], ids="{} rows".format)
def test_other_weights_for_other_lengths_are_refused(size):
    """The weights of the first length would be taken for others, some of the same shapes."""

    def by_length(params, x):
        return x @ (params["kernel"] * x.shape[0])

    g, weights = secure.hoist(by_length, PARAMS, X)
    with pytest.raises(ValueError, match=rf"^for inputs of the shapes \({size}, 6\) the function makes other weights"):
        g(weights, np.ones((size, 6), np.float32))


def test_weights_are_known_by_what_they_are_and_not_by_their_order():
    def ordered(params, x):
        first, second = (params["a"] + 1.0, params["b"] + 2.0)[:: 1 if len(x) == 3 else -1]
        return (x + first) * second

    params = {"a": np.ones(6, np.float32), "b": np.ones(6, np.float32)}
    g, weights = secure.hoist(ordered, params, X)
    np.testing.assert_allclose(g(weights, X), ordered(params, X))
    for x in (X[:2], X[:1]):
        np.testing.assert_allclose(g(weights, x), ordered(params, x))


def test_what_is_computed_twice_is_one_weight():
    def again(params, x):
        return (x * jnp.exp(params["table"][0]) + 1.0) * jnp.exp(params["table"][0])

    g, weights = secure.hoist(again, PARAMS, X)
    assert [weight.shape for weight in weights.values()] == [(6,)]
    np.testing.assert_allclose(g(weights, X), again(PARAMS, X), rtol=1e-5)


@pytest.mark.parametrize("change", ["too few", "too many", "another function's"])
def test_weights_of_another_function_are_refused(change):
    g, weights = secure.hoist(centred, PARAMS, X)
    if change == "too few":
        weights.pop("bias")
    elif change == "too many":
        weights["own"] = weights["bias"]
    else:
        weights = secure.hoist(random_numbers, PARAMS, X)[1]
    with pytest.raises(ValueError, match=r"^these are weights of another function: \w+"):
        g(weights, X)


def test_weights_that_are_not_by_name_are_refused():
    g, weights = secure.hoist(centred, PARAMS, X)
    with pytest.raises(TypeError, match=r"^the weights are a dict by name, as `hoist` gives them, not a list"):
        g(list(weights.values()), X)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("size", [3, 5000])
def test_loops_that_differ_in_what_they_close_over_are_two_weights(size):
    """The middle of a long array, or the constants of a function, are not in JAX's text of an equation."""
    one = np.zeros(size, np.float32)
    other = one.copy()
    other[size // 2] = 1.0

    def loop(w, c):
        return jax.lax.scan(lambda y, _: (y * c + 1.0, None), w, None, length=2)[0]

    def both(params, x):
        return x * loop(params["w"], one) + loop(params["w"], other)

    params, x = {"w": np.full(size, 2.0, np.float32)}, np.full(size, 3.0, np.float32)
    g, weights = secure.hoist(both, params, x)
    assert len(weights) == 2
    np.testing.assert_allclose(g(weights, x), both(params, x))


def test_weights_are_named_by_where_they_come_from():
    import flax.linen as nn

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(4, name="first")(x)
            kernel = self.param("kernel", nn.initializers.ones, (4, 2))
            return y @ jnp.exp(kernel) @ jnp.exp(2.0 * kernel[:2])

    params: Any = Model().init(jax.random.key(0), X)
    _, weights = secure.hoist(Model().apply, params, X)
    assert set(weights) == {"params/first/kernel", "params/first/bias", "Model/exp", "Model/exp.2"}


def test_errors_and_margins_name_the_users_module_and_line():
    import flax.linen as nn

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.square(nn.Dense(4)(x)) * 1e5

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Inner(name="inner")(x)

    model = Outer()
    params: Any = model.init(jax.random.key(0), X)
    g, weights = secure.hoist(model.apply, params, X)
    margins = secure.check(g, [(weights, 1e3 * X)])
    with pytest.raises(secure.OverflowRisk, match=r"inner: (mul|integer_pow|square) .*test_hoist\.py:\d+"):
        margins.require()

    def refused(params, x):
        return jax.lax.bitcast_convert_type(x + params["bias"][0], jnp.int32)

    g, weights = secure.hoist(refused, PARAMS, X)
    with pytest.raises(secure.SecureError, match=r"bitcast_convert_type \(test_hoist\.py:\d+\)"):
        secure.jit(g).program(weights, X)
