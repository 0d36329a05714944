"""Every layer given a lazy state is the layer: plain and lazy are compared, with a unit and without."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError

from flaxmpc import secure
from flaxmpc.nn.activation import ACTIVATIONS
from flaxmpc.nn.attention import ATTENTION
from flaxmpc.nn.layers import Dense, Norm, PostNormBlock, PreNormBlock, SelfAttention, activate
from flaxmpc.nn.lazy import Lazy, Stream, side_by_side
from flaxmpc.nn.mask import Mask, causal
from flaxmpc.nn.normalization import EXACT, NORMALIZATIONS, Chebyshev, ConstantRoot
from flaxmpc.nn.product import grouped_conv

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 5, 8)), jnp.float32)
TOKENS = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
VALID = np.asarray(TOKENS) > 0


def applied(module, *args, **options) -> Any:
    return module.apply(*args, **options)


def params_of(module, *args) -> Any:
    """Random ones, of which no two are alike."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(0.3, 0.4, leaf.shape), leaf.dtype), shapes)


def some_state(unit=None) -> Lazy:
    """A sum of two terms, one diagonal, and a bias."""
    a = 1.0 if unit is None else unit.scale
    state = Lazy.held(X * a, unit, grouped_conv) @ jnp.asarray(RNG.normal(size=(8, 8)), jnp.float32)
    diagonal = Lazy.held(jnp.flip(X) * a, unit, grouped_conv)
    return state + diagonal.plus(jnp.asarray(RNG.normal(size=8), jnp.float32))


def value_of(state: Lazy) -> np.ndarray:
    """What the state is, its unit taken away, computed in another way."""
    a = 1.0 if state.unit is None else np.asarray(state.unit.scale)
    total = np.asarray(state.bias, np.float64)
    for array, matrix in zip(state.arrays, state.matrices, strict=True):
        dense = np.diag(matrix) if matrix.ndim == 1 else np.asarray(matrix)
        true = np.divide(array, a, out=np.zeros(array.shape), where=np.broadcast_to(a, array.shape) > 0)
        total = total + true @ dense.astype(np.float64)
    return total


@pytest.fixture(params=[None, 1, 2], ids=["no unit", "degree 1", "degree 2"])
def mask(request):
    return Mask.from_tokens(TOKENS, degree=request.param)


def unit_of(mask):
    has = not np.array_equal(mask.scale, mask.tokens)
    return mask.unit if has else None


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours)[VALID], np.asarray(theirs)[VALID], rtol=1e-4, atol=1e-5)


def test_a_lazy_state_is_its_sum(mask):
    unit = unit_of(mask)
    state = some_state(unit)
    a = 1.0 if unit is None else unit.scale
    close(state.force(), value_of(state) * a)
    assert state.shape == (2, 5, 8)
    matrix = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)
    close(value_of(state @ matrix), value_of(state) @ matrix)
    close(value_of(state.map(lambda rows: rows[..., ::-1])), value_of(state)[..., ::-1])
    both = side_by_side([state, state @ matrix])
    close(value_of(both), np.concatenate([value_of(state), value_of(state) @ matrix], -1))


def test_the_first_token_is_taken_before_anything_is_computed():
    state = some_state()
    np.testing.assert_allclose(state.first().force(), value_of(state)[:, 0], atol=1e-5)


@pytest.mark.parametrize("pairs", [None, causal], ids=["all pairs", "causal"])
@pytest.mark.parametrize("part", ["softmax", "2quad_freediv", "relu_freediv", "scaling"])
def test_a_block_of_which_only_the_first_token_is_wanted(part, pairs):
    """The same as of all tokens, and nothing is computed of the others behind keys and values."""
    degree = ATTENTION[part].score_degree if pairs is None else None
    seen = Mask.from_tokens(TOKENS, degree=degree, pairs=pairs)
    state = some_state(None if degree is None else seen.unit)
    module = PostNormBlock(ATTENTION[part], ACTIVATIONS["quad"], (EXACT, EXACT), 2, 24)
    bias = jnp.asarray(RNG.normal(size=(1, 2, 5, 5)), jnp.float32)
    variables = params_of(module, X, seen)

    def run(state, first):
        return applied(module, variables, state, seen, bias, first=first)[0]

    one, all_ = run(state, True), run(state, False)
    assert one.shape == (2, 1, 8)
    np.testing.assert_allclose(value_of(one)[:, 0], value_of(all_)[:, 0], rtol=1e-4, atol=1e-5)
    array = jnp.asarray(value_of(state), jnp.float32)
    np.testing.assert_array_equal(run(array, True), run(array, False))
    computed = jax.make_jaxpr(lambda: run(state, True).force())().eqns
    shapes = [var.aval.shape for eqn in computed for var in eqn.outvars]
    assert (2, 1, 24) in shapes, "of the feed-forward"
    assert (2, 5, 24) not in shapes, "of the feed-forward"


def test_states_of_two_units_are_not_added():
    one, other = (Mask.from_tokens(TOKENS, degree=degree).unit for degree in (1, 2))
    with pytest.raises(AssertionError, match="two units"):
        _ = some_state(one) + some_state(other)


def test_dense(mask):
    state = some_state(unit_of(mask))
    module = Dense(3)
    variables = params_of(module, X)
    plain: Any = applied(module, variables, jnp.asarray(value_of(state), jnp.float32))
    close(value_of(applied(module, variables, state)), plain)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("module", [Dense(3), Norm()], ids=["dense", "norm"])
def test_parameters_of_another_shape_are_refused(module):
    """A bias of one number would be added to every feature."""
    right = params_of(module, X)["params"]
    for name, leaf in right.items():
        for shape in ((1,), (*leaf.shape[:-1], leaf.shape[-1] + 1)):
            wrong = {"params": {**right, name: jnp.ones(shape)}}
            with pytest.raises(ScopeParamShapeError, match=rf'for parameter "{name}"'):
                module.apply(wrong, X)


@pytest.mark.parametrize(
    "part", [*NORMALIZATIONS.values(), Chebyshev(low=0.05, high=80.0, depth=7)], ids=lambda p: p.name
)
@pytest.mark.parametrize("into", [False, True])
def test_norm(mask, part, into):
    if part == Chebyshev():
        part = Chebyshev(low=0.05, high=50.0, depth=7)
    unit = unit_of(mask)
    state = some_state(unit)
    module = Norm(part, 1e-6)
    variables = params_of(module, X)
    plain = applied(module, variables, jnp.asarray(value_of(state), jnp.float32))
    after: Any = applied(module, variables, state, unit if into else None)
    assert (after.unit is unit) if into else (after.unit is None)
    if part == ConstantRoot() and after.unit is state.unit:  # nothing is left to compute
        assert all(a is b for a, b in zip(after.arrays, state.arrays, strict=True))
    else:
        assert len(after.arrays) == 1
    np.testing.assert_allclose(value_of(after)[VALID], np.asarray(plain)[VALID], rtol=2e-3, atol=2e-3)


def test_a_constant_computes_a_state_of_many_arrays():
    """So that the matrices of a model do not grow from block to block."""
    state = some_state() + some_state()
    assert len(state.arrays) == 4
    module = Norm(ConstantRoot(inverse=0.3))
    variables = params_of(module, X)
    after: Any = applied(module, variables, state)
    assert len(after.arrays) == 1
    close(value_of(after), applied(module, variables, jnp.asarray(value_of(state), jnp.float32)))


@pytest.mark.parametrize("act", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations(act):
    state = some_state()
    plain: Any = activate(jnp.asarray(value_of(state), jnp.float32), act)
    lazy: Any = activate(state, act)
    np.testing.assert_allclose(value_of(lazy), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pairs", [None, causal], ids=["all pairs", "causal"])
@pytest.mark.parametrize("part", ATTENTION.values(), ids=ATTENTION)
def test_self_attention(part, pairs):
    degree = part.score_degree if pairs is None else None
    seen = Mask.from_tokens(TOKENS, degree=degree, pairs=pairs)
    unit = None if degree is None else seen.unit
    state = some_state(unit)
    module = SelfAttention(part, 2)
    x = jnp.asarray(value_of(state), jnp.float32) / 4
    state = state.map(lambda rows: rows / 4)
    variables = params_of(module, X, seen)
    plain, scores, _ = applied(module, variables, x, seen)
    lazy, *nothing = applied(module, variables, state, seen)
    assert scores.shape == (2, 2, 5, 5)
    assert nothing == [None, None]
    np.testing.assert_allclose(value_of(lazy)[VALID], np.asarray(plain)[VALID], rtol=1e-3, atol=1e-3)
    giving = SelfAttention(part, 2, gives_weights=True)
    np.testing.assert_allclose(applied(giving, variables, x, seen)[0], plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["softmax", "2quad_freediv", "softmax_freediv", "scaling"])
def test_shared_scores_weigh_the_values_of_another_layer(part):
    """With the same values a layer that shares the scores of another gives what the other gives."""
    giving, taking = (SelfAttention(ATTENTION[part], 2, gives_weights=gives) for gives in (True, False))
    seen = Mask.from_tokens(TOKENS)
    variables = params_of(giving, X, seen)
    plain, scores, weights = applied(giving, variables, X, seen)
    own = {"params": {name: variables["params"][name] for name in ("value", "output")}}
    found, same, given = applied(taking, own, X, seen, None, True, None, weights)
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(same, scores)
    assert given is weights, "for the next"


def test_a_bias_of_positions_is_added_to_the_scores():
    module, seen = SelfAttention(ATTENTION["softmax"], 2), Mask.from_tokens(TOKENS)
    variables = params_of(module, X, seen)
    bias = jnp.asarray(RNG.normal(size=(1, 2, 5, 5)), jnp.float32)
    without, with_bias = (applied(module, variables, X, seen, added) for added in (None, bias))
    close_scores = np.asarray(with_bias[1]) - np.asarray(without[1])
    np.testing.assert_allclose(close_scores, np.broadcast_to(bias, (2, 2, 5, 5)), atol=1e-5)
    assert np.abs(np.asarray(with_bias[0]) - np.asarray(without[0])).max() > 1e-3
    lazy, *_ = applied(module, variables, Lazy.held(X), seen, bias)
    np.testing.assert_allclose(value_of(lazy), with_bias[0], atol=1e-4)


def block(**fields) -> PostNormBlock:
    parts = {"attention_part": ATTENTION["2quad_freediv"], "hidden_act": ACTIVATIONS["quad"], "norms": (EXACT, EXACT)}
    return PostNormBlock(**{**parts, "num_attention_heads": 2, "intermediate_size": 12, **fields})


def test_a_block_sees_what_its_normalisations_meet():
    module, seen = block(), Mask.from_tokens(TOKENS)
    variables = params_of(module, X, seen)
    _, (scores, variances, weights) = applied(module, variables, X, seen)
    assert weights is None
    assert scores.shape == (2, 2, 5, 5)
    assert [one.shape for one in variances] == [(2, 5, 1)] * 2
    _, of_lazy = applied(module, variables, Lazy.held(X), seen)
    assert of_lazy == (None, (None, None), None)


@pytest.mark.parametrize("wrap", [nn.remat, nn.checkpoint], ids=["remat", "checkpoint"])
def test_a_block_may_be_rematerialised(wrap):
    seen = Mask.from_tokens(TOKENS)
    variables = params_of(block(), X, seen)
    wrapped = wrap(PostNormBlock)(**{field: getattr(block(), field) for field in
                                     ("attention_part", "hidden_act", "norms", "num_attention_heads",
                                      "intermediate_size")})  # fmt: skip

    def loss(module):
        return lambda variables: jnp.sin(applied(module, variables, X, seen)[0]).sum()

    ours, theirs = (jax.grad(loss(module))(variables) for module in (wrapped, block()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


def test_blocks_may_be_scanned():
    seen = Mask.from_tokens(TOKENS)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            return block(name="layer")(x, mask)

    stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=3)()  # pyright: ignore[reportArgumentType]
    variables = params_of(stack, X, seen)
    out, found = applied(stack, variables, X, seen)
    assert found.scores.shape == (3, 2, 2, 5, 5)
    x = X
    for i in range(3):
        own = {"params": jax.tree.map(lambda leaf, i=i: leaf[i], variables["params"]["layer"])}
        x, _ = applied(block(), own, x, seen)
    np.testing.assert_allclose(out, x, rtol=1e-4, atol=1e-4)


class PreNormStack(nn.Module):
    """Two blocks and the normalisation that follows them, of an array or a stream."""

    attention: Any
    norm: Any = EXACT

    @nn.compact
    def __call__(self, x, mask):
        for i in range(2):
            block = PreNormBlock(self.attention, ACTIVATIONS["quad"], (self.norm,) * 2, 2, 12, name=f"layer_{i}")
            x, _ = block(x, mask)
        x = Norm(self.norm, name="last")(x)
        return x.force() if isinstance(x, Lazy) else x


@pytest.mark.parametrize("pairs", [None, causal], ids=["all pairs", "causal"])
@pytest.mark.parametrize("part", ["softmax", "2quad", "2quad_freediv", "softmax_freediv", "scaling"])
def test_a_stream_is_the_same_function_and_on_shares(part, pairs, group):
    seen = Mask.from_tokens(TOKENS, pairs=pairs)
    module = PreNormStack(ATTENTION[part])
    variables = params_of(module, X, seen)
    plain = applied(module, variables, X, seen)

    def on_shares(variables, x, seen):
        return applied(module, variables, Stream.of(x), seen)

    function, weights = secure.hoist(on_shares, variables, X, seen, dtype="float64")
    np.testing.assert_allclose(np.asarray(function(weights, X, seen))[VALID], np.asarray(plain)[VALID], atol=2e-4)
    ours, cost = secure.jit(function, parties=group("ABY3")).run(weights, np.asarray(X), jax.device_get(seen))
    np.testing.assert_allclose(ours[VALID], np.asarray(plain)[VALID], atol=0.03)
    _, written = secure.jit(lambda *args: applied(module, *args), parties=group("ABY3")).run(
        variables, np.asarray(X), jax.device_get(seen)
    )
    assert cost.bytes_sent < written.bytes_sent
    assert cost.rounds < written.rounds


def test_a_stream_without_centring():
    seen = Mask.from_tokens(TOKENS)
    module = PreNormStack(ATTENTION["softmax"], NORMALIZATIONS["rms_norm"])
    variables = params_of(module, X, seen)
    plain = applied(module, variables, X, seen)
    found = applied(module, variables, Stream.of(X, centres=False), seen)
    np.testing.assert_allclose(np.asarray(found)[VALID], np.asarray(plain)[VALID], atol=2e-4)
    with pytest.raises(AssertionError, match="a stream is centred, or not, for all normalisations"):
        applied(module, variables, Stream.of(X), seen)


def test_a_part_that_says_it_folds_and_keeps_a_scalar_is_refused():
    """On a lazy state with a unit nobody would look at it."""

    class Gained(type(ATTENTION["2quad_freediv"])):
        def fold(self, scalars, num_heads, query=True):
            folded = super().fold(scalars, num_heads, query)
            return folded._replace(scalars={**folded.scalars, "gain": jnp.ones((num_heads,))})

    own = ATTENTION["2quad_freediv"]
    part = Gained(**{field.name: getattr(own, field.name) for field in dataclasses.fields(own)})
    seen = Mask.from_tokens(TOKENS, degree=2)
    module = SelfAttention(part, 2)
    variables = params_of(module, X, seen)
    with pytest.raises(ValueError, match="attention '2quad_freediv' says that it folds, but 'gain' is left"):
        applied(module, variables, some_state(seen.unit), seen)
