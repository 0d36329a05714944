"""By the name of a primitive: how what SPU computes otherwise than JAX is written, so that it is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import DropVar

from flaxmpc.secure.apart import apart
from flaxmpc.secure.arithmetic import Arithmetic, wraps
from flaxmpc.secure.jaxpr import bind, names, refusal
from flaxmpc.secure.ring import FRACTION_BITS, truncated_on_shares


class Operands(NamedTuple):
    """The operands of one equation.

    Attributes:
        values: the operands as they stand in the program.
        known: the array or number of each that is known while compiling; None for the others.
        arithmetic: the ring's.
    """

    values: Sequence[Any]
    known: Sequence[Any]
    arithmetic: Arithmetic

    def known_or_traced(self) -> list[Any]:
        return [value if known is None else known for value, known in zip(self.values, self.known, strict=True)]


# Operations whose results are within the type when their operands are. What is not here is wrapped.
_CLOSED = names(
    """
    and argmax argmin broadcast_in_dim clamp concatenate cond convert_element_type copy cummax cummin dynamic_slice
    dynamic_update_slice gather iota max min or pad reduce_and reduce_max reduce_min reduce_or reduce_xor rem
    reshape rev scan select_n shift_right_arithmetic shift_right_logical sign slice sort squeeze stop_gradient top_k
    transpose while xor
    """
)


def wrapped(eqn: Any, outs: Sequence[Any], arithmetic: Arithmetic) -> list[Any]:
    """The results of an equation, those that wrap in their type's range."""
    if eqn.primitive.name in _CLOSED:
        return list(outs)
    return [arithmetic.wrap(out) if wraps(out.dtype) else out for out in outs]


def _mul(eqn: Any, ins: Operands) -> list[Any]:
    out = eqn.outvars[0].aval
    outs = wrapped(eqn, bind(eqn, ins.values), ins.arithmetic)
    # A constant of as many numbers as the product: XLA would move it to another one. What is broadcast it leaves.
    whole = any(known is not None and np.size(known) == out.size for known in ins.known)
    return [apart(outs[0])] if whole and jnp.issubdtype(out.dtype, jnp.floating) else outs


def _div(eqn: Any, ins: Operands) -> list[Any]:
    if not _integers(eqn):
        return [apart(out) for out in bind(eqn, ins.values)]
    return wrapped(eqn, [_divided(eqn, ins)[0]], ins.arithmetic)  # -128 / -1


def _rem(eqn: Any, ins: Operands) -> list[Any]:
    if _integers(eqn):
        return [_divided(eqn, ins)[1]]
    if ins.known[1] is not None and not ins.arithmetic.encoded(ins.known[1]).all():
        raise refusal(eqn, f"the divisor {float(np.abs(ins.known[1]).min()):g} is 0 in fixed point")
    return [ins.arithmetic.remainder(*ins.known_or_traced())]


def _divided(eqn: Any, ins: Operands) -> tuple[Any, Any]:
    dtype = eqn.outvars[0].aval.dtype
    if not ins.arithmetic.divides(dtype):
        raise refusal(eqn, f"the exact division of {dtype} needs a larger ring")
    return ins.arithmetic.divide(*ins.known_or_traced())


def _select(eqn: Any, ins: Operands) -> list[Any]:
    """What is always chosen stands for itself: XLA would choose too, and take the bits of a constant, see `_rem`."""
    which = ins.known[0]
    if which is not None and np.size(which) and np.ptp(np.asarray(which).astype(np.int32)) == 0:
        return [ins.known_or_traced()[1 + int(np.asarray(which).flat[0])]]
    return bind(eqn, ins.values)


def _shift(eqn: Any, ins: Operands) -> list[Any]:
    """By a known number of places, so that a number too large is none of the program's."""
    x, places, wrap = ins.values[0], ins.known[1], ins.arithmetic.wrap
    info = jnp.iinfo(eqn.outvars[0].aval.dtype)
    if places is None:
        raise refusal(eqn, "the number of places must be known when the function is compiled")
    if not ((np.asarray(places) >= 0) & (np.asarray(places) < info.bits)).all():
        raise refusal(eqn, f"the number of places must be from 0 to {info.bits - 1}")
    if eqn.primitive.name == "shift_left":
        return wrapped(eqn, bind(eqn, [x, places]), ins.arithmetic)
    if eqn.primitive.name == "shift_right_logical" and info.min:  # of the bits as those of an unsigned number
        unsigned = wrap(x, np.dtype(f"uint{info.bits}"))
        moved = lax.shift_right_logical(unsigned, lax.convert_element_type(places, unsigned.dtype))
        return [wrap(moved, x.dtype)]
    return bind(eqn, [wrap(x), places])


def _convert(eqn: Any, ins: Operands) -> list[Any]:
    before, to = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    if all(jnp.issubdtype(dtype, jnp.integer) for dtype in (before, to)) and not _holds(to, before):
        return [ins.arithmetic.wrap(ins.values[0], to)]
    return bind(eqn, ins.values)


def _bitcast(eqn: Any, ins: Operands) -> list[Any]:
    before, to = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    if not all(jnp.issubdtype(dtype, jnp.integer) for dtype in (before, to)) or before.itemsize != to.itemsize:
        raise refusal(eqn, f"the bits of {before} are not on the shares, so they cannot be read as {to}")
    return [ins.arithmetic.wrap(ins.values[0], to)]


def _sort(eqn: Any, ins: Operands) -> list[Any]:
    """Stable by one more key: the place. Where only keys are sorted, equal ones are the same."""
    params = dict(eqn.params)
    keys = params["num_keys"]
    if not params["is_stable"] or len(ins.values) == keys:
        return bind(eqn, ins.values)
    shape, axis = eqn.invars[0].aval.shape, params["dimension"]
    place = np.broadcast_to(np.expand_dims(np.arange(shape[axis], dtype=np.int32), _others(shape, axis)), shape)
    params |= {"is_stable": False, "num_keys": keys + 1}
    if ins.known[keys] is not None and np.array_equal(np.asarray(ins.known[keys]), place):  # argsort
        return bind(eqn, ins.values, params)
    outs = eqn.primitive.bind(*ins.values[:keys], place, *ins.values[keys:], **params)
    return [*outs[:keys], *outs[keys + 1 :]]


def _others(shape: Sequence[int], axis: int) -> list[int]:
    """All axes but one."""
    return [i for i in range(len(shape)) if i != axis]


def _picked(eqn: Any, ins: Operands) -> list[Any]:
    """Bits as sums: ABY3 cannot pick bits at a secret place, and integers made of bits alone are still bits."""
    if ins.values[0].dtype != np.dtype(bool):
        return wrapped(eqn, bind(eqn, ins.values), ins.arithmetic)
    params = dict(eqn.params)
    if params.get("fill_value") is not None:
        params["fill_value"] = int(params["fill_value"]) + 1
    (found,) = bind(eqn, [lax.convert_element_type(ins.values[0], np.int32) + 1, *ins.values[1:]], params)
    return [found > 1]


def _top_k(eqn: Any, ins: Operands) -> list[Any]:
    """By a stable sort; SPU's own takes a thirtieth of the bytes, but equal numbers in any order."""
    x, k = ins.values[0], eqn.params["k"]
    if isinstance(eqn.outvars[1], DropVar):
        return bind(eqn, [x])
    if eqn.params.get("axis", x.ndim - 1) != x.ndim - 1:
        raise refusal(eqn, "it is computed along the last axis only")
    return _largest(eqn, x, k, x.ndim - 1)


def _approx_top_k(eqn: Any, ins: Operands) -> list[Any]:
    """Exactly, as JAX does on a CPU."""
    x, params = ins.values[0], eqn.params
    sign = 1 if params["is_max_k"] else -1
    values, places = _largest(eqn, sign * x, params["k"], params["reduction_dimension"] % x.ndim)
    return [sign * values, places]


def _largest(eqn: Any, x: Any, k: int, axis: int) -> list[Any]:
    """The k largest along an axis, of equal ones the first, and their places; in the types of the results."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = lax.convert_element_type(x, np.int32)
    place = lax.broadcasted_iota(np.int32, x.shape, axis)
    found = lax.sort((-x, place), dimension=axis, is_stable=False, num_keys=2)
    values, places = (lax.slice_in_dim(one, 0, k, axis=axis) for one in found)
    types = [var.aval.dtype for var in eqn.outvars]
    return [lax.convert_element_type(-values, types[0]), lax.convert_element_type(places, types[1])]


def _convolution(eqn: Any, ins: Operands) -> list[Any]:
    """One for each group of the batch, as gradients of grouped convolutions have them: SPU ends the process."""
    groups, outs = eqn.params["batch_group_count"], None
    if groups > 1:
        params = {**eqn.params, "batch_group_count": 1}
        spec = params["dimension_numbers"]
        lhs = jnp.split(ins.values[0], groups, spec.lhs_spec[0])
        rhs = jnp.split(ins.values[1], groups, spec.rhs_spec[0])
        pieces = [bind(eqn, pair, params)[0] for pair in zip(lhs, rhs, strict=True)]
        outs = [jnp.concatenate(pieces, spec.out_spec[1])]
    return wrapped(eqn, outs or bind(eqn, ins.values), ins.arithmetic)


def _dot(eqn: Any, ins: Operands) -> list[Any]:
    """With constants in the order of dimensions that XLA wants.

    Else XLA transposes them while it compiles, and SPU reads their numbers in the order in which they were before.
    """
    contracted, batch = eqn.params["dimension_numbers"]
    values, new_contracted, new_batch = list(ins.values), list(contracted), list(batch)
    for side, known in enumerate(ins.known):
        if known is None:
            continue
        first, last = tuple(batch[side]), tuple(contracted[side])
        free = tuple(axis for axis in range(np.ndim(known)) if axis not in (*first, *last))
        order = (*first, *free, *last) if side == 0 else (*first, *last, *free)
        values[side] = np.ascontiguousarray(np.asarray(known).transpose(order))
        new_batch[side] = tuple(map(order.index, first))
        new_contracted[side] = tuple(map(order.index, last))
    params = {**eqn.params, "dimension_numbers": (tuple(new_contracted), tuple(new_batch))}
    return wrapped(eqn, bind(eqn, values, params), ins.arithmetic)


def _truncate(eqn: Any, ins: Operands) -> list[Any]:
    config = ins.arithmetic.config
    if (config.ring, config.fraction_bits) != ("FM64", FRACTION_BITS):
        raise refusal(eqn, f"a plan of bits is for parties with {FRACTION_BITS} fraction bits in the ring FM64")
    with ins.arithmetic.integers():
        return [truncated_on_shares(ins.values[0], **eqn.params)]


# 2^-31 is 0 on shares. SPU has 2^z right from 2^-32 on; 2^-33 is a half, and 0^1.5 is 0.3.
_LEAST_POWER = -31.0


def _pow(eqn: Any, ins: Operands) -> list[Any]:
    """SPU's own, or 0 where the power is as good as 0."""
    x, y = ins.values
    config, size = ins.arithmetic.config, lax.abs(x)
    if config.ring == "FM32":
        raise refusal(eqn, "SPU's powers need a larger ring than FM32")
    least = 2.0**-config.fraction_bits
    if ins.known[1] is None:
        y = lax.convert_element_type(y, x.dtype)
        vanishes = (y * jnp.log(size) < _LEAST_POWER * math.log(2.0)) | ((y > 0) & (size < least))
    else:
        exponent = np.asarray(ins.known[1], np.float64)
        with np.errstate(divide="ignore", over="ignore"):
            edge = np.exp2(_LEAST_POWER / exponent)  # of the sizes whose powers vanish
        smallest = np.where(exponent > 0, np.maximum(edge, least), 0.0)
        largest = np.minimum(np.where(exponent < 0, edge, np.inf), config.limit)
        vanishes = np.zeros(eqn.outvars[0].aval.shape, bool)
        if (smallest > 0).any():
            vanishes = size < smallest.astype(x.dtype)
        if (largest < config.limit).any():
            vanishes = vanishes | (size > largest.astype(x.dtype))
    (power,) = bind(eqn, ins.values)
    return [lax.select(vanishes, jnp.zeros_like(power), power)]


def _tanh(eqn: Any, ins: Operands) -> list[Any]:
    """SPU's is off by up to 0.005, and by 0.003 of any large number, where its tails should be 1."""
    if ins.arithmetic.config.exp_mode == "taylor":
        return bind(eqn, ins.values)
    half = lax.logistic(ins.values[0] + ins.values[0])  # a product with 2 has half the range
    return [half + half - 1.0]


def _barrier(eqn: Any, ins: Operands) -> list[Any]:
    return [apart(value) if jnp.issubdtype(value.dtype, jnp.floating) else value for value in ins.values]


def _same(eqn: Any, ins: Operands) -> list[Any]:
    return list(ins.values)


RULES: Mapping[str, Callable[[Any, Operands], list[Any]]] = {
    "approx_top_k": _approx_top_k,
    "bitcast_convert_type": _bitcast,
    "conv_general_dilated": _convolution,
    "convert_element_type": _convert,
    "div": _div,
    "dot_general": _dot,
    "dynamic_slice": _picked,
    "gather": _picked,
    "mul": _mul,
    "optimization_barrier": _barrier,
    "pow": _pow,
    "rem": _rem,
    "select_n": _select,
    "sharding_constraint": _same,  # there is one device
    "shift_left": _shift,
    "shift_right_arithmetic": _shift,
    "shift_right_logical": _shift,
    "sort": _sort,
    "tanh": _tanh,
    "top_k": _top_k,
    "truncate": _truncate,
}
"""(equation, operands) -> results; others are left as they are, or in `refused.REFUSED`."""


def _integers(eqn: Any) -> bool:
    return jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.integer)


def _holds(to: Any, before: Any) -> bool:
    """Whether a type has every number of another."""
    a, b = jnp.iinfo(to), jnp.iinfo(before)
    return a.min <= b.min and b.max <= a.max
