"""From where on SPU's result of an operation is wrong: what of it has a limit, and which."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxmpc.secure.jaxpr import names
from flaxmpc.secure.protocol import Config


class Operation(NamedTuple):
    """An equation of a jaxpr on values in the clear.

    Attributes:
        eqn: the equation.
        ins: its operands.
        out: its result.
        exact: whether fixed point has each operand as it is, but for the rounding of an argument.
        uniform: whether each operand is one known number, be it broadcast.
        config: the fixed point.
    """

    eqn: Any
    ins: Sequence[Any]
    out: Any
    exact: Sequence[bool]
    uniform: Sequence[bool]
    config: Config


class Quantity(NamedTuple):
    """Something of an operation that has a limit."""

    name: str
    value: jax.Array
    limit: float


_Quantities = Iterator[Quantity]

# Found by experiment with ABY3 and SEMI2K, FM64, 18 fraction bits, spu 0.9.5 (tests/secure/test_check.py has them):
# each is right below its limit, and wrong from twice the limit on at the latest.
_TAYLOR_REACH = 500.0  # exp(x) is (1 + x/256)^256, which grows again below -512
_TAYLOR_EXACT = 9.0  # and too low by x^2/512 of itself: a hundredth where 2 bits are left
_PADE_REACH = 22.0  # SPU clips what it raises 2 to at 32, so x at 22.2


def _product(op: Operation) -> _Quantities:
    """Before it is truncated a product has twice the fraction bits; the terms of a sum of products may wrap."""
    yield Quantity("result", op.out, op.config.product_limit)


def _div(op: Operation) -> _Quantities:
    yield from _product(op)
    if not op.uniform[1]:  # else a product with the reciprocal
        yield from _ratio(op)


def _ratio(op: Operation) -> _Quantities:
    # The numerator is multiplied by up to 2 / (the denominator, scaled to [0.5, 1)).
    yield Quantity("numerator", op.ins[0], op.config.product_limit / 2.0)
    yield Quantity("denominator", op.ins[1], _unit(op.config))


def _unit(config: Config) -> float:
    """2^fraction_bits: SPU finds the first bit of a denominator among twice the fraction bits."""
    return 2.0**config.fraction_bits


def _integer_pow(op: Operation) -> _Quantities:
    """Repeated squaring, of which no power is larger than the last."""
    yield from _product(op)
    if op.eqn.params["y"] < 0:
        yield Quantity("denominator", jax.lax.integer_pow(op.ins[0], -op.eqn.params["y"]), _unit(op.config))


def _pow(op: Operation) -> _Quantities:
    """By the logarithm of the base, where 0 has that of the smallest number."""
    base, exponent = op.ins
    yield from _product(op)
    yield Quantity("base", base, 2.0 * _unit(op.config))
    logarithm = jnp.log(jnp.maximum(jnp.abs(base), 2.0**-op.config.fraction_bits))
    yield Quantity("exponent times log of the base", exponent * logarithm, op.config.product_limit)


def _exp(op: Operation) -> _Quantities:
    yield from _product(op)
    if op.config.exp_mode == "taylor":
        yield Quantity("negative operand by taylor", jnp.minimum(op.ins[0], 0.0), _TAYLOR_REACH)
        yield Quantity("positive operand by taylor", jnp.maximum(op.ins[0], 0.0), _TAYLOR_EXACT)
    else:
        yield Quantity("operand by pade", jnp.maximum(op.ins[0], 0.0), _PADE_REACH)


def _logistic(op: Operation) -> _Quantities:
    """1 / (1 + exp(-x)), which is near 0 where exp is not exact, and where pade clips."""
    yield from _encoded(op)
    if op.config.exp_mode == "taylor":
        yield Quantity("exp(-operand)", jnp.exp(-op.ins[0]), op.config.product_limit)
        yield Quantity("positive operand by taylor", jnp.maximum(op.ins[0], 0.0), _TAYLOR_REACH)


def _root(op: Operation) -> _Quantities:
    yield from _encoded(op)
    yield Quantity("operand", op.ins[0], _unit(op.config) / 2.0)


def _factored(op: Operation) -> _Quantities:
    """Q R: by the lengths of columns."""
    yield from _encoded(op)
    yield Quantity("sum of a column's squares", jnp.sum(jnp.square(op.ins[0]), -2), _unit(op.config) / 2.0)


def _log(op: Operation) -> _Quantities:
    yield from _encoded(op)
    yield Quantity("operand", op.ins[0], 2.0 * _unit(op.config))


def _log1p(op: Operation) -> _Quantities:
    yield from _encoded(op)
    yield Quantity("1 + operand", 1.0 + op.ins[0], 2.0 * _unit(op.config))


def _atan2(op: Operation) -> _Quantities:
    """Of the quotient of the operands, in either order."""
    for name, operand in zip(("y", "x"), op.ins, strict=True):
        yield Quantity(name, operand, _unit(op.config))


def _erfc(op: Operation) -> _Quantities:
    """By exp(-x^2) and polynomials of 1/x^2, wherever x is."""
    yield from _encoded(op)
    yield Quantity("operand's square", op.ins[0] ** 2, op.config.product_limit)


def _gamma(op: Operation) -> _Quantities:
    """The logarithm of the gamma function, and what that rises by: by quotients of polynomials and a logarithm."""
    yield from _encoded(op)
    yield Quantity("operand", op.ins[0], 2.0 * _unit(op.config))
    yield Quantity("operand's square", op.ins[0] ** 2, op.config.product_limit)


def _sine(op: Operation) -> _Quantities:
    """The period is subtracted with an error that grows with the angle: 0.005 at the limit."""
    yield Quantity("operand", op.ins[0], _unit(op.config) / 64.0)


def _encoded(op: Operation) -> _Quantities:
    """No product: sums, comparisons, and erf and tanh, which SPU clips."""
    yield Quantity("result", op.out, op.config.limit)


# ------------------------------------------------------------------------------------------------------------- jumps


def _jump(distance: Any, error: Any) -> Quantity:
    """How near an operand comes to a place where the result jumps, beside what fixed point may be off by."""
    ratio: Any = jnp.where(error > 0, error / distance, 0.0)
    return Quantity("error over the distance to a jump", ratio, 1.0)


def _error(op: Operation, place: int) -> Any:
    """What fixed point may be off by in an operand.

    An argument is rounded, once or in a few terms of a sum. What was multiplied, divided or approximated is off by up
    to 2^-14 of itself (SPU's division: 2^-15.6).
    """
    x, bits = jnp.asarray(op.ins[place]), op.config.fraction_bits
    if op.exact[place]:
        whole = x * 2.0**bits
        return jnp.where(whole == jnp.rint(whole), 0.0, 4.0 * 2.0**-bits)
    return 2.0 ** (4 - bits) * jnp.maximum(jnp.abs(x), 1.0)


def _whole(op: Operation) -> _Quantities:
    """Floor and ceil jump at whole numbers."""
    yield from _encoded(op)
    x = op.ins[0]
    yield _jump(jnp.abs(x - jnp.rint(x)), _error(op, 0))


def _round(op: Operation) -> _Quantities:
    yield from _encoded(op)
    x = op.ins[0]
    yield _jump(jnp.abs(x - jnp.floor(x) - 0.5), _error(op, 0))


def _sign(op: Operation) -> _Quantities:
    yield _jump(jnp.abs(op.ins[0]), _error(op, 0))


def _to_integer(op: Operation) -> _Quantities:
    """Towards zero: it jumps at whole numbers, but for 0."""
    yield Quantity("result", op.ins[0], float(jnp.iinfo(jnp.result_type(op.out)).max))
    x = op.ins[0]
    nearest = jnp.rint(x)
    yield _jump(jnp.where(nearest == 0, 0.5, jnp.abs(x - nearest)), _error(op, 0))


def _rem(op: Operation) -> _Quantities:
    """It jumps where the quotient is whole."""
    x, y = op.ins
    yield from _ratio(op)
    quotient = x / y
    yield Quantity("quotient", quotient, op.config.product_limit)
    error = (_error(op, 0) + jnp.abs(quotient) * _error(op, 1)) / jnp.abs(y)
    yield _jump(jnp.abs(quotient - jnp.rint(quotient)), error)


# ---------------------------------------------------------------------------------------------------------- integers


def _integer(op: Operation) -> _Quantities:
    """Of int32 and int64: JAX's numbers wrap, and SPU's go on. Smaller and unsigned ones wrap in both."""
    dtype = jnp.result_type(op.out)
    compute = _INTEGERS.get(op.eqn.primitive.name)
    if compute is not None and dtype in (np.int32, np.int64):
        floats = [jnp.asarray(x).astype(jnp.float32) for x in op.ins]
        yield Quantity("result", compute(op.eqn, *floats), float(jnp.iinfo(dtype).max))


def _as_floats(eqn: Any, *floats: jax.Array) -> jax.Array:
    """The operation itself, on floats."""
    return eqn.primitive.bind(*floats, **eqn.params)


def _dot(eqn: Any, *floats: jax.Array) -> jax.Array:
    return eqn.primitive.bind(*floats, **{**eqn.params, "preferred_element_type": np.dtype(np.float32)})


_INTEGERS: dict[str, Callable[..., jax.Array]] = {
    **dict.fromkeys(
        ("add", "sub", "mul", "neg", "abs", "square", "integer_pow", "cumsum", "cumprod", "reduce_prod", "add_any"),
        _as_floats,
    ),
    "reduce_sum": lambda eqn, x: jnp.sum(x, eqn.params["axes"]),
    "dot_general": _dot,
    "conv_general_dilated": _dot,
    "shift_left": lambda eqn, x, places: x * 2.0**places,
}


_LIMITS: dict[str, Callable[[Operation], _Quantities]] = {
    **dict.fromkeys(("mul", "dot_general", "conv_general_dilated", "square", "reduce_prod", "cumprod"), _product),
    **dict.fromkeys(("exp", "exp2", "expm1"), _exp),
    **dict.fromkeys(("rsqrt", "sqrt", "cholesky"), _root),
    **dict.fromkeys(("qr", "geqrf"), _factored),
    **dict.fromkeys(("sin", "cos"), _sine),
    **dict.fromkeys(("lgamma", "digamma"), _gamma),
    **dict.fromkeys(("floor", "ceil"), _whole),
    "round": _round,
    "sign": _sign,
    "atan2": _atan2,
    "erfc": _erfc,
    "rem": _rem,
    "div": _div,
    "integer_pow": _integer_pow,
    "pow": _pow,
    "logistic": _logistic,
    "log": _log,
    "log1p": _log1p,
}

# What only moves values, or picks some.
_MOVES = names(
    """
    broadcast_in_dim concatenate copy dynamic_slice dynamic_update_slice gather pad reduce_max reduce_min reshape
    rev select_n slice sort squeeze stop_gradient transpose
    """
)

# What fixed point computes as it is: sums, choices, and what makes whole numbers.
_EXACT = _MOVES | names(
    """
    abs add add_any ceil clamp convert_element_type cummax cummin cumsum floor max min neg reduce_sum rem round sign
    sub
    """
)
_WHOLE = frozenset(["ceil", "floor", "round", "sign"])


def quantities(op: Operation) -> _Quantities:
    """What of an operation has a limit; nothing, if it only moves values."""
    name = op.eqn.primitive.name
    if name in _MOVES:
        return
    if _is(op.out, jnp.floating):
        yield from _LIMITS.get(name, _encoded)(op)
    elif _is(op.out, jnp.integer):
        from_float = name == "convert_element_type" and _is(op.ins[0], jnp.floating)
        yield from _to_integer(op) if from_float else _integer(op)


def exact(op: Operation) -> bool:
    """Whether the result is exact if the operands are (`Operation.exact`), or whatever they are."""
    name = op.eqn.primitive.name
    if name in _WHOLE or not _is(op.out, jnp.floating):
        return True
    return name in _EXACT and all(op.exact)


def _is(x: Any, kind: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), kind)
