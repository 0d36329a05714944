import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc import secure
from flaxmpc.nn.layers import Norm
from flaxmpc.nn.lazy import Unit, square_mean_by_product
from flaxmpc.nn.normalization import NORMALIZATIONS, Chebyshev, Clipped, ConstantRoot, InverseRoot, Ranged, variance
from flaxmpc.nn.product import grouped_conv, matmul, rows_together

HIDDEN = 384
NARROW, WIDE = Chebyshev(low=0.5, high=2.0, depth=3), Chebyshev().calibrated(jnp.array([0.28, 45.0]))
DIVIDING = {name: part for name, part in NORMALIZATIONS.items() if isinstance(part, InverseRoot)}
PARTS = {**DIVIDING, "narrow": NARROW, "wide": WIDE}
every_part = pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
every_chebyshev = pytest.mark.parametrize(
    "part",
    [part for part in PARTS.values() if isinstance(part, Chebyshev)],
    ids=lambda part: f"{part.low:g}-{part.high:g}",
)


def variance_range(part):
    return getattr(part, "low", 1e-2), getattr(part, "high", 1e3)


def inputs(part, rows=20):
    """Rows with variances all over the part's range, the ends included, and means of about a third of a deviation."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, HIDDEN))
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    x = (x + 0.3 * rng.normal(size=(rows, 1))) * np.sqrt(np.geomspace(*variance_range(part), rows))[:, None]
    params = {"scale": rng.uniform(0.5, 1.5, HIDDEN), "bias": rng.normal(size=HIDDEN)}
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), (params, x))


def formula(params, x, epsilon, centres=True):
    x = x.astype(np.float64)
    x = x - x.mean(-1, keepdims=True) if centres else x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * params["scale"] + params["bias"]


def layer(part, epsilon=1e-12):
    def run(params, x) -> Any:
        return Norm(part, epsilon).apply({"params": params}, x)

    return run


@pytest.mark.parametrize("epsilon", [1e-12, 0.1])
def test_exact_values_are_those_of_the_formula(epsilon):
    params, x = inputs(NORMALIZATIONS["layer_norm"])
    ours = layer(NORMALIZATIONS["layer_norm"], epsilon)(params, jnp.asarray(x))
    np.testing.assert_allclose(ours, formula(params, x, epsilon), atol=2e-5)


@every_part
def test_values_are_within_the_stated_error_of_the_formula(part):
    params, x = inputs(part)
    error = part.relative_error() if isinstance(part, Chebyshev) else 0.0
    assert error < 2e-3
    expected = formula(params, x, 1e-12, part.centres)
    ours = layer(part)(params, jnp.asarray(x))
    bound = error * np.abs(expected - params["bias"]) + 3e-5
    assert (np.abs(ours - expected) <= bound).all()


def test_fresh_parameters_change_nothing_but_mean_and_variance():
    _, x = inputs(NORMALIZATIONS["layer_norm"])
    y, variables = Norm().init_with_output(jax.random.key(0), jnp.asarray(x))
    np.testing.assert_allclose(y.mean(-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(y.var(-1), 1.0, atol=1e-4)
    assert jax.tree.map(jnp.shape, variables["params"]) == {"scale": (HIDDEN,), "bias": (HIDDEN,)}


@every_part
def test_the_variance_is_what_the_part_meets(part):
    _, x = inputs(part)
    mean_square = (x.astype(np.float64) ** 2).mean(-1)
    expected = mean_square - part.centres * x.astype(np.float64).mean(-1) ** 2
    np.testing.assert_allclose(np.ravel(variance(part, jnp.asarray(x))), expected, rtol=1e-4)


@pytest.mark.parametrize("depth", range(1, 8))
@pytest.mark.parametrize("ratio", [1.5, 30.0])
def test_every_depth_is_as_near_as_it_states(depth, ratio, group):
    part = Chebyshev(low=0.4, high=0.4 * ratio, depth=depth)
    part = part.scaled(part.preferred_factor)
    v = np.geomspace(part.low, part.high, 501, dtype=np.float32)
    error = part.relative_error()
    rho = (ratio**0.5 + 1.0) / (ratio**0.5 - 1.0)  # of the Bernstein ellipse that ends at the pole, v = 0
    assert error < 2.0 * rho ** -(2.0**depth) + 1e-13
    for run in (jax.jit(part.inverse_root), secure.jit(part.inverse_root, parties=group("REF2K"))):
        seen = np.abs(np.asarray(run(v), np.float64) * np.sqrt(v.astype(np.float64)) - 1.0).max()
        assert 0.9 * error - 2e-4 <= seen <= error + 2e-4


@every_chebyshev
def test_chebyshev_is_the_inverse_square_root_within_its_stated_error(part):
    values = np.geomspace(part.low, part.high, 5001, dtype=np.float32)
    seen = np.abs(
        np.asarray(part.inverse_root(jnp.asarray(values)), np.float64) * np.sqrt(values.astype(np.float64)) - 1.0
    ).max()
    rounded = 2.0**-24 * part.high / part.low  # t is near -1 in float32
    assert seen <= part.relative_error() + rounded + 2e-6
    assert seen >= 0.5 * part.relative_error() - rounded - 2e-6
    assert part.relative_error() < 2e-3


@pytest.mark.parametrize("depth", range(1, 8))
@pytest.mark.parametrize("ratio", [1.5, 30.0, 400.0])
def test_the_strain_tells_wherever_the_root_is_wrong(depth, ratio, group):
    """As opened: a mean fourth power of the strain below 1 bounds the mean square of the error by those in range."""
    part = Chebyshev(low=0.4, high=0.4 * ratio, depth=depth)
    part = part.scaled(part.preferred_factor)
    error = part.relative_error()
    width = part.high - part.low
    below = np.linspace(max(0.0, part.low - 0.05 * width), part.low, 200)[:-1]
    outside = np.concatenate([below, part.high + width * np.geomspace(1e-4, 0.05, 200)])
    inside = np.linspace(part.low, part.high, 200)
    for v, within in ((outside, False), (inside, True)):
        root, strain = map(np.float64, jax.jit(part.strained)(v.astype(np.float32)))
        off = np.abs(root * np.sqrt(v) - 1.0)
        assert (off <= 8.0 * error * np.maximum(1.0, 2.0 * strain**2) + 1e-4).all()
        assert (np.abs(strain) <= 1.0 + 1e-4).all() == within
    wrong = jnp.array([part.low + 3.0 * width, 1e3 * width])
    _, strain = secure.jit(part.strained, parties=group("REF2K"))(wrong)
    assert (np.abs(strain) > 2.0).all()


def test_clipped_is_the_part_in_its_range_and_the_end_of_it_outside():
    part = Chebyshev(low=0.2, high=3.0)
    inside = jnp.array([0.2, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(Clipped(part).inverse_root(inside), part.inverse_root(inside), rtol=1e-6)
    outside = jnp.array([0.0, 0.1, 40.0, 1e30])
    np.testing.assert_allclose(
        Clipped(part).inverse_root(outside), part.inverse_root(inside)[jnp.array([0, 0, 3, 3])], rtol=1e-6
    )
    assert not np.isfinite(part.inverse_root(jnp.array(1e30)))
    assert jax.grad(Clipped(part).inverse_root)(1e30) == 0.0


def test_a_constant_is_nearest_to_the_layer_norm_of_the_variances_seen():
    variances = np.array([[0.5], [1.0], [8.0]])
    part = ConstantRoot().calibrated(variances)

    def off(inverse):
        return ((inverse * np.sqrt(variances) - 1.0) ** 2).sum()

    assert off(part.inverse) < min(off(part.inverse * 0.99), off(part.inverse * 1.01))
    assert ConstantRoot().calibrated(np.array([4.0])).inverse == pytest.approx(0.5)
    x = jnp.array([[1.0, 3.0, 5.0]])
    np.testing.assert_allclose(part(x, 1e-12), [[-2 * part.inverse, 0.0, 2 * part.inverse]], rtol=1e-6)


@pytest.mark.parametrize("inverse", [0.0, -1.0, math.inf, math.nan])
def test_a_constant_that_is_no_inverse_root_is_refused(inverse):
    with pytest.raises(ValueError, match="layer_norm_constant needs a positive and finite inverse, not"):
        ConstantRoot(inverse=inverse)


def test_the_parts_that_need_a_range_are_known():
    assert [name for name, part in NORMALIZATIONS.items() if isinstance(part, Ranged)] == ["layer_norm_chebyshev"]
    assert not isinstance(Clipped(NARROW), Ranged)


def test_deeper_is_more_exact():
    errors = [Chebyshev(depth=depth).relative_error() for depth in (3, 4, 5, 6)]
    assert all(later < 2 * earlier**2 for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize(("low", "high"), [(0.14, 1.9), (0.9, 1.1), (5.0, 50.0), (0.3, 50.0)])
def test_calibrated_covers_the_variances_with_a_margin_and_no_level_too_many(low, high):
    part = Chebyshev(depth=7).calibrated(jnp.array([[high], [low], [(low * high) ** 0.5]]))
    assert part.low == pytest.approx(low / 2)
    assert part.high == pytest.approx(high * 2)
    assert part.relative_error() < 1e-3
    assert part.depth == 1 or dataclasses.replace(part, depth=part.depth - 1).relative_error() >= 1e-3


def test_calibrated_takes_margin_and_tolerance():
    part = Chebyshev().calibrated(jnp.array([1.0, 2.0]), margin=1.0, tolerance=1e-5)
    assert (part.low, part.high) == (1.0, 2.0)
    assert part.relative_error() < 1e-5


@pytest.mark.parametrize("bad", [[1.0, 0.0], [1.0, -2.0], [1.0, np.nan], [np.inf]])
@pytest.mark.parametrize("part", [Chebyshev(), ConstantRoot()])
def test_calibrated_refuses_what_is_no_variance(bad, part):
    with pytest.raises(ValueError, match="variances must be positive and finite"):
        part.calibrated(jnp.array(bad))


def test_calibrated_refuses_a_range_too_wide():
    with pytest.raises(ValueError, match=r"from 0.01 to 10000 are too wide for layer_norm_chebyshev"):
        Chebyshev().calibrated(jnp.array([0.01, 10_000.0]))


@pytest.mark.parametrize(
    "fields",
    [
        {"low": 0.0},
        {"low": -1.0},
        {"low": 2.0, "high": 2.0},
        {"depth": 0},
        {"depth": 8},
        {"high": math.nan},
        {"high": math.inf},
    ],
)
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match="layer_norm_chebyshev needs"):
        Chebyshev(**fields)


@every_part
def test_gradients_are_finite_and_those_of_layer_norm(part):
    params, x = inputs(part)

    def loss(part):
        return lambda params, x: jnp.sin(layer(part)(params, x)).sum()

    ours, exact = (
        jax.grad(loss(part), argnums=(0, 1))(params, jnp.asarray(x))
        for part in (part, NORMALIZATIONS["layer_norm" if part.centres else "rms_norm"])
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.03), ours, exact)


@every_part
def test_gradients_at_a_constant_row_are_finite(part):
    grad = jax.grad(lambda x: layer(part)({"scale": jnp.ones(4), "bias": jnp.zeros(4)}, x)[0, 0])(jnp.full((1, 4), 2.0))
    assert np.isfinite(grad).all()


def test_every_part_traces_to_a_program_of_its_own():
    params, x = inputs(NARROW)

    def programs():
        return {name: jax.jit(layer(part)).lower(params, x).as_text() for name, part in PARTS.items()}

    first = programs()
    assert programs() == first  # the text is that of the program alone
    assert len(set(first.values())) == len(PARTS)


@pytest.mark.parametrize("protocol", ["REF2K", "ABY3"])
@every_part
def test_secure_result_is_within_a_hundredth_on_the_stated_range(part, protocol, group):
    params, x = inputs(part)
    plain = layer(part)(params, jnp.asarray(x))
    ours = secure.jit(layer(part), parties=group(protocol))(params, x)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=0.01)


@every_chebyshev
def test_chebyshev_takes_fewer_rounds_than_the_exact_part(part, group):
    exact, chebyshev = (
        secure.jit(layer(p), parties=group("ABY3")).run(*inputs(NARROW)).cost
        for p in (NORMALIZATIONS["layer_norm"], part)
    )
    print(f"LayerNorm, ABY3: {exact.rounds:.1f} rounds exact, {chebyshev.rounds:.1f} at depth {part.depth}")
    assert chebyshev.rounds < exact.rounds
    assert chebyshev.bytes_sent < 1.01 * exact.bytes_sent  # the deepest sends as many


@pytest.mark.parametrize("product", [matmul, grouped_conv])
@pytest.mark.parametrize("shape", [(1, 16), (5, 16), (2, 3, 16), (2, 20, 16), (7, 24), (29, 24), (2, 384, 33)])
def test_square_mean_divides_by_the_next_power_of_two(shape, product):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = (x.astype(np.float64) ** 2).sum(-1, keepdims=True) / {16: 16, 24: 32, 33: 64}[shape[-1]]
    np.testing.assert_allclose(square_mean_by_product(jnp.asarray(x), product), expected, rtol=1e-5)


@pytest.mark.parametrize(("rows", "together"), [(1, 1), (16, 1), (32, 2), (128, 8), (512, 32), (127, 127)])
def test_grouped_products_take_few_rows_each(rows, together):
    assert rows_together(rows, grouped_conv) == together
    assert rows_together(rows, matmul) == rows


def test_square_mean_by_product_sends_fewer_bytes_where_rows_are_few(group):
    x = np.ones((8, HIDDEN), np.float32)
    apart, product = (
        secure.jit(squares, parties=group("ABY3")).run(x).cost
        for squares in (lambda x: jnp.square(x).mean(-1, keepdims=True), square_mean_by_product)
    )
    print(f"mean square of 8 x {HIDDEN}, ABY3: {apart.bytes_sent} bytes, by product {product.bytes_sent}")
    assert product.bytes_sent < apart.bytes_sent / 4


@every_part
def test_scale_and_unit_are_factors(part, group):
    low, high = variance_range(part)
    values = jnp.geomspace(low, high, 16)[:, None]
    u = jnp.linspace(0.3, 2.0, 16)[:, None]
    scale = jnp.linspace(-1.0, 1.0, 16)[:, None]

    def run(values, scale, u):
        unit = Unit(u, 1.0 / u, 1.0 / u**2)
        root = part.inverse_root
        return root(values, scale), root(values * u**2, unit=unit), root(values * u**2, scale, unit)

    root = part.inverse_root(values)
    for ours, theirs in zip(run(values, scale, u), (scale * root, root / u, scale * root / u), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
