"""A function with a plan of its bits is the function; what has no plan, or another one's, is refused."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint  # pyright: ignore[reportPrivateImportUsage]

from flaxmpc import secure
from flaxmpc.secure.bits import SPARE_BITS
from flaxmpc.secure.instructions import tanh

RNG = np.random.default_rng(0)
PARAMS = {
    name: RNG.normal(size=shape).astype(np.float32) / 4
    for name, shape in {"a": (12, 16), "b": (16,), "c": (16, 4), "gain": (4,)}.items()
}
BATCHES = [(PARAMS, RNG.normal(size=(rows, 12)).astype(np.float32)) for rows in (3, 5, 3)]
ERROR = 1e-3


def layer(params, x):
    """Two products and a square, with no truncation between that has to be."""
    h = x @ params["a"] + params["b"]
    return (h * h) @ params["c"] / 8.0 - 0.25


def everything(params, x):
    """Every kind of step, numbers of different bits side by side, and known numbers of all kinds."""
    h = x @ params["a"] + params["b"]
    clipped = jnp.maximum(h, 0.0) - jnp.clip(h, -0.5, 0.5)
    y = jnp.concatenate([h * h, -clipped, 0.3 * h, jnp.pad(h[:, :2], ((0, 0), (1, 1)))], -1)
    seen = jnp.where(np.tri(x.shape[0], y.shape[1], dtype=bool), y, 0.0) * np.tri(x.shape[0], y.shape[1])
    mixed = jnp.einsum("ij,kj->ik", seen, y) * -0.5 + jnp.linspace(0.0, 1.0, x.shape[0])
    return {"mixed": mixed.sum(-1), "rest": (jnp.tanh(h @ params["c"]) * params["gain"]) ** 3, "none": np.float32(3.0)}


def planned(function, batches=None, **options):
    return secure.Fixed(function, secure.plan(function, batches or BATCHES, **options))


def close(ours, theirs, error=ERROR):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=8 * error), ours, theirs)


@pytest.mark.parametrize("protocol", ["REF2K", "ABY3", "SEMI2K"])
@pytest.mark.parametrize("function", [layer, everything])
def test_it_is_the_function_on_shares_and_in_the_clear(function, protocol, group):
    fixed = planned(function, error=ERROR)
    parties = group(protocol, fraction_bits=secure.FRACTION_BITS)
    on_shares = secure.jit(fixed, parties=parties)
    for args in BATCHES[:2]:
        ours = fixed.decode(on_shares(*fixed.encode(args)))
        plain = function(*args)
        tolerance = ERROR if function is layer else 2e-3  # of the polynomial in place of tanh
        close(ours, plain, tolerance)
        close(fixed.clear(*args), plain, tolerance)
        if protocol == "REF2K":
            close(ours, fixed.clear(*args), 1e-5)


def test_it_takes_fewer_bytes_and_rounds(group):
    fixed = planned(layer, error=ERROR)
    ours = secure.jit(fixed, parties=group("ABY3", fraction_bits=30)).run(*fixed.encode(BATCHES[1])).cost
    usual = secure.jit(layer, parties=group("ABY3")).run(*BATCHES[1]).cost
    assert fixed.plan.truncations < 2
    assert ours.bytes_sent < 0.6 * usual.bytes_sent
    assert ours.rounds < 0.6 * usual.rounds


def test_a_smaller_error_takes_more_truncations_and_is_kept():
    coarse, fine = (planned(everything, error=error) for error in (3e-2, 5e-4))
    assert coarse.plan.error <= 3e-2
    assert fine.plan.error <= 5e-4
    assert coarse.plan.truncations < fine.plan.truncations
    assert fine.plan.spare_bits >= SPARE_BITS - 1e-6
    without = {"mixed": None, "none": None}
    found, plain = (f(*BATCHES[1]) for f in (fine.clear, everything))
    close({name: found[name] for name in without}, {name: plain[name] for name in without}, 5e-4)


def test_resident_weights_are_encoded_by_themselves(group):
    fixed = planned(layer, error=ERROR)
    parties = group("ABY3", fraction_bits=30)
    weights = parties.put(fixed.plan.encoding().encode(PARAMS))
    x = fixed.plan.encoding(len(PARAMS)).encode(BATCHES[0][1])
    close(fixed.decode(secure.jit(fixed, parties=parties)(weights, x)), layer(*BATCHES[0]))


def test_tanh_is_within_its_bound():
    x = np.linspace(-9, 9, 5001).astype(np.float32)
    assert np.abs(tanh(jnp.asarray(x)) - np.tanh(x)).max() < 0.002


def test_numbers_may_grow_by_the_spare_bits_and_beyond_they_are_refused(group):
    fixed = planned(layer, error=ERROR)
    params, x = BATCHES[0]
    grown = x * 2.0 ** (SPARE_BITS / 2)  # squared in the layer
    on_shares = secure.jit(fixed, parties=group("ABY3", fraction_bits=30))
    close(fixed.decode(on_shares(*fixed.encode((params, grown)))), layer(params, grown), 2.0**SPARE_BITS * ERROR)
    for bad in (x * 2048, np.full_like(x, np.nan), np.full_like(x, -np.inf)):
        with pytest.raises(ValueError, match=r"an argument holds .*; its plan of bits is for up to"):
            fixed.encode((params, bad))


def test_a_plan_of_another_function_is_refused():
    fixed = planned(layer, error=ERROR)
    for other, args in (
        (lambda params, x: layer(params, x) * layer(params, x), BATCHES[0]),
        (lambda params, x: jnp.tanh(layer(params, x)), BATCHES[0]),
        (layer, ({**PARAMS, "more": PARAMS["b"]}, BATCHES[0][1])),
    ):
        with pytest.raises(secure.PlanError, match="another function's"):
            secure.Fixed(other, fixed.plan)(*args)


def test_a_plan_is_a_json_value_and_broken_ones_are_refused():
    made = secure.plan(everything, BATCHES)
    value = json.loads(json.dumps(made.as_dict()))
    assert secure.BitPlan.from_dict(value) == made
    for broken in (None, [], {}, {**value, "steps": [{}]}, {**value, "inputs": [1.5]}, {**value, "error": "x"}):
        with pytest.raises(secure.PlanError, match="this is no plan of bits"):
            secure.BitPlan.from_dict(broken)
    first = next(i for i, step in enumerate(made.steps) if step.kept is not None)
    for field, bad in (
        ("kept", 3.5),
        ("kept", "9"),
        ("kept", -90),
        ("known", 10**6),
        ("bits", True),
        ("magnitude", -1),
    ):
        steps = [dict(step) for step in value["steps"]]
        steps[first][field] = bad
        with pytest.raises(secure.PlanError, match="this is no plan of bits"):
            secure.BitPlan.from_dict({**value, "steps": steps})
    untrue = [dataclasses.replace(made.steps[0], bits=made.steps[0].bits - 1), *made.steps[1:]]
    for lie in ({"steps": tuple(untrue)}, {"steps": made.steps[:-1]}, {"inputs": made.inputs[:-1]}, {"outputs": (1,)}):
        with pytest.raises(secure.PlanError, match=r"does not add up|leaves out"):
            secure.Fixed(everything, dataclasses.replace(made, **lie))(*BATCHES[0])
    steps = list(made.steps)
    steps[first] = dataclasses.replace(steps[first], magnitude=steps[first].magnitude * 2**40)
    with pytest.raises(secure.PlanError, match=re.escape(f"{steps[first].where} has -")):
        secure.BitPlan.from_dict(dataclasses.replace(made, steps=tuple(steps)).as_dict())


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda _, x: jnp.exp(x), "exp"),
        (lambda _, x: x / (x + 9.0), "div"),
        (lambda _, x: jnp.where(x > 0, x, 0.0), "gt"),
        (lambda _, x: jnp.maximum(x, -x), "max"),
        (lambda _, x: jnp.sort(x), "sort"),
        (lambda _, x: jax.lax.rsqrt(x), "rsqrt"),
        (lambda _, x: x.astype(jnp.int32), "convert_element_type"),
    ],
)
def test_what_is_no_sum_or_product_is_refused_by_name(function, named):
    with pytest.raises(secure.SecureError, match=rf"SPU cannot compute {named} \(.*: a plan of bits is for"):
        secure.plan(function, BATCHES)


def test_numbers_without_room_have_no_plan():
    with pytest.raises(secure.PlanError, match="too large for a plan of bits with an error of 1e-12"):
        secure.plan(layer, BATCHES, error=1e-12)
    for error in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be positive and finite, not"):
            secure.plan(layer, BATCHES, error=error)
    huge = secure.Encoding((200,), (8.0,), (20,))
    with pytest.raises(ValueError, match="whole and up to 2"):
        huge.encode(np.ones(3, np.float32))
    with pytest.raises(secure.PlanError, match="no batch"):
        secure.plan(layer, [])
    with pytest.raises(secure.PlanError, match="not finite"):
        secure.plan(lambda _, x: x * 1e30 * x, [(PARAMS, np.full((2, 2), 1e30, np.float32))])
    with pytest.raises(secure.PlanError, match="computes otherwise"):
        secure.plan(lambda _, x: x * x if x.shape[0] == 3 else x * x * x, BATCHES)


def test_parts_of_an_array_are_moves():
    """`jnp.split` is slices in older jax, and one operation of several results in newer."""

    def function(w, x):
        first, second, third = jnp.split(x @ w, [1, 3], -1)
        return first * second, third + first

    batches = [(RNG.normal(size=(4, 4)).astype(np.float32), RNG.normal(size=(3, 4)).astype(np.float32))]
    fixed = planned(function, batches, error=1e-3)
    jax.tree.map(close, fixed.clear(*batches[0]), function(*batches[0]))


@settings(max_examples=6)
@example(["-", "+", "c"], 3)  # a plan of no error
@given(st.lists(st.sampled_from("+-*qsct"), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_random_functions(ops, seed):
    """Whatever is put together of sums and products is within the error that its plan says."""
    rng = np.random.default_rng(seed)
    constants = rng.normal(size=8).astype(np.float32)

    def function(w, x):
        y = x
        for op, c in zip(ops, constants, strict=False):
            y = {
                "+": lambda y, c: y + x,
                "-": lambda y, c: c - y,
                "*": lambda y, c: y * x,
                "q": lambda y, c: y * y * 0.25,
                "s": lambda y, c: y * c,
                "c": lambda y, c: jnp.clip(y, -1.0, 1.0),
                "t": lambda y, c: y @ w,
            }[op](y, c)
        return y

    w = rng.normal(size=(4, 4)).astype(np.float32) / 2
    batches = [(w, rng.uniform(-1.5, 1.5, (6, 4)).astype(np.float32)) for _ in range(3)]
    fixed = planned(function, batches, error=1e-3)
    for args in batches:
        close(fixed.clear(*args), function(*args))


def with_own_slope(function):
    made = jax.custom_jvp(function)
    made.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return made


@pytest.mark.parametrize("within", [jax.jit, checkpoint, with_own_slope, lambda f: jax.jit(checkpoint(f))])
def test_a_product_may_be_a_function_of_its_own(within):
    """A jitted one is one step, however many products it is made of; what is no single product is taken apart."""
    product = within(lambda a, b: jnp.concatenate([a @ b, 2.0 * a @ b]))
    many = jax.jit(lambda a, b: jnp.concatenate([a[i : i + 1] @ b for i in range(len(a))]))
    square = jax.jit(lambda a, b: (a @ b) * (a @ b))

    def function(weights, x):
        return product(x, weights) @ weights + square(many(x, weights), weights).sum(0)

    weights = RNG.normal(size=(6, 6)).astype(np.float32) / 3
    fixed = planned(function, [(weights, RNG.normal(size=(3, 6)).astype(np.float32))], error=ERROR)
    for rows in (3, 7):  # the same steps for more rows
        x = np.linspace(-1.0, 1.0, 6 * rows, dtype=np.float32).reshape(rows, 6)
        close(fixed.clear(weights, x), function(weights, x))


def test_a_plans_error_is_that_on_shares(group):
    """Where roundings by chance have a large effect, as those of numbers below the last bit, the plan says so."""
    weights, x = RNG.normal(size=(16, 16)).astype(np.float32), RNG.normal(size=(64, 16)).astype(np.float32)

    def function(weights, x):
        y = 0.01 * x @ weights
        return (y * y * y + y) @ weights

    fixed = planned(function, [(weights, x)], error=3e-3)
    on_shares = secure.jit(fixed, parties=group("ABY3", fraction_bits=30))
    exact = np.asarray(function(weights, x))
    found, by_chance = fixed.decode(on_shares(*fixed.encode((weights, x)))), fixed.clear(weights, x, seed=7)
    for ours in (found, by_chance):
        assert (ours - exact).std() < 1.5 * fixed.plan.error
    assert fixed.plan.error <= 3e-3
    np.testing.assert_array_equal(fixed.clear(weights, x, seed=7), by_chance)


def test_the_plan_of_the_fewest_truncations_within_the_error_is_taken():
    told: list[str] = []
    plan = secure.plan(everything, BATCHES, error=3e-3, progress=told.append)
    tries = [re.fullmatch(r"plan (\d) of up to 6: (\d+) truncations, .* error (\S+)", line) for line in told]
    assert [int(found[1]) for found in tries if found] == list(range(1, len(told) + 1))
    kept = [int(found[2]) for found in tries if found and float(found[3]) <= 3e-3]
    assert plan.truncations == min(kept)
    assert plan.error <= 3e-3
