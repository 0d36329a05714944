"""From where on SPU's result of an operation is wrong: what of it has a limit, and which."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from flaxmpc.secure.protocol import Config


class Quantity(NamedTuple):
    """Something of an operation that has a limit."""

    name: str
    value: jax.Array
    limit: float


# Found by experiment with ABY3 and SEMI2K, FM64, 18 fraction bits, spu 0.9.5 (tests/secure/test_check.py has them):
# each is right below its limit, and wrong from twice the limit on at the latest.
_EXP_REACH = 500.0  # exp(x) is (1 + x/256)^256, which grows again below -512


def _product(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[Quantity]:
    """Before it is truncated a product has twice the fraction bits; the terms of a sum of products may wrap."""
    yield Quantity("result", out, config.product_limit)


def _div(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[Quantity]:
    yield from _product(eqn, ins, out, config)
    if not isinstance(eqn.invars[1], Literal):  # else a product with the reciprocal
        # The numerator is multiplied by up to 2 / (the denominator, scaled to [0.5, 1)).
        yield Quantity("numerator", ins[0], config.product_limit / 2.0)
        yield Quantity("denominator", ins[1], _unit(config))


def _unit(config: Config) -> float:
    """2^fraction_bits: SPU finds the first bit of a denominator among twice the fraction bits."""
    return 2.0**config.fraction_bits


def _integer_pow(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[Quantity]:
    """Repeated squaring, of which no power is larger than the last."""
    yield from _product(eqn, ins, out, config)
    if eqn.params["y"] < 0:
        yield Quantity("denominator", jax.lax.integer_pow(ins[0], -eqn.params["y"]), _unit(config))


def _pow(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[Quantity]:
    """By the logarithm of the base."""
    yield from _product(eqn, ins, out, config)
    yield Quantity("base", ins[0], 2.0 * _unit(config))


def _exp(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[Quantity]:
    yield from _product(eqn, ins, out, config)
    yield Quantity("negative operand", jnp.minimum(ins[0], 0.0), _EXP_REACH)


def _logistic(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[Quantity]:
    """1 / (1 + exp(-x))."""
    yield Quantity("exp(-operand)", jnp.exp(-ins[0]), config.product_limit)
    yield Quantity("positive operand", jnp.maximum(ins[0], 0.0), _EXP_REACH)


def _rsqrt(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[Quantity]:
    yield Quantity("operand", ins[0], _unit(config) / 2.0)


def _log(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[Quantity]:
    yield Quantity("operand", ins[0], 2.0 * _unit(config))


def _log1p(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[Quantity]:
    yield Quantity("1 + operand", 1.0 + ins[0], 2.0 * _unit(config))


def _sine(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[Quantity]:
    """The period is subtracted with an error that grows with the angle: 0.005 at the limit."""
    yield Quantity("operand", ins[0], _unit(config) / 64.0)


def _encoded(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[Quantity]:
    """No product: sums, comparisons, and erf and tanh, which SPU clips."""
    yield Quantity("result", out, config.limit)


_LIMITS: dict[str, Callable[[Any, Sequence[Any], jax.Array, Config], Iterator[Quantity]]] = {
    **dict.fromkeys(("mul", "dot_general", "conv_general_dilated", "square", "reduce_prod", "cumprod"), _product),
    **dict.fromkeys(("exp", "exp2", "expm1"), _exp),
    **dict.fromkeys(("rsqrt", "sqrt"), _rsqrt),
    **dict.fromkeys(("sin", "cos"), _sine),
    "div": _div,
    "integer_pow": _integer_pow,
    "pow": _pow,
    "logistic": _logistic,
    "log": _log,
    "log1p": _log1p,
}

# What only moves values, or picks some.
_MOVES = frozenset(
    [
        "broadcast_in_dim",
        "concatenate",
        "copy",
        "dynamic_slice",
        "gather",
        "pad",
        "reduce_max",
        "reduce_min",
        "reshape",
        "rev",
        "select_n",
        "slice",
        "sort",
        "squeeze",
        "stop_gradient",
        "transpose",
    ]
)


def quantities(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[Quantity]:
    """What of an equation of a jaxpr has a limit, given its operands and result; nothing, if it only moves values."""
    name = eqn.primitive.name
    if name not in _MOVES and jnp.issubdtype(jnp.result_type(out), jnp.floating):
        yield from _LIMITS.get(name, _encoded)(eqn, ins, out, config)
