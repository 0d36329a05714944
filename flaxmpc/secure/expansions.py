"""By the name of a primitive: functions that JAX has one operation for, in operations that SPU is right about.

SPU would compute them by formulas for floats, with steps that overflow in fixed point. As they are written out here,
`secure.check` sees every step.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr

# From here on x stands for sqrt(x^2 +- 1): log(2 x) is within 1e-4 of what it is, and the square does not overflow.
_LARGE = 64.0


def _tan(x: jax.Array) -> jax.Array:
    return lax.sin(x) / lax.cos(x)


def _sinh(x: jax.Array) -> jax.Array:
    return 0.5 * (jnp.exp(x) - jnp.exp(-x))


def _cosh(x: jax.Array) -> jax.Array:
    return 0.5 * (jnp.exp(x) + jnp.exp(-x))


def _asinh(x: jax.Array) -> jax.Array:
    size = jnp.abs(x)
    few = jnp.minimum(size, _LARGE)
    return jnp.sign(x) * jnp.log(size + jnp.maximum(size, jnp.sqrt(few * few + 1.0)))


def _acosh(x: jax.Array) -> jax.Array:
    few = jnp.minimum(x, _LARGE)
    return jnp.log(x + jnp.where(x > _LARGE, x, jnp.sqrt((few - 1.0) * (few + 1.0))))


def _cbrt(x: jax.Array) -> jax.Array:
    return jnp.sign(x) * jnp.abs(x) ** (1 / 3)


def _cumlogsumexp(x: jax.Array, *, axis: int, reverse: bool) -> jax.Array:
    """In pairs: JAX pads with -inf, whose exponential is not 0 on shares."""
    return lax.associative_scan(jnp.logaddexp, x, reverse=reverse, axis=axis)


_EXPANSIONS: Mapping[str, Callable[..., jax.Array]] = {
    "acosh": _acosh,
    "asinh": _asinh,
    "cbrt": _cbrt,
    "cosh": _cosh,
    "cumlogsumexp": _cumlogsumexp,
    "sinh": _sinh,
    "tan": _tan,
}


def expansion(eqn: Any) -> ClosedJaxpr | None:
    """What is computed in place of an equation; None: the equation itself."""
    expand = _EXPANSIONS.get(eqn.primitive.name)
    if expand is None:
        return None
    params = {name: value for name, value in eqn.params.items() if name != "accuracy"}  # of one device's code
    structs = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in eqn.invars]
    return jax.make_jaxpr(lambda *operands: expand(*operands, **params))(*structs)
