"""Normalisations: LayerNorm with an exact inverse root, a polynomial that fits the data, or a constant; and others."""

import dataclasses
import functools
import math
from collections.abc import Callable
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

    `scaled` gives the one for variances `factor` times as large. A folded model multiplies its states' matrices, so
    that variances are `preferred_factor` times as large: the part takes one product less then.

    `strained` gives the inverse root and, shaped like it, the strain: at most 1 in size where the variance is in range,
    and beyond 1 outside, the more the further. Fixed point has no NaN, so this is how a client learns of a text that a
    model is not for: it must be large wherever the root is wrong.
    """

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...

    @property
    def preferred_factor(self) -> float: ...

    def calibrated(self, variances: Array | np.ndarray, *, margin: float, tolerance: float) -> "Ranged":
        """See `Chebyshev.calibrated`."""
        ...

    def scaled(self, factor: float) -> "Ranged": ...

    def strained(
        self, variance: Array, scale: Array | None = None, unit: Unit | None = None
    ) -> tuple[Array, Array]: ...


@runtime_checkable
class Linear(Normalization, Protocol):
    """A part that is a linear function of each row, with a number that is known before: `calibrated` gives the one for
    the variances seen in data. On shares the matrices around it take it, and nothing of it is computed.
    """

    @property
    def inverse(self) -> float: ...

    def calibrated(self, variances: Array | np.ndarray) -> "Linear": ...


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


def _basis(t: np.ndarray, depth: int) -> np.ndarray:
    """The products of any of T_1(t), T_2(t), T_4(t) ... T_(2^(depth-1))(t), in float64: (len(t), 2^depth).

    T_k is Chebyshev's polynomial of degree k, so none exceeds 1 for t on [-1, 1]; bit i of a place says whether T_(2^i)
    is a factor.
    """
    columns, angle = np.ones((len(t), 1)), np.arccos(np.clip(t, -1.0, 1.0))
    for level in range(depth):
        columns = np.concatenate([columns, columns * np.cos(2**level * angle)[:, None]], -1)
    return columns


@functools.lru_cache
def _coefficients(low: float, high: float, depth: int) -> tuple[float, ...]:
    """Those of the polynomial in `_basis` that is nearest to 1 / sqrt(v), relatively, for v on [low, high]."""
    count = 8 << depth
    t = np.cos((np.arange(count) + 0.5) * np.pi / count)  # where the largest error is near the least squares' one
    roots = np.sqrt((high + low) / 2.0 + (high - low) / 2.0 * t)
    return tuple(np.linalg.lstsq(roots[:, None] * _basis(t, depth), np.ones(count), rcond=None)[0].tolist())


def _combined(coefficients: Float[Array, " basis"], t: Array, scale: Array) -> tuple[Array, Array]:
    """The columns of `_basis` times coefficients, summed, times scale; and the last T. One joint product a level.

    A level computes the next T as T_2k = 2 T_k^2 - 1, and multiplies by the last one: first single terms, up to half
    of the T; then sums of all terms, with their coefficients, that share their other factors. So few products do.
    """
    depth = len(coefficients).bit_length() - 1
    power, rows = t, scale[None]

    def times_power(x: Array) -> tuple[Array, Array]:
        products = jnp.concatenate([power[None], x]) * power
        return products[1:], products[0] + products[0] - 1.0  # doubled by adding: a product with 2 would be truncated

    for _ in range(min((depth + 1) // 2, depth - 1)):
        products, power = times_power(rows)
        rows = jnp.concatenate([rows, products])
    sums = jnp.tensordot(coefficients.reshape(-1, len(rows)), rows, 1)
    while len(sums) > 2:
        without, having = sums.reshape(-1, 2, *t.shape).swapaxes(0, 1)
        products, power = times_power(having)
        sums = without + products
    return sums[0] + sums[1] * power, power


# A level is 2.7 rounds in ABY3: 27 rounds a LayerNorm of the deepest part, 57 of the exact one.
_DEEPEST = 7


@dataclasses.dataclass(frozen=True)
class Chebyshev(_Divides):
    """1/sqrt(v) as a polynomial in v of degree 2^depth - 1, fitted to the variances seen in data.

    `depth` joint products one after another, no comparison, no bit decomposition. Each one squares the error, where a
    step of Newton's method takes two products for that. Depth 4 does for variances within a factor of 30, 5 within
    100. Right only on [low, high]; it diverges above, so calibrate with a margin.

    Attributes:
        low, high: the variances that it is for.
        depth: `relative_error` says what it reaches.
    """

    centres = True

    name: str = "layer_norm_chebyshev"
    low: float = 0.1
    high: float = 10.0
    depth: int = 6

    def __post_init__(self):
        if not 0.0 < self.low < self.high < math.inf:
            raise ValueError(f"{self.name} needs 0 < low < high, both finite, not low={self.low}, high={self.high}")
        if self.depth not in range(1, _DEEPEST + 1):
            raise ValueError(f"{self.name} needs a depth of 1 to {_DEEPEST}, not {self.depth}")

    def inverse_root(self, variance: Array, scale: Array | None = None, unit: Unit | None = None) -> Array:
        return self.strained(variance, scale, unit)[0]

    def strained(self, variance: Array, scale: Array | None = None, unit: Unit | None = None) -> tuple[Array, Array]:
        """See `Ranged`. The strain is T_(2^(depth-1)), which the polynomial has anyway: outside of [-1, 1] all of
        degree 2^depth - 1 are at most twice its square times as large as inside.
        """
        if unit is not None:
            variance = variance * unit.inverse_square
            scale = unit.inverse if scale is None else scale * unit.inverse
        factor, middle = self.preferred_factor, (self.low + self.high) / 2.0
        t = (variance if math.isclose(factor, 1.0) else variance * factor) - middle * factor
        coefficients = jnp.asarray(_coefficients(self.low, self.high, self.depth), t.dtype)
        return _combined(coefficients, t, jnp.ones_like(t) if scale is None else jnp.broadcast_to(scale, t.shape))

    @property
    def preferred_factor(self) -> float:
        return 2.0 / (self.high - self.low)

    def scaled(self, factor: float) -> "Chebyshev":
        return dataclasses.replace(self, low=self.low * factor, high=self.high * factor)

    def relative_error(self) -> float:
        """The largest |y sqrt(v) - 1| on [low, high], in exact arithmetic."""
        v = np.geomspace(self.low, self.high, 10_000)
        t = (v - (self.low + self.high) / 2.0) * self.preferred_factor
        y = _basis(t, self.depth) @ np.asarray(_coefficients(self.low, self.high, self.depth))
        return float(np.abs(y * np.sqrt(v) - 1.0).max())

    def calibrated(self, variances: Array | np.ndarray, *, margin: float = 2.0, tolerance: float = 1e-3) -> "Chebyshev":
        """The part for the variances seen in data, of any shape: their range, widened, and the depth it takes.

        Args:
            variances: what the LayerNorm met on a calibration set.
            margin: factor by which the range is widened at both ends.
            tolerance: relative error to stay under.

        Raises:
            ValueError: a variance that is not positive and finite, or a range so wide that no depth does.
        """
        seen = _positive(variances)
        for depth in range(1, _DEEPEST + 1):
            low, high = float(seen.min()) / margin, float(seen.max()) * margin
            part = dataclasses.replace(self, low=low, high=high, depth=depth)
            if part.relative_error() < tolerance:
                return part
        raise ValueError(
            f"variances from {seen.min():g} to {seen.max():g} are too wide for {self.name}: layer_norm does"
        )


@dataclasses.dataclass(frozen=True)
class Clipped(_Divides):
    """A part for training: a variance outside its range counts as the range's end, where the part itself diverges.

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


def _positive(variances: Array | np.ndarray) -> np.ndarray:
    """The variances in float64. ValueError: one that is not positive and finite."""
    seen = np.asarray(variances, np.float64)
    if not (np.isfinite(seen).all() and (seen > 0).all()):
        raise ValueError(f"variances must be positive and finite, seen from {seen.min()} to {seen.max()}")
    return seen


@dataclasses.dataclass(frozen=True)
class ConstantRoot:
    """x, less its mean, times a number that is the same for all rows. As in Powerformer (ACL 2025), one a LayerNorm.

    It divides by no deviation, so a model is to be trained with it, beside normalisations that do.

    Attributes:
        inverse: the number, in place of 1 / sqrt(variance).
    """

    name: str = "layer_norm_constant"
    inverse: float = 1.0

    def __post_init__(self):
        if not 0.0 < self.inverse < math.inf:
            raise ValueError(f"{self.name} needs a positive and finite inverse, not {self.inverse}")

    def __call__(self, x: X, epsilon: float) -> X:
        return centred(x) * self.inverse

    def calibrated(self, variances: Array | np.ndarray) -> "ConstantRoot":
        """The part whose rows are nearest to LayerNorm's: sum (inverse sqrt(v) - 1)^2 is least.

        Args:
            variances: what the LayerNorm met on a calibration set, of any shape.

        Raises:
            ValueError: a variance that is not positive and finite.
        """
        seen = _positive(variances)
        return dataclasses.replace(self, inverse=float(np.sqrt(seen).mean() / seen.mean()))


NORMALIZATIONS: Registry[Any] = Registry("layer_norm", Normalization)
EXACT = NORMALIZATIONS.register(Exact("layer_norm"))
CHEBYSHEV = NORMALIZATIONS.register(Chebyshev())
CONSTANT = NORMALIZATIONS.register(ConstantRoot())
RMS = NORMALIZATIONS.register(Exact("rms_norm", centres=False))
