"""Activations: the exact ones, the trained square, and the published GeLU approximations that need no training.

What costs in MPC is comparisons (x < a takes the bits of every element: about as much as ten products) and the number
of products in sequence. `quad` has neither: after folding it is one squaring.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxmpc.nn.parts import Registry

X = Float[Array, "*shape"]


class SquareForm(NamedTuple):
    """An activation as one square: f(x) = (scale x + shift)^2 + offset, which folds into the layers around it."""

    scale: float
    shift: float
    offset: float


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation and what is known of it.

    Attributes:
        f: elementwise, any shape.
        source: where it was published.
        needs_distillation: whether a fine-tuned GeLU model loses accuracy when this part replaces its own.
        input_range: inputs on which the secure result is within 0.01 of plaintext (FM64, 18 fraction bits).
        max_gelu_error: largest |f(x) - erf-GeLU(x)| on [-8, 8]; None for what is no approximation of it.
        square_form: see `SquareForm`; None if f is no square.
    """

    name: str
    f: Callable[[X], X]
    source: str
    needs_distillation: bool
    input_range: tuple[float, float] = (-8.0, 8.0)
    max_gelu_error: float | None = None
    square_form: SquareForm | None = None

    def __call__(self, x: X) -> X:
        return self.f(x)


def _polynomial(x: X, *coefficients: float) -> X:
    """Horner's rule, highest power first."""
    y = jnp.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + c
    return y


def _step(condition: Array) -> Array:
    return condition.astype(jnp.float32)


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


def silu(x: X) -> X:
    """x / (1 + exp(-x)): exact. On shares it takes a comparison, an exponential and a division.

    From 20 on 1 / (1 + exp(-x)) is 1 in float32. Without the bound it is 0 on shares beyond 500.
    """
    return x * jax.nn.sigmoid(jnp.minimum(x, 20.0))


def quad(x: X) -> X:
    """0.125 x^2 + 0.25 x + 0.5 = 0.125 (x + 1)^2 + 0.375. One squaring; folded, nothing more."""
    return 0.125 * x * x + 0.25 * x + 0.5


def square(x: X) -> X:
    """x^2: what `quad` is after folding. One squaring."""
    return x * x


def gelu_puma(x: X) -> X:
    """Piecewise: 0, a cubic, an even sextic + x/2, x, with edges at -4, -1.95, 3. Three comparisons, five products."""
    cubic = _polynomial(x, -0.011034134030615728, -0.11807612951181953, -0.42226581151983866, -0.5054031199708174)
    x2 = x * x
    sextic = (
        x2 * _polynomial(x2, 0.0018067462606141187, -0.037688200365904236, 0.3603292692789629)
        + 0.5 * x
        + 0.008526321541038084
    )
    above_low, above_middle, above_high = _step(x >= -4.0), _step(x >= -1.95), _step(x > 3.0)
    return (above_low - above_middle) * cubic + (above_middle - above_high) * sextic + above_high * x


def gelu_bumblebee(x: X) -> X:
    """A quartic of a = |x| where a < 3, + x/2; relu beyond. Two comparisons, five products."""
    a = jnp.abs(x)
    quartic = _polynomial(
        a,
        0.020848611754127593,
        -0.18352506127082727,
        0.5410550166368381,
        -0.03798164612714154,
        0.001620808531841547,
    )
    return jax.lax.select(a < 3.0, quartic + 0.5 * x, jax.nn.relu(x))


def gelu_bolt(x: X) -> X:
    """A quartic of a = |x| where a < 2.7, in two products (P = (g0 a + g1) a + g2; (P + g0 a + g3) P + g4), + x/2."""
    g0, g1, g2 = 0.14439048359960427, -0.7077117131613893, 4.5702822654246535
    g3, g4 = -8.15444702051307, 16.382265425072532
    a = jnp.abs(x)
    p = (g0 * a + g1) * a + g2
    return jax.lax.select(a < 2.7, (p + g0 * a + g3) * p + g4 + 0.5 * x, jax.nn.relu(x))


def _sine_series(theta: X, coefficients: tuple[float, ...]) -> X:
    """sum_k b_k sin(k theta), k from 1.

    A sine sends as much as 20 products (ABY3), so one and a cosine are taken, together, and the rest follows from them:
    sin 2jt = 2 sin jt cos jt, sin (2j+1)t = 2 sin (j+1)t cos jt - sin t, and so for the cosines; 3 products in sequence
    reach 8t.
    """
    sine, cosine = jnp.sin(jnp.stack((theta, theta + math.pi / 2)))
    sines, cosines = [sine], [cosine]  # of (k + 1) theta
    for k in range(2, len(coefficients) + 1):
        low, high = k // 2 - 1, (k + 1) // 2 - 1
        even = k % 2 == 0
        sines.append(2 * sines[high] * cosines[low] - (0.0 if even else sine))
        cosines.append(2 * cosines[high] * cosines[low] - (1.0 if even else cosine))
    return sum((b * s for b, s in zip(coefficients, sines, strict=True)), jnp.zeros(()))


def gelu_secformer(x: X) -> X:
    """x/2 (1 + erf(z)), z = x / sqrt 2, erf(z) a 7-term Fourier series where |z| < 1.7, the sign beyond.

    Two comparisons, a sine and a cosine, which SPU takes without a comparison, and their multiples.
    """
    z = x / math.sqrt(2.0)
    low, high = _step(z > -1.7), _step(z >= 1.7)
    inside = low - high
    # Outside the interval the series is not used, and its angles would leave the range of SPU's sine.
    series = _sine_series(
        math.pi / 10.0 * z * inside, (1.25772, -0.0299154, 0.382155, -0.0519123, 0.196033, -0.0624557, 0.118029)
    )
    return 0.5 * x * (low + high + inside * series)


def gelu_shaft(x: X) -> X:
    """relu(x) + [|x| < 4] sum_k b_k sin(2 pi k |x| / 8), eight terms.

    Two comparisons, a sine and a cosine, and their multiples.
    """
    a = jnp.abs(x)
    inside = _step(a < 4.0)
    series = _sine_series(
        math.pi / 4.0 * a * inside, (-0.0818, -0.0809, -0.0424, -0.0176, -0.0079, -0.0043, -0.0026, -0.0017)
    )
    return jax.nn.relu(x) + inside * series


def gelu_nimbus(x: X) -> X:
    """0 below -1.8, x above 0.5, one quadratic between. Two comparisons, two products in sequence."""
    low, high = _step(x >= -1.8), _step(x > 0.5)
    quadratic = _polynomial(x, 0.17025471961795552, 0.32421075145645123, -0.006946478426716862)
    return (low - high) * quadratic + high * x


ACTIVATIONS: Registry[Activation] = Registry(
    "activation",
    Activation,
    # HF has several names, and forms of code, for one function.
    also={
        **dict.fromkeys(
            ("gelu_accurate", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh"
        ),
        "gelu_python": "gelu",
        "swish": "silu",
    },
)

ACTIVATIONS.register(Activation("gelu", gelu_erf, "exact", needs_distillation=False, max_gelu_error=0.0))
ACTIVATIONS.register(Activation("gelu_tanh", gelu_tanh, "exact", False, input_range=(-7.0, 7.0), max_gelu_error=0.0005))
ACTIVATIONS.register(Activation("relu", relu, "exact", needs_distillation=True))
ACTIVATIONS.register(Activation("silu", silu, "exact", needs_distillation=True))
ACTIVATIONS.register(
    Activation(
        "quad",
        quad,
        "MPCFormer, arXiv 2211.01452 (the one it trains with)",
        needs_distillation=True,
        square_form=SquareForm(math.sqrt(0.125), math.sqrt(0.125), 0.375),
    )
)
ACTIVATIONS.register(Activation("square", square, "quad, folded", True, square_form=SquareForm(1.0, 0.0, 0.0)))
ACTIVATIONS.register(
    Activation("gelu_puma", gelu_puma, "PUMA, arXiv 2307.12533", needs_distillation=False, max_gelu_error=0.020)
)
ACTIVATIONS.register(
    Activation(
        "gelu_bumblebee", gelu_bumblebee, "BumbleBee, NDSS 2025", needs_distillation=False, max_gelu_error=0.0053
    )
)
ACTIVATIONS.register(
    Activation("gelu_bolt", gelu_bolt, "BOLT, IEEE S&P 2024", needs_distillation=False, max_gelu_error=0.0094)
)
ACTIVATIONS.register(
    Activation("gelu_secformer", gelu_secformer, "SecFormer, ACL Findings 2024", False, max_gelu_error=0.020)
)
ACTIVATIONS.register(Activation("gelu_shaft", gelu_shaft, "SHAFT, NDSS 2025", False, max_gelu_error=0.0045))
ACTIVATIONS.register(
    Activation("gelu_nimbus", gelu_nimbus, "Nimbus, NeurIPS 2024", needs_distillation=True, max_gelu_error=0.17)
)
