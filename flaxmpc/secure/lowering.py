"""A JAX function as SPU computes it rightly: what SPU would compute otherwise than JAX is written anew, or refused.

SPU has one ring for all integers, no stable sort, and divides with the precision of fixed point. So

- what depends on no argument is computed by JAX, while compiling: a constant key gives JAX's own random numbers;
- unsigned integers, and those of 8 and 16 bits, wrap as their type does. int32 and int64 do not: their sums and
  products are right as long as they fit (see `secure.check`), and what is returned is right even then;
- integer division, and the remainder of floats, are exact;
- sort and top_k are stable;
- what remains, such as the bits of a float, is refused by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import DropVar
from jax.extend.core import ClosedJaxpr, Literal

from flaxmpc.secure._spu import SecureError
from flaxmpc.secure.jaxpr import called, source
from flaxmpc.secure.protocol import RING_BITS, Config
from flaxmpc.secure.refused import REFUSED

try:
    from jax import enable_x64  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # jax before 0.8
    from jax.experimental import enable_x64

# Of few known numbers they make many, so what they make is not kept in the program.
_GROWING = frozenset(["broadcast_in_dim", "iota"])

# Operations whose results are within the type when their operands are. What is not here is wrapped.
_CLOSED = frozenset(
    [
        "and",
        "argmax",
        "argmin",
        "broadcast_in_dim",
        "clamp",
        "concatenate",
        "cond",
        "convert_element_type",
        "copy",
        "cummax",
        "cummin",
        "dynamic_slice",
        "dynamic_update_slice",
        "gather",
        "iota",
        "max",
        "min",
        "or",
        "pad",
        "reduce_and",
        "reduce_max",
        "reduce_min",
        "reduce_or",
        "reduce_xor",
        "rem",
        "reshape",
        "rev",
        "scan",
        "select_n",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "slice",
        "sort",
        "squeeze",
        "stop_gradient",
        "top_k",
        "transpose",
        "while",
        "xor",
    ]
)


def lower(fn: Callable[..., Any], structs: Sequence[Any], config: Config) -> tuple[Any, Any]:
    """The lowered function of flat arguments that computes on shares what `fn` does, and the output's structs.

    Args:
        fn: any JAX function of pytrees.
        structs: its arguments, pytrees of jax.ShapeDtypeStruct.
        config: of the parties.

    Raises:
        SecureError: an operation that SPU cannot compute; names it, and the user's line.
    """
    traced = jax.jit(fn, keep_unused=True).trace(*structs)
    rewriting = _Rewriting(config)
    flat = jax.jit(functools.partial(rewriting.evaluate, traced.jaxpr), keep_unused=True)
    try:
        again = flat.trace(*jax.tree.leaves(structs))
    except SecureError as error:  # JAX adds lines to what is raised while it traces
        raise SecureError(*error.args) from None
    with enable_x64(rewriting.wide or _x64()):
        # For no device in particular: no code of one processor alone.
        return again.lower(lowering_platforms=("interpreter",)), traced.out_info


def _x64() -> bool:
    return bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]


class _Known:
    """A value that depends on no argument; in the program it is a constant, or what `stage` makes."""

    def __init__(self, value: Any, stage: Callable[[], Any] | None = None):
        self.value = value
        self._stage = stage or (lambda: value)

    @functools.cached_property
    def staged(self) -> Any:
        return self._stage()


class _Rewriting:
    """One function's. `wide`: whether the program has integers of 64 bits that the function has not."""

    def __init__(self, config: Config):
        self.config = config
        self.ring_bits = RING_BITS[config.ring]
        self.integer = np.int64 if self.ring_bits > 32 else np.int32  # that has a ring element's number
        self.wide = False

    def evaluate(self, closed: ClosedJaxpr, *args: Any) -> list[Any]:
        """The outputs of a jaxpr on traced values."""
        return [_staged(out) for out in self._outputs(closed, args)]

    def _outputs(self, closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = dict(zip(closed.jaxpr.invars, args, strict=True))
        env.update((var, _Known(value)) for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True))

        def read(atom: Any) -> Any:
            return _Known(_literal(atom)) if isinstance(atom, Literal) else env[atom]

        for eqn in closed.jaxpr.eqns:
            env.update(zip(eqn.outvars, self._equation(eqn, [read(atom) for atom in eqn.invars]), strict=True))
        return [read(atom) for atom in closed.jaxpr.outvars]

    def _equation(self, eqn: Any, ins: list[Any]) -> list[Any]:
        """The results of one equation: traced values, or `_Known`."""
        if (function := called(eqn)) is not None:
            return self._outputs(function, ins)
        name = eqn.primitive.name
        if all(isinstance(x, _Known) for x in ins) and name not in _NEVER_KNOWN:
            with jax.ensure_compile_time_eval():
                outs = _bind(eqn, [x.value for x in ins])
            if name not in _GROWING:
                return [_Known(out) for out in outs]
            return [_Known(outs[0], lambda: _bind(eqn, [_staged(x) for x in ins])[0])]
        if name in REFUSED:
            raise _refusal(eqn, REFUSED[name])
        for var in (*eqn.invars, *eqn.outvars):
            self._fits(eqn, var.aval)
        rule = _RULES.get(name)
        if rule is not None:
            return rule(self, eqn, ins)
        return self.wrapped(eqn, _bind(eqn, [_staged(x) for x in ins], self._params(eqn)))

    def _fits(self, eqn: Any, aval: Any) -> None:
        """Refuses integers of which the ring cannot hold, or cannot compare, all."""
        dtype = getattr(aval, "dtype", np.dtype(bool))
        if jnp.issubdtype(dtype, jnp.integer):
            info = jnp.iinfo(dtype)
            if info.max >= 2 ** (self.ring_bits - 1):
                raise _refusal(eqn, f"{dtype} has numbers that the ring {self.config.ring} cannot hold with a sign")

    def _params(self, eqn: Any) -> dict[str, Any]:
        """An equation's parameters, with the functions in them rewritten: the bodies of loops and branches."""
        return {name: self._rewritten(value) for name, value in eqn.params.items()}

    def _rewritten(self, value: Any) -> Any:
        if isinstance(value, ClosedJaxpr):
            return jax.make_jaxpr(functools.partial(self.evaluate, value))(*map(_struct, value.in_avals))
        return tuple(map(self._rewritten, value)) if type(value) is tuple else value

    def wrapped(self, eqn: Any, outs: Sequence[Any]) -> list[Any]:
        if eqn.primitive.name in _CLOSED:
            return list(outs)
        return [self.wrap(out) if _wraps(out.dtype) else out for out in outs]

    # ------------------------------------------------------------------------------------ integers of a type's width

    def _wide_integers(self) -> Any:
        """The context in which JAX has `integer`."""
        self.wide |= self.integer is np.int64
        return enable_x64(self.wide or _x64())

    def _to_wide(self, x: Any) -> Any:
        """As the widest integer, which on shares is the same number. Within `_wide_integers`."""
        return lax.convert_element_type(x, self.integer)

    def wrap(self, x: Any, dtype: Any = None) -> Any:
        """x modulo 2^bits of `dtype` (by default its own), in the type's range."""
        dtype = np.dtype(dtype or x.dtype)
        info = jnp.iinfo(dtype)
        if info.bits >= self.ring_bits or info.bits == 64:
            return lax.convert_element_type(x, dtype)  # the ring itself wraps, or the type is int64
        with self._wide_integers():
            offset = self.integer(-info.min)
            low = ((self._to_wide(x) + offset) & self.integer(2**info.bits - 1)) - offset
            return lax.convert_element_type(low, dtype)

    def divide(self, eqn: Any, a: Any, b: Any) -> tuple[Any, Any]:
        """Quotient, towards zero, and remainder of integers of one type, as JAX has them: a/0 is -1, remainder a.

        A known divisor: a product and a shift (Granlund and Montgomery, "Division by Invariant Integers using
        Multiplication", PLDI 1994). Else bit by bit: one comparison for each bit of the type, one after the other.
        """
        dtype = eqn.outvars[0].aval.dtype
        info = jnp.iinfo(dtype)
        if info.bits + 1 >= self.ring_bits:
            raise _refusal(eqn, f"the exact division of {dtype} needs a ring larger than {self.config.ring}")
        known = b.value if isinstance(b, _Known) else None
        with self._wide_integers():
            a, b = self._to_wide(_staged(a)), self._to_wide(_staged(b))
            size_a, size_b = (jnp.abs(a), jnp.abs(b)) if info.min else (a, b)
            if known is not None and info.bits <= 32 and info.max < 2**31 and self.integer is np.int64:
                quotient = _multiply_and_shift(size_a, np.asarray(known))
                remainder = size_a - quotient * size_b
            else:
                quotient, remainder = _bit_by_bit(size_a, size_b, info.bits)
            if info.min:
                negative = a < 0
                quotient = jnp.where(negative ^ (b < 0), -quotient, quotient)
                remainder = jnp.where(negative, -remainder, remainder)
            by_zero = b == 0
            found: tuple[Any, Any] = (
                jnp.where(by_zero, self.integer(-1 if info.min else info.max), quotient),
                jnp.where(by_zero, a, remainder),
            )
            return found[0].astype(dtype), found[1].astype(dtype)

    # ------------------------------------------------------------------------------------------------------- floats

    def ring_integer(self, x: Any) -> Any:
        """The integer that encodes a float: x 2^fraction_bits. Within `_wide_integers`."""
        if isinstance(x, _Known):
            return np.rint(np.asarray(x.value, np.float64) * 2.0**self.config.fraction_bits).astype(self.integer)
        # On shares this changes the type alone.
        return self._to_wide(lax.bitcast_convert_type(x, np.int32))

    def remainder(self, x: Any, y: Any) -> Any:
        """x - y trunc(x / y) of floats: a quotient that is nearly right, then integers, which are exact."""
        sign = _staged(x) < 0
        x, y = (_Known(np.abs(v.value)) if isinstance(v, _Known) else jnp.abs(v) for v in (x, y))
        with self._wide_integers():
            divisor = self.ring_integer(y)
            left = self.ring_integer(x)
            for _ in range(2):  # each leaves a part of 2^-13 of the quotient
                quotient = jnp.floor(_float(left) / _staged(y))
                left = left - lax.convert_element_type(quotient, self.integer) * divisor
            left = jnp.where(left < 0, left + divisor, left)
            left = jnp.where(left >= divisor, left - divisor, left)
            found = _float(left)
        return jnp.where(sign, -found, found)


def _float(integer: Any) -> Any:
    """The float that an integer of the ring encodes."""
    return lax.bitcast_convert_type(lax.convert_element_type(integer, np.int32), np.float32)


def _multiply_and_shift(a: Any, divisor: np.ndarray) -> Any:
    """a // |divisor| for 0 <= a <= 2^31 (int64) and known divisors; anything for 0."""
    size = np.abs(divisor.astype(np.int64))
    log = np.ceil(np.log2(np.maximum(size, 1))).astype(np.int64)
    power = np.int64(1) << (31 + log)
    factor = -(-power // np.maximum(size, 1))
    return (a * factor) >> (31 + log)


def _bit_by_bit(a: Any, b: Any, bits: int) -> tuple[Any, Any]:
    """Quotient and remainder of 0 <= a < 2^bits and 0 <= b < 2^bits, by hand's long division in base 2."""
    shape = jnp.broadcast_shapes(jnp.shape(a), jnp.shape(b))
    quotient = left = jnp.zeros(shape, a.dtype)
    places = np.arange(bits, dtype=a.dtype).reshape(-1, *[1] * len(shape))
    digits = (jnp.broadcast_to(a, shape) >> places) & 1
    for place in reversed(range(bits)):
        left = left * 2 + digits[place]
        fits = left >= b
        left = jnp.where(fits, left - b, left)
        quotient = quotient * 2 + lax.convert_element_type(fits, a.dtype)
    return quotient, left


def _wraps(dtype: Any) -> bool:
    """Whether numbers of a type are expected to wrap: unsigned ones, and those of 8 and 16 bits."""
    return jnp.issubdtype(dtype, jnp.integer) and (jnp.iinfo(dtype).min == 0 or jnp.iinfo(dtype).bits <= 16)


# ---------------------------------------------------------------------------------------------------- rules by name


def _div(rewriting: _Rewriting, eqn: Any, ins: list[Any]) -> list[Any]:
    if not _integers(eqn):
        return _bind(eqn, [_staged(x) for x in ins])
    return rewriting.wrapped(eqn, [rewriting.divide(eqn, *ins)[0]])  # -128 / -1


def _rem(rewriting: _Rewriting, eqn: Any, ins: list[Any]) -> list[Any]:
    return [rewriting.divide(eqn, *ins)[1] if _integers(eqn) else rewriting.remainder(*ins)]


def _shift(rewriting: _Rewriting, eqn: Any, ins: list[Any]) -> list[Any]:
    """By a known number of places, so that a number too large is none of the program's."""
    x, places = ins
    info = jnp.iinfo(eqn.outvars[0].aval.dtype)
    if not isinstance(places, _Known):
        raise _refusal(eqn, "the number of places must be known when the function is compiled")
    if not ((np.asarray(places.value) >= 0) & (np.asarray(places.value) < info.bits)).all():
        raise _refusal(eqn, f"the number of places must be from 0 to {info.bits - 1}")
    x = _staged(x)
    if eqn.primitive.name == "shift_left":
        return rewriting.wrapped(eqn, _bind(eqn, [x, places.value]))
    if eqn.primitive.name == "shift_right_logical" and info.min:  # of the bits as those of an unsigned number
        unsigned = rewriting.wrap(x, np.dtype(f"uint{info.bits}"))
        moved = lax.shift_right_logical(unsigned, lax.convert_element_type(places.value, unsigned.dtype))
        return [rewriting.wrap(moved, x.dtype)]
    return _bind(eqn, [rewriting.wrap(x), places.value])


def _convert(rewriting: _Rewriting, eqn: Any, ins: list[Any]) -> list[Any]:
    (x,), to = ins, eqn.outvars[0].aval.dtype
    before = eqn.invars[0].aval.dtype
    outs = _bind(eqn, [_staged(x)])
    if all(jnp.issubdtype(dtype, jnp.integer) for dtype in (before, to)) and not _holds(to, before):
        return [rewriting.wrap(_staged(x), to)]
    return outs


def _bitcast(rewriting: _Rewriting, eqn: Any, ins: list[Any]) -> list[Any]:
    before, to = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    if not all(jnp.issubdtype(dtype, jnp.integer) for dtype in (before, to)) or before.itemsize != to.itemsize:
        raise _refusal(eqn, f"the bits of {before} are not on the shares, so they cannot be read as {to}")
    return [rewriting.wrap(_staged(ins[0]), to)]


def _sort(rewriting: _Rewriting, eqn: Any, ins: list[Any]) -> list[Any]:
    """Stable by one more key: the place. Where only keys are sorted, equal ones are the same."""
    params = dict(eqn.params)
    keys = params["num_keys"]
    if not params["is_stable"] or len(ins) == keys:
        return _bind(eqn, [_staged(x) for x in ins], params)
    shape = eqn.invars[0].aval.shape
    place = np.arange(shape[params["dimension"]], dtype=np.int32)
    place = np.broadcast_to(place.reshape([-1 if i == params["dimension"] else 1 for i in range(len(shape))]), shape)
    params |= {"is_stable": False, "num_keys": keys + 1}
    next_ = ins[keys]
    if isinstance(next_, _Known) and np.array_equal(np.asarray(next_.value), place):  # argsort
        return _bind(eqn, [_staged(x) for x in ins], params)
    outs = eqn.primitive.bind(*(_staged(x) for x in ins[:keys]), place, *(_staged(x) for x in ins[keys:]), **params)
    return [*outs[:keys], *outs[keys + 1 :]]


def _top_k(rewriting: _Rewriting, eqn: Any, ins: list[Any]) -> list[Any]:
    """By a stable sort; SPU's own takes a thirtieth of the bytes, but equal numbers in any order."""
    x = _staged(ins[0])
    k = eqn.params["k"]
    if isinstance(eqn.outvars[1], DropVar):
        return _bind(eqn, [x])
    if eqn.params.get("axis", x.ndim - 1) != x.ndim - 1:
        raise _refusal(eqn, "it is computed along the last axis only")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = lax.convert_element_type(x, np.int32)
    place = jnp.broadcast_to(np.arange(x.shape[-1], dtype=np.int32), x.shape)
    values, places = lax.sort((-x, place), dimension=-1, is_stable=False, num_keys=2)
    values = lax.convert_element_type(-values[..., :k], eqn.outvars[0].aval.dtype)
    return [values, lax.convert_element_type(places[..., :k], eqn.outvars[1].aval.dtype)]


def _convolution(rewriting: _Rewriting, eqn: Any, ins: list[Any]) -> list[Any]:
    """Groups of a batch (as in the gradient of a convolution by groups) one by one: SPU would end the process."""
    params = dict(eqn.params)
    groups, numbers = params["batch_group_count"], params["dimension_numbers"]
    if groups == 1:
        return _bind(eqn, [_staged(x) for x in ins])
    params["batch_group_count"] = 1
    images = jnp.split(_staged(ins[0]), groups, numbers.lhs_spec[0])
    kernels = jnp.split(_staged(ins[1]), groups, numbers.rhs_spec[0])
    parts = [_bind(eqn, pair, params)[0] for pair in zip(images, kernels, strict=True)]
    return [lax.concatenate(parts, numbers.out_spec[1])]


def _tan(rewriting: _Rewriting, eqn: Any, ins: list[Any]) -> list[Any]:
    x = _staged(ins[0])
    return [lax.sin(x) / lax.cos(x)]


def _same(rewriting: _Rewriting, eqn: Any, ins: list[Any]) -> list[Any]:
    return ins


_RULES: Mapping[str, Callable[[_Rewriting, Any, list[Any]], list[Any]]] = {
    "bitcast_convert_type": _bitcast,
    "conv_general_dilated": _convolution,
    "convert_element_type": _convert,
    "div": _div,
    "optimization_barrier": _same,  # it only tells XLA's scheduler what to keep apart
    "rem": _rem,
    "sharding_constraint": _same,  # there is one device
    "shift_left": _shift,
    "shift_right_arithmetic": _shift,
    "shift_right_logical": _shift,
    "sort": _sort,
    "tan": _tan,
    "top_k": _top_k,
}

# They do something beside computing a value.
_NEVER_KNOWN = frozenset(["debug_callback", "debug_print", "io_callback", "pure_callback", "rng_uniform"])


# --------------------------------------------------------------------------------------------------------- helpers


def _refusal(eqn: Any, reason: str) -> SecureError:
    return SecureError(f"SPU cannot compute {eqn.primitive.name} ({source(eqn)}): {reason}")


def _staged(x: Any) -> Any:
    return x.staged if isinstance(x, _Known) else x


def _literal(atom: Any) -> Any:
    return np.asarray(atom.val, atom.aval.dtype)


def _struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _integers(eqn: Any) -> bool:
    return jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.integer)


def _holds(to: Any, before: Any) -> bool:
    """Whether a type has every number of another."""
    a, b = jnp.iinfo(to), jnp.iinfo(before)
    return a.min <= b.min and b.max <= a.max


def _bind(eqn: Any, ins: Sequence[Any], params: Mapping[str, Any] | None = None) -> list[Any]:
    functions, own = eqn.primitive.get_bind_params(eqn.params if params is None else params)
    outs = eqn.primitive.bind(*functions, *ins, **own)
    return list(outs) if eqn.primitive.multiple_results else [outs]
