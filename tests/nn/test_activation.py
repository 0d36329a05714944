"""Formulas are written here on their own, from the papers, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc import secure
from flaxmpc.nn.activation import ACTIVATIONS

every_part = pytest.mark.parametrize("part", ACTIVATIONS.values(), ids=ACTIVATIONS)


def _erf_gelu(x):
    return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _puma(x):
    cubic = -0.011034134030615728 * x**3 - 0.11807612951181953 * x**2 - 0.42226581151983866 * x - 0.5054031199708174
    sextic = (
        0.0018067462606141187 * x**6
        - 0.037688200365904236 * x**4
        + 0.3603292692789629 * x**2
        + 0.5 * x
        + 0.008526321541038084
    )
    return np.select([x < -4, x < -1.95, x <= 3], [0 * x, cubic, sextic], x)


def _bumblebee(x):
    a = abs(x)
    inner = (
        0.020848611754127593 * a**4
        - 0.18352506127082727 * a**3
        + 0.5410550166368381 * a**2
        - 0.03798164612714154 * a
        + 0.001620808531841547
        + 0.5 * x
    )
    return np.where(a < 3, inner, np.maximum(x, 0))


def _bolt(x):
    a = abs(x)
    g = [0.14439048359960427, -0.7077117131613893, 4.5702822654246535, -8.15444702051307, 16.382265425072532]
    p = (g[0] * a + g[1]) * a + g[2]
    return np.where(a < 2.7, (p + g[0] * a + g[3]) * p + g[4] + 0.5 * x, np.maximum(x, 0))


def _secformer(x):
    z = x / math.sqrt(2)
    b = [1.25772, -0.0299154, 0.382155, -0.0519123, 0.196033, -0.0624557, 0.118029]
    series = sum(bk * np.sin(k * math.pi * z / 10) for k, bk in enumerate(b, 1))
    return x / 2 * (1 + np.where(abs(z) < 1.7, series, np.sign(z)))


def _shaft(x):
    b = [-0.0818, -0.0809, -0.0424, -0.0176, -0.0079, -0.0043, -0.0026, -0.0017]
    series = sum(bk * np.sin(2 * math.pi * k * abs(x) / 8) for k, bk in enumerate(b, 1))
    return np.maximum(x, 0) + (abs(x) < 4) * series


FORMULAS = {
    "gelu": _erf_gelu,
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x * (x > 0),
    "tanh": np.tanh,
    "identity": lambda x: x,
    "silu": lambda x: x / (1 + np.exp(np.minimum(-x, 700))),
    "quad": lambda x: 0.125 * x**2 + 0.25 * x + 0.5,
    "gelu_puma": _puma,
    "gelu_bumblebee": _bumblebee,
    "gelu_bolt": _bolt,
    "gelu_secformer": _secformer,
    "gelu_shaft": _shaft,
    "gelu_nimbus": lambda x: np.select(
        [x < -1.8, x > 0.5], [0 * x, x], 0.17025471961795552 * x**2 + 0.32421075145645123 * x - 0.006946478426716862
    ),
}

EDGES = np.array([-4.0, -3.0, -2.7, -1.95, -1.8, 0.0, 0.5, 1.7, 2.7, 3.0, 4.0, 1.7 * math.sqrt(2), -1.7 * math.sqrt(2)])


def grid(part, points=1000):
    """The part's range: evenly, and on, just below and just above every edge of a piece."""
    edges = EDGES.astype(np.float32)
    near = np.concatenate([edges, np.nextafter(edges, np.float32(-9)), np.nextafter(edges, np.float32(9))])
    low, high = part.input_range
    x = np.concatenate([np.linspace(low, high, points, dtype=np.float32), near])
    return x[(x >= low) & (x <= high)]


def test_every_part_has_a_formula_here():
    assert set(FORMULAS) == set(ACTIVATIONS)


@every_part
def test_values_are_those_of_the_formula(part):
    x = np.concatenate([grid(part), np.linspace(-30, 30, 501, dtype=np.float32)])
    # On the edge itself float32 may take the other piece, which gives nearly the same.
    on_edge = np.abs(x[:, None] - EDGES).min(-1) < 1e-6
    ours, theirs = np.asarray(part(jnp.asarray(x))), FORMULAS[part.name](x.astype(np.float64))
    np.testing.assert_allclose(ours[~on_edge], theirs[~on_edge], rtol=2e-6, atol=3e-6)
    np.testing.assert_allclose(ours[on_edge], theirs[on_edge], atol=0.02)


@every_part
def test_shapes_are_kept(part):
    for shape in [(), (3,), (2, 3, 4)]:
        assert part(jnp.ones(shape)).shape == shape


@every_part
def test_the_stated_distance_from_gelu_is_true_and_tight(part):
    x = np.linspace(-8, 8, 20001, dtype=np.float32)
    distance = np.abs(np.asarray(part(jnp.asarray(x)), np.float64) - _erf_gelu(x.astype(np.float64))).max()
    if part.max_gelu_error is not None:
        assert distance <= part.max_gelu_error + 2e-6
        assert distance >= 0.9 * part.max_gelu_error


@every_part
def test_gradients_are_finite_and_not_zero(part):
    x = jnp.asarray(np.concatenate([grid(part), [-100.0, 100.0]], dtype=np.float32))
    grad = jax.vmap(jax.grad(part))(x)
    assert np.isfinite(grad).all()
    assert np.abs(grad).max() > 0.9


def test_every_part_traces_to_a_program_of_its_own():
    def programs():
        return {name: jax.jit(part).lower(jnp.ones((2, 3))).as_text() for name, part in ACTIVATIONS.items()}

    first = programs()
    assert programs() == first  # the text is that of the program alone
    assert len(set(first.values())) == len(ACTIVATIONS)


@every_part
def test_the_stated_square_is_the_function(part):
    if part.name == "identity":
        assert part.square_form is None
    elif part.square_form is None:
        x = np.linspace(-8, 8, 5)
        assert np.abs(np.diff(FORMULAS[part.name](x), 3)).max() > 1e-3  # no square: the third difference is not 0
    else:
        x = np.linspace(-100, 100, 201, dtype=np.float32)
        scale, shift, offset = part.square_form
        ours = np.asarray(part(jnp.asarray(x)))
        np.testing.assert_allclose(ours, (scale * x.astype(np.float64) + shift) ** 2 + offset, rtol=1e-5, atol=1e-5)


def test_gelu_costs_less_than_the_one_of_jax(group):
    x = np.linspace(-100, 100, 401, dtype=np.float32)
    forms = (lambda x: jax.nn.gelu(x, approximate=False), ACTIVATIONS["gelu"])
    runs = [secure.jit(form, parties=group("ABY3")).run(x) for form in forms]
    assert np.abs(runs[0].output - runs[1].output).max() < 0.002
    assert runs[1].cost.bytes_sent < 0.4 * runs[0].cost.bytes_sent
    assert runs[1].cost.rounds < 0.4 * runs[0].cost.rounds


# Bytes of a number and rounds in ABY3. A comparison is 108 and 8, a product with its bit 64 and 2.7, a product 52 and
# 2.7, a sum of what is there already 28 and 1.7.
COST = {
    "relu": (172, 11),
    "gelu_puma": (780, 21),
    "gelu_bumblebee": (548, 30),
    "gelu_bolt": (524, 28),
    "gelu_secformer": (3028, 75),
    "gelu_shaft": (2936, 73),
    "gelu_nimbus": (424, 15),
}


@pytest.mark.parametrize("name", COST)
def test_comparisons_multiply_as_bits(name, group):
    x = np.linspace(-4, 4, 1024, dtype=np.float32).reshape(1, 16, 64)  # as in a layer: (batch, token, hidden)
    cost = secure.jit(ACTIVATIONS[name], parties=group("ABY3")).run(x).cost
    print(f"{name}: {cost.bytes_sent / x.size:.0f} B, {cost.rounds:.1f} rounds")
    assert cost.bytes_sent / x.size <= COST[name][0]
    assert cost.rounds <= COST[name][1]


@pytest.mark.parametrize("protocol", ["REF2K", "ABY3"])
def test_silu_is_right_far_out(protocol, group):
    x = np.array([-30000, -1000, -500, -20, 19.99, 20, 20.01, 500, 600, 1000, 30000], np.float32)
    ours = secure.jit(ACTIVATIONS["silu"], parties=group(protocol))(x)
    np.testing.assert_allclose(ours, FORMULAS["silu"](x.astype(np.float64)), rtol=2e-5, atol=0.003)


@pytest.mark.parametrize("protocol", ["REF2K", "ABY3"])
@every_part
def test_secure_result_is_within_a_hundredth_on_the_stated_range(part, protocol, group):
    """An edge where the pieces do not meet may lie a few fixed-point steps off: 2^-16 in x is allowed."""
    x = grid(part)
    ours = secure.jit(part, parties=group(protocol))(x)
    plain = np.stack([part(jnp.asarray(x + step, jnp.float32)) for step in (0.0, -(2.0**-16), 2.0**-16)])
    assert np.abs(ours - plain).min(0).max() < 0.01
    on_edge = np.abs(x[:, None] - EDGES).min(-1) < 2.0**-16
    assert np.abs(ours - plain[0])[~on_edge].max() < 0.01
