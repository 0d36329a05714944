"""Normalisations: LayerNorm with an exact inverse root or Newton steps from a start that fits the data, and others."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flaxmpc.nn.lazy import Unit
from flaxmpc.nn.parts import Registry

X = Float[Array, "*batch hidden"]


@runtime_checkable
class Normalization(Protocol):
    """What an own normalisation must have: a name and one call, (x, epsilon) -> x normalised over its last axis.

    Scale and bias come after it, of the layer. `InverseRoot` is for what divides by a deviation: it folds.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, x: X, epsilon: float) -> X: ...


@runtime_checkable
class InverseRoot(Normalization, Protocol):
    """x, less its mean where `centres` says so, times 1 / sqrt(its mean square + epsilon).

    `inverse_root(v)` is 1 / sqrt(v) for positive v of any shape. A folded model asks for more, with factors that
    broadcast against v: `scale` / sqrt(v); and where v comes u^2 times too large, it says 1/u and 1/u^2 as `unit`.
    """

    @property
    def centres(self) -> bool: ...

    def inverse_root(self, variance: Array, scale: Array | None = None, unit: Unit | None = None) -> Array: ...


@runtime_checkable
class Ranged(InverseRoot, Protocol):
    """A part that is right only for variances on [low, high]: `calibrated` gives the one for those seen in data.

    `scaled` gives the one for variances `factor` times as large: a folded model makes them 1 at most.
    """

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...

    def calibrated(self, variances: Array | np.ndarray, *, margin: float, tolerance: float) -> "Ranged":
        """See `Newton.calibrated`."""
        ...

    def scaled(self, factor: float) -> "Ranged": ...


def centred(x: X) -> X:
    """x less its mean. At 18 fraction bits 1/384 is off by 0.05 % and 1/768 by 0.1 %, and so is the mean: a row whose
    mean is beyond some ten standard deviations loses accuracy.
    """
    return x - x.mean(-1, keepdims=True)


def variance(part: Normalization, x: X) -> Float[Array, "*batch 1"]:
    """What a normalisation meets: the mean square of x, less its mean unless the part says that it leaves it."""
    x = x if isinstance(part, InverseRoot) and not part.centres else centred(x)
    return jnp.square(x).mean(-1, keepdims=True)


class _Divides:
    """The call of an `InverseRoot`. HF's epsilon, 1e-12, is 0 at 18 fraction bits."""

    def __call__(self: Any, x: X, epsilon: float) -> X:
        x = centred(x) if self.centres else x
        return x * self.inverse_root(jnp.square(x).mean(-1, keepdims=True) + epsilon)


@dataclasses.dataclass(frozen=True)
class Exact(_Divides):
    """1/sqrt(v) as the backend computes it. SPU: 57 rounds a LayerNorm in ABY3, for variances of any size.

    Attributes:
        centres: whether the mean is taken away first, as LayerNorm does and RMSNorm does not.
        f: the inverse root.
    """

    name: str
    centres: bool = True
    f: Callable[[Array], Array] = jax.lax.rsqrt

    def inverse_root(self, variance: Array, scale: Array | None = None, unit: Unit | None = None) -> Array:
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


def _products(pairs: Sequence[tuple[Array, Array]]) -> Array:
    """The products of pairs, all at once."""
    return jnp.stack([a for a, _ in pairs]) * jnp.stack([b for _, b in pairs])


# A step is 5.3 rounds in ABY3, so from 9 steps on (63 rounds a LayerNorm) the exact part takes fewer (60).
_MOST_STEPS = 8

# Of a part that somebody asks for: each is traced.
_LARGEST_STEPS = 32


@dataclasses.dataclass(frozen=True)
class Newton(_Divides):
    """1/sqrt(v) by Newton's method, from a start fitted to the variances seen in data.

    2 h = a - b v; each step h = 3/2 h - 2 (v h) (h h); 1/sqrt(v) = 2 h. One joint product and one product a step, no
    comparison, no bit decomposition. Two steps do for variances within a factor of ten; right only on [low, high], and
    diverges above, so calibrate with a margin.

    Attributes:
        low, high: the variances that it is for.
        steps: the number of steps; `relative_error` says what they reach.
    """

    centres = True

    name: str = "layer_norm_newton"
    low: float = 0.1
    high: float = 10.0
    steps: int = 5

    def __post_init__(self):
        if not 0.0 < self.low < self.high:
            raise ValueError(f"layer_norm_newton needs 0 < low < high, not low={self.low}, high={self.high}")
        if not 1 <= self.steps <= _LARGEST_STEPS:
            raise ValueError(f"layer_norm_newton needs 1 to {_LARGEST_STEPS} steps, not {self.steps}")

    def inverse_root(self, variance: Array, scale: Array | None = None, unit: Unit | None = None) -> Array:
        if unit is not None:
            variance = variance * unit.inverse_square
            scale = unit.inverse if scale is None else scale * unit.inverse
        power = halvings(self)
        if power != 0:  # the square of the root of a large variance has few fraction bits, and so has a small variance
            root = self.scaled(4.0**-power).inverse_root(variance * 4.0**-power, scale)
            return root * 2.0**-power
        a, b = _linear_start(self.low, self.high, self.steps)
        v, h = variance, 0.5 * a - (0.5 * b) * variance
        times_v = v if scale is None else v * scale if self.steps == 1 else None  # the last step's factor of h
        for _ in range(self.steps - 1):
            pairs = [(v, h), (h, h), (jnp.full_like(h, 1.5), h)]
            if scale is not None and times_v is None:  # beside the others, so that it costs no round
                pairs.append((v, jnp.broadcast_to(scale, v.shape)))
            vh, hh, more, *found = _products(pairs)
            times_v = found[0] if found else times_v
            cubed = vh * hh
            h = more - (cubed + cubed)  # doubled by adding: a product with 2 would be truncated
        pairs = [(times_v, h), (h, h)]
        if scale is not None:
            pairs.append((jnp.broadcast_to(scale, h.shape), h))
        vh, hh, *found = _products(pairs)
        cubed, h = vh * hh, found[0] if found else h
        twice = cubed + cubed
        return (h + h + h) - (twice + twice)

    def scaled(self, factor: float) -> "Newton":
        return dataclasses.replace(self, low=self.low * factor, high=self.high * factor)

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


def halvings(part: Any) -> int:
    """How often a state is to be halved, so that the variances that a part is for lie about 1."""
    return round(math.log(part.low * part.high, 16.0)) if isinstance(part, Ranged) else 0


@dataclasses.dataclass(frozen=True)
class Clipped(_Divides):
    """A part for training: a variance outside its range counts as the range's end, where Newton diverges.

    Within the range the same function. A comparison, so not for MPC: there the range is to hold what comes.
    """

    part: Ranged

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def centres(self) -> bool:
        return self.part.centres

    def inverse_root(self, variance: Array, scale: Array | None = None, unit: Unit | None = None) -> Array:
        return self.part.inverse_root(jnp.clip(variance, self.part.low, self.part.high), scale, unit)


NORMALIZATIONS: Registry[Any] = Registry("layer_norm", Normalization)
EXACT = NORMALIZATIONS.register(Exact("layer_norm"))
NEWTON = NORMALIZATIONS.register(Newton())
RMS = NORMALIZATIONS.register(Exact("rms_norm", centres=False))
