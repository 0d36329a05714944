"""Activations: the exact ones, the trained square, and the published GeLU approximations that need no training.

What costs in MPC is comparisons (x < a takes the bits of every element: as much as two products, and the rounds of
three) and the number of products in sequence. `quad` has neither: after folding it is one squaring.

So the parts compare at once what can be compared at once (`jnp.stack` costs nothing), and multiply with the bit itself:
`jnp.where(bit, y, 0)`, or a product of a boolean, needs no truncation, while a bit that was added to another one as a
float is a number like any other (three pieces of 128 x 3072 numbers, ABY3: 907 MB, by bits 307 MB).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from flaxmpc.nn.parts import Registry

X = Float[Array, "*shape"]


class SquareForm(NamedTuple):
    """An activation as one square: f(x) = (scale x + shift)^2 + offset, which folds into the layers around it."""

    scale: float
    shift: float
    offset: float


@runtime_checkable
class ActivationPart(Protocol):
    """What an own activation must have: a name and one call, elementwise on any shape. `Squares` is more."""

    @property
    def name(self) -> str: ...

    def __call__(self, x: X) -> X: ...


@runtime_checkable
class Squares(ActivationPart, Protocol):
    """An activation that may be a square: `square_form`, or None if it is none."""

    @property
    def square_form(self) -> SquareForm | None: ...


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation and what is known of it.

    Attributes:
        f: elementwise, any shape.
        source: the paper that published it.
        input_range: inputs on which the secure result is within 0.01 of plaintext (FM64, 18 fraction bits).
        max_gelu_error: largest |f(x) - erf-GeLU(x)| on [-8, 8]; None for what is no approximation of it.
        square_form: f as a `SquareForm`; None if it is no square.
    """

    name: str
    f: Callable[[X], X]
    source: str
    input_range: tuple[float, float] = (-8.0, 8.0)
    max_gelu_error: float | None = None
    square_form: SquareForm | None = None

    def __call__(self, x: X) -> X:
        return self.f(x)


def _sums(rows: Sequence[Sequence[float]], *terms: X) -> tuple[X, ...]:
    """For each row the sum of the terms by its coefficients: one product of matrices, so one truncation for each."""
    return tuple(jnp.tensordot(jnp.array(rows), jnp.stack(terms), 1, precision="highest"))


def _below(edges: Sequence[float], *xs: X) -> Bool[Array, "edge *shape"]:
    """Whether each x is below its edge, in one comparison."""
    return jnp.stack(xs) < jnp.array(edges).reshape(-1, *[1] * xs[0].ndim)


def _pieces(inside: Sequence[Bool[Array, "*shape"]], *values: X) -> X:
    """The sum of the values, each where its bit is set."""
    return functools.reduce(jnp.add, jnp.where(jnp.stack(inside), jnp.stack(values), 0.0))


def gelu_erf(x: X) -> X:
    """x/2 (1 + erf(x / sqrt 2)): exact. Not as x/2 erfc(-x / sqrt 2), which is how JAX has it: that takes longer to
    train, and 2.6 times the bytes (ABY3), as SPU has an erf of its own but no erfc.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def gelu_tanh(x: X) -> X:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). SPU's tanh is off by up to 0.003, and x/2 multiplies that."""
    return jax.nn.gelu(x, approximate=True)


def relu(x: X) -> X:
    """max(x, 0). One comparison, one product."""
    return jax.nn.relu(x)


def identity(x: X) -> X:
    """x itself, which PriViT has in GELU's place for some tokens of a layer; ours has it for all of a layer's.

    Of a lazy state nothing is computed: the matrices before and behind it become one.
    """
    return x


def silu(x: X) -> X:
    """x / (1 + exp(-x)): exact. On shares it takes a comparison, an exponential and a division.

    From 20 on 1 / (1 + exp(-x)) is 1 in float32. Without the bound it is 0 on shares beyond 500.
    """
    return x * jax.nn.sigmoid(jnp.minimum(x, 20.0))


def quad(x: X) -> X:
    """0.125 x^2 + 0.25 x + 0.5 = 0.125 (x + 1)^2 + 0.375. One squaring; folded, nothing more."""
    return 0.125 * x * x + 0.25 * x + 0.5


def gelu_puma(x: X) -> X:
    """Piecewise: 0, a cubic, an even sextic + x/2, x, with edges at -4, -1.95, 3. Three comparisons, four products."""
    x2 = x * x
    x3, x4 = jnp.stack([x, x2]) * x2
    cubic, sextic = _sums(
        [
            (-0.42226581151983866, -0.11807612951181953, -0.011034134030615728, 0.0, 0.0),
            (0.5, 0.3603292692789629, 0.0, -0.037688200365904236, 0.0018067462606141187),
        ],
        *(x, x2, x3, x4, x4 * x2),
    )
    low, middle, high = _below((-4.0, -1.95, -3.0), x, x, -x)
    return _pieces((low ^ middle, ~(middle ^ high), high), cubic - 0.5054031199708174, sextic + 0.008526321541038084, x)


def gelu_bumblebee(x: X) -> X:
    """A quartic of a = |x| where a < 3, + x/2; relu beyond. Two comparisons, three products.

    As relu(x) = (x + a) / 2, that is (x + a) / 2 + [a < 3] (quartic - a/2).
    """
    a, a2 = jnp.abs(x), x * x
    a3, a4 = jnp.stack([a, a2]) * a2
    (inner,) = _sums(
        [(-0.03798164612714154 - 0.5, 0.5410550166368381, -0.18352506127082727, 0.020848611754127593)], a, a2, a3, a4
    )
    return 0.5 * (x + a) + jnp.where(a < 3.0, inner + 0.001620808531841547, 0.0)


def gelu_bolt(x: X) -> X:
    """A quartic of a = |x| where a < 2.7, in two products (P = (g0 a + g1) a + g2; (P + g0 a + g3) P + g4), + x/2.

    Beyond, relu(x) = (x + a) / 2. Two comparisons.
    """
    g0, g1, g2 = 0.14439048359960427, -0.7077117131613893, 4.5702822654246535
    g3, g4 = -8.15444702051307, 16.382265425072532
    a = jnp.abs(x)
    scaled, half, relu = _sums([(0.0, g0), (0.0, 0.5), (0.5, 0.5)], x, a)
    p = (scaled + g1) * a + g2
    return relu + jnp.where(a < 2.7, (p + scaled + g3) * p + g4 - half, 0.0)


def _sine_series(theta: X, coefficients: Sequence[float]) -> X:
    """sum_k b_k sin(k theta), k from 1.

    A sine sends as much as 20 products (ABY3), so one and a cosine are taken, together. The rest follows from them:
    sin k theta / sin theta is a polynomial in cos theta, Chebyshev's of the second kind, and so is their sum.
    """
    last, kind = np.zeros(1), np.ones(1)
    total = np.zeros(len(coefficients))
    for b in coefficients:
        total[: len(kind)] += b * kind
        last, kind = kind, np.polynomial.polynomial.polysub(np.convolve((0.0, 2.0), kind), last)
    sine, cosine = jnp.sin(jnp.stack((theta, theta + math.pi / 2)))
    powers, degree = cosine[None], len(coefficients) - 1
    while len(powers) < degree:
        powers = jnp.concatenate([powers, powers[: degree - len(powers)] * powers[-1]])
    (inner,) = _sums([total[1:].tolist()], *powers)
    return sine * (inner + total[0])


def gelu_secformer(x: X) -> X:
    """x/2 (1 + erf(z)), z = x / sqrt 2, erf(z) a 7-term Fourier series where |z| < 1.7, the sign beyond.

    Two comparisons, a sine and a cosine, which SPU takes without a comparison, and their multiples. As erf is odd, with
    a = |x| that is (x + a) / 2 + [a < 1.7 sqrt 2] a/2 (series(a / sqrt 2) - 1).
    """
    a = jnp.abs(x)
    inside = a < 1.7 * math.sqrt(2.0)
    relu, half, angle = _sums([(0.5, 0.5), (0.0, 0.5), (0.0, math.pi / 10.0 / math.sqrt(2.0))], x, a)
    # Outside the interval the series is not used, and its angles would leave the range of SPU's sine.
    half, angle = jnp.where(inside, jnp.stack([half, angle]), 0.0)
    series = _sine_series(angle, (1.25772, -0.0299154, 0.382155, -0.0519123, 0.196033, -0.0624557, 0.118029))
    return relu + half * (series - 1.0)


def gelu_shaft(x: X) -> X:
    """relu(x) + [|x| < 4] sum_k b_k sin(2 pi k |x| / 8), eight terms; relu(x) = (x + |x|) / 2.

    Two comparisons, a sine and a cosine, and their multiples. At an angle of 0 the series is 0.
    """
    a = jnp.abs(x)
    relu, angle = _sums([(0.5, 0.5), (0.0, math.pi / 4.0)], x, a)
    angle = jnp.where(a < 4.0, angle, 0.0)
    return relu + _sine_series(angle, (-0.0818, -0.0809, -0.0424, -0.0176, -0.0079, -0.0043, -0.0026, -0.0017))


def gelu_nimbus(x: X) -> X:
    """0 below -1.8, x above 0.5, one quadratic between. Two comparisons, one product."""
    (quadratic,) = _sums([(0.32421075145645123, 0.17025471961795552)], x, x * x)
    low, high = _below((-1.8, -0.5), x, -x)
    return _pieces((~(low ^ high), high), quadratic - 0.006946478426716862, x)


ACTIVATIONS: Registry[Any] = Registry(
    "activation",
    ActivationPart,
    # HF has several names, and forms of code, for one function.
    also={
        **dict.fromkeys(
            ("gelu_accurate", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh"
        ),
        "gelu_python": "gelu",
        "swish": "silu",
    },
)

ACTIVATIONS.register(Activation("gelu", gelu_erf, "exact", max_gelu_error=0.0))
ACTIVATIONS.register(Activation("gelu_tanh", gelu_tanh, "exact", input_range=(-7.0, 7.0), max_gelu_error=0.0005))
ACTIVATIONS.register(Activation("relu", relu, "exact"))
ACTIVATIONS.register(Activation("tanh", jnp.tanh, "exact"))
IDENTITY = ACTIVATIONS.register(Activation("identity", identity, "PriViT, TMLR 2024, arXiv 2310.04604"))
ACTIVATIONS.register(Activation("silu", silu, "exact"))
ACTIVATIONS.register(
    Activation(
        "quad",
        quad,
        "MPCFormer, arXiv 2211.01452 (the one it trains with)",
        square_form=SquareForm(math.sqrt(0.125), math.sqrt(0.125), 0.375),
    )
)
ACTIVATIONS.register(Activation("gelu_puma", gelu_puma, "PUMA, arXiv 2307.12533", max_gelu_error=0.020))
ACTIVATIONS.register(Activation("gelu_bumblebee", gelu_bumblebee, "BumbleBee, NDSS 2025", max_gelu_error=0.0053))
ACTIVATIONS.register(Activation("gelu_bolt", gelu_bolt, "BOLT, IEEE S&P 2024", max_gelu_error=0.0094))
ACTIVATIONS.register(Activation("gelu_secformer", gelu_secformer, "SecFormer, ACL Findings 2024", max_gelu_error=0.020))
ACTIVATIONS.register(Activation("gelu_shaft", gelu_shaft, "SHAFT, NDSS 2025", max_gelu_error=0.0045))
ACTIVATIONS.register(Activation("gelu_nimbus", gelu_nimbus, "Nimbus, NeurIPS 2024", max_gelu_error=0.17))
