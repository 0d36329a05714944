"""LayerNorm with a pluggable inverse square root: SPU's own, or Newton steps from a start that fits the data."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flaxmpc.nn.parts import Registry


class Unit(NamedTuple):
    """1/u and 1/u^2 of a variance that comes u^2 times too large."""

    inverse: Array
    inverse_square: Array


@runtime_checkable
class InverseSqrt(Protocol):
    """What an own normalisation must have: a name, and `part(v)` = 1 / sqrt(v) for positive variances of any shape.

    A folded model asks for more, with factors that broadcast against v: `scale` / sqrt(v); and where v is u^2 times
    the variance that the part was calibrated for, it says 1/u and 1/u^2 as `unit`.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, variance: Array, scale: Array | None = None, unit: Unit | None = None) -> Array: ...


@runtime_checkable
class Ranged(InverseSqrt, Protocol):
    """A part that is right only for variances on [low, high]: `calibrated` gives the one for those seen in data."""

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...

    def calibrated(self, variances: Array | np.ndarray, *, margin: float, tolerance: float) -> "Ranged":
        """See `Newton.calibrated`."""
        ...


@dataclasses.dataclass(frozen=True)
class Exact:
    """1/sqrt(v) as the backend computes it. SPU: 57 rounds a LayerNorm in ABY3, for variances of any size."""

    name: str
    f: Callable[[Array], Array] = jax.lax.rsqrt

    def __call__(self, variance: Array, scale: Array | None = None, unit: Unit | None = None) -> Array:
        y = self.f(variance)
        return y if scale is None else y * scale


@functools.lru_cache
def _linear_start(low: float, high: float, steps: int) -> tuple[float, float]:
    """(a, b) of the start y0(v) = a - b v on [low, high] with the smallest error after the Newton steps.

    With u = v y0^2, a step maps u to u (3 - u)^2 / 4, so only u's range counts. Over the slopes b/a, the widest
    ratio min u / max u is best; then a is set so that both ends are equally wrong after all steps.
    """
    v = np.geomspace(low, high, 400)
    slopes = np.concatenate([[0.0], np.geomspace(1e-4, 0.999, 400)]) / high
    shapes = v * (1.0 - slopes[:, None] * v) ** 2
    best = int(np.argmax(shapes.min(1) / shapes.max(1)))
    u_low, u_high = shapes[best].min(), shapes[best].max()

    def errors(a: float) -> tuple[float, float]:
        ends = np.array([u_low, u_high]) * a * a
        for _ in range(steps):
            ends = ends * (3.0 - ends) ** 2 / 4.0
        return abs(1.0 - ends[0]), abs(1.0 - ends[1])

    # u must stay below 3: there a step gives 0, and beyond it diverges.
    grid = np.sqrt(np.linspace(1.0, 2.999, 2000) / u_high)
    a = min(grid.tolist(), key=lambda a: max(errors(a)))
    return a, a * float(slopes[best])


# A step is 5.3 rounds in ABY3, so from 8 steps on (63 rounds a LayerNorm) the exact part takes fewer (60).
_MOST_STEPS = 7

# Of a part that somebody asks for: each is traced.
_LARGEST_STEPS = 32


@dataclasses.dataclass(frozen=True)
class Newton:
    """1/sqrt(v) by Newton's method in Goldschmidt's coupled form, from a start fitted to the variances seen in data.

    y0 = a - b v; g = v y0, h = y0 / 2; each step r = 1/2 - g h, g += g r, h += h r; 1/sqrt(v) = 2 h. One product and
    one joint product a step, no comparison, no bit decomposition. Two steps do for variances within a factor of ten;
    right only on [low, high], and diverges above, so calibrate with a margin.

    Attributes:
        low, high: the variances that it is for.
        steps: the number of steps; `relative_error` says what they reach.
    """

    name: str = "layer_norm_newton"
    low: float = 0.1
    high: float = 10.0
    steps: int = 5

    def __post_init__(self):
        if not 0.0 < self.low < self.high:
            raise ValueError(f"layer_norm_newton needs 0 < low < high, not low={self.low}, high={self.high}")
        if not 1 <= self.steps <= _LARGEST_STEPS:
            raise ValueError(f"layer_norm_newton needs 1 to {_LARGEST_STEPS} steps, not {self.steps}")

    def __call__(self, variance: Array, scale: Array | None = None, unit: Unit | None = None) -> Array:
        if unit is not None:
            variance = variance * unit.inverse_square
            scale = unit.inverse if scale is None else scale * unit.inverse
        a, b = _linear_start(self.low, self.high, self.steps)
        h = 0.5 * a - (0.5 * b) * variance  # doubled by adding: a product with 2 would be truncated
        g = variance * (h + h)
        for _ in range(self.steps - 1):
            residual = 0.5 - g * h
            g, h = jnp.stack([g, h]) * (1.0 + residual)
        if scale is None:
            h = h * (1.5 - g * h)
        else:  # h scale beside g h, so that the scale costs no round
            product, scaled = jnp.stack([g, jnp.broadcast_to(scale, h.shape)]) * h
            h = scaled * (1.5 - product)
        return h + h

    def relative_error(self) -> float:
        """The largest |y sqrt(v) - 1| on [low, high], in exact arithmetic."""
        v = np.geomspace(self.low, self.high, 10_000)
        a, b = _linear_start(self.low, self.high, self.steps)
        u = v * (a - b * v) ** 2
        for _ in range(self.steps):
            u = u * (3.0 - u) ** 2 / 4.0
        return float(np.abs(np.sqrt(u) - 1.0).max())

    def calibrated(self, variances: Array | np.ndarray, *, margin: float = 2.0, tolerance: float = 1e-3) -> "Newton":
        """The part for the variances seen in data, of any shape: their range, widened, and the steps it takes.

        Args:
            variances: what the LayerNorm met on a calibration set.
            margin: factor by which the range is widened at both ends.
            tolerance: relative error to stay under.

        Raises:
            ValueError: a variance that is not positive and finite, or a range so wide that 7 steps do not do.
        """
        seen = np.asarray(variances, np.float64)
        if not (np.isfinite(seen).all() and (seen > 0).all()):
            raise ValueError(f"variances must be positive and finite, seen from {seen.min()} to {seen.max()}")
        for steps in range(1, _MOST_STEPS + 1):
            low, high = float(seen.min()) / margin, float(seen.max()) * margin
            part = dataclasses.replace(self, low=low, high=high, steps=steps)
            if part.relative_error() < tolerance:
                return part
        raise ValueError(
            f"variances from {seen.min():g} to {seen.max():g} are too wide for layer_norm_newton: layer_norm does"
        )


@dataclasses.dataclass(frozen=True)
class Clipped:
    """A part for training: a variance outside its range counts as the range's end, where Newton diverges.

    Within the range the same function. A comparison, so not for MPC: there the range is to hold what comes.
    """

    part: Ranged

    @property
    def name(self) -> str:
        return self.part.name

    def __call__(self, variance: Array, scale: Array | None = None, unit: Unit | None = None) -> Array:
        return self.part(jnp.clip(variance, self.part.low, self.part.high), scale, unit)


NORMALIZATIONS: Registry[Any] = Registry("layer_norm", InverseSqrt)
EXACT = NORMALIZATIONS.register(Exact("layer_norm"))
NEWTON = NORMALIZATIONS.register(Newton())


def power_of_two(hidden: int) -> int:
    """The first that is not below `hidden`."""
    return 1 << (hidden - 1).bit_length()


def square_mean_by_product(x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch 1"]:
    """The sum of the squares over the last axis, divided by `power_of_two(hidden)`.

    It is taken as the diagonal of X X^T where there are fewer rows than columns: a product of matrices sends per
    element of its result, rows x rows, and truncates once, where the squares are rows x columns elements, each
    truncated (ABY3, 128 x 768: 0.9 MB for 5.1 MB). And the divisor is one that fixed point knows exactly: at 18
    fraction bits 1/768 is off by 0.1 %.
    """
    hidden = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    if rows > hidden:
        squares = jnp.square(x).sum(-1, keepdims=True)
    else:
        flat_RxH = x.reshape(rows, hidden)
        # A strided slice takes the diagonal without a gather, which jnp would make.
        squares = jax.lax.slice((flat_RxH @ flat_RxH.T).reshape(-1), (0,), (rows * rows,), (rows + 1,))
    return squares.reshape(*x.shape[:-1], 1) / power_of_two(hidden)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis.

    At 18 fraction bits 1/384 is off by 0.05 % and 1/768 by 0.1 %, and so are mean and variance: a row whose mean is
    beyond some ten standard deviations loses accuracy.

    Attributes:
        inverse_sqrt: the part, see `NORMALIZATIONS`.
        epsilon: added to the variance. HF's 1e-12 is 0 at 18 fraction bits.
    """

    inverse_sqrt: InverseSqrt = EXACT
    epsilon: float = 1e-12

    @nn.compact
    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        self.sow("statistics", "variance", variance)
        return centred * self.inverse_sqrt(variance + self.epsilon) * scale + bias
