"""A JAX function as SPU computes it rightly: what SPU would compute otherwise than JAX is written anew, or refused.

SPU has one ring for all integers, no stable sort, and divides with the precision of fixed point. So

- what depends on no argument is computed by JAX, while compiling: a constant key gives JAX's own random numbers;
- unsigned integers, and those of 8 and 16 bits, wrap as their type does. int32 and int64 do not: their sums and
  products are right as long as they fit (see `secure.check`), and what is returned is right even then;
- integer division, and the remainder of floats, are exact;
- sort and top_k are stable;
- products and quotients are computed as they are written, see `flaxmpc.secure.apart`;
- what overflows between operand and result, such as sinh, is written out, see `flaxmpc.secure.expansions`;
- a power that is as good as 0 is 0, and a constant in a product stands in the order of its dimensions;
- what remains, such as the bits of a float, is refused by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Literal

from flaxmpc.secure._spu import SecureError
from flaxmpc.secure.apart import apart
from flaxmpc.secure.arithmetic import Arithmetic
from flaxmpc.secure.expansions import expansion
from flaxmpc.secure.jaxpr import bind, called, calling, refusal
from flaxmpc.secure.protocol import Config
from flaxmpc.secure.refused import REFUSED
from flaxmpc.secure.rules import RULES, Operands, wrapped

# Of few known numbers they make many, so what they make is not kept in the program.
_GROWING = frozenset(["broadcast_in_dim", "iota"])

# They have functions that they call, in turns or one of them. A constant that enters one is no constant to XLA: what is
# made of it there while compiling, a transpose for one, SPU reads in the order in which the numbers were before.
_BODIES = frozenset(["cond", "scan", "while"])

# They do something beside computing a value.
_NEVER_KNOWN = frozenset(
    ["debug_callback", "debug_print", "infeed", "io_callback", "outfeed", "pure_callback", "rng_uniform"]
)


def lower(fn: Callable[..., Any], structs: Sequence[Any], config: Config) -> tuple[Any, Any]:
    """The lowered function of flat arguments that computes on shares what `fn` does, and the output's structs.

    Args:
        fn: any JAX function of pytrees.
        structs: its arguments, pytrees of jax.ShapeDtypeStruct.
        config: the parties' settings.

    Raises:
        SecureError: an operation that SPU cannot compute; names it, and the user's line.
    """
    rewriting = _Rewriting(config)
    wide = any(leaf.dtype == np.int64 for leaf in jax.tree.leaves(structs))  # see `flaxmpc.secure.ring.Integers`
    with rewriting.arithmetic.x64(wide):
        traced = jax.jit(fn, keep_unused=True).trace(*structs)
    flat = jax.jit(functools.partial(rewriting.evaluate, traced.jaxpr), keep_unused=True)
    try:
        with rewriting.arithmetic.x64():
            again = flat.trace(*jax.tree.leaves(structs))
    except SecureError as error:  # JAX adds lines to what is raised while it traces
        raise SecureError(*error.args) from None
    with rewriting.arithmetic.x64():
        # For no device in particular: no code of one processor alone.
        return again.lower(lowering_platforms=("interpreter",)), traced.out_info


class _Known:
    """A value that depends on no argument; in the program it is a constant, or what `stage` makes."""

    def __init__(self, value: Any, stage: Callable[[], Any] | None = None):
        self.value = value
        self._stage = stage or (lambda: value)

    @functools.cached_property
    def staged(self) -> Any:
        return self._stage()


class _Rewriting:
    """One function's, for the ring of a config."""

    def __init__(self, config: Config):
        self._ring = config.ring
        self.arithmetic = Arithmetic(config)

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
            with calling(eqn):
                return self._outputs(function, ins)
        name = eqn.primitive.name
        if all(isinstance(x, _Known) for x in ins) and name not in _NEVER_KNOWN:
            with jax.ensure_compile_time_eval():
                outs = bind(eqn, [x.value for x in ins])
            if name not in _GROWING:
                return [_Known(out) for out in outs]
            return [_Known(outs[0], lambda: bind(eqn, [_staged(x) for x in ins])[0])]
        if (function := expansion(eqn)) is not None:
            with calling(eqn):
                return self._outputs(function, ins)
        if name in REFUSED:
            raise refusal(eqn, REFUSED[name])
        for var in (*eqn.invars, *eqn.outvars):
            self._fits(eqn, var.aval)
        values = [_staged(x) for x in ins]
        if name in _BODIES:
            values = [apart(value) if _is_array(x) else value for x, value in zip(ins, values, strict=True)]
        if name in RULES:
            known = [x.value if isinstance(x, _Known) else None for x in ins]
            outs = RULES[name](eqn, Operands(values, known, self.arithmetic))
            return [out if isinstance(out, Tracer) else _Known(out) for out in outs]
        return wrapped(eqn, bind(eqn, values, self._params(eqn)), self.arithmetic)

    def _fits(self, eqn: Any, aval: Any) -> None:
        """Refuses what is no number of SPU's, and integers of which the ring cannot hold, or cannot compare, all."""
        dtype = getattr(aval, "dtype", np.dtype(bool))
        if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
            raise refusal(eqn, f"{dtype} is no type on shares, float32 is")
        if jnp.issubdtype(dtype, jnp.integer) and not self.arithmetic.holds(dtype):
            raise refusal(eqn, f"{dtype} has numbers that the ring {self._ring} cannot hold with a sign")

    def _params(self, eqn: Any) -> dict[str, Any]:
        """An equation's parameters, with the functions in them rewritten: the bodies of loops and branches."""
        with calling(eqn):
            return {name: self._rewritten(value) for name, value in eqn.params.items()}

    def _rewritten(self, value: Any) -> Any:
        if isinstance(value, ClosedJaxpr):
            return jax.make_jaxpr(functools.partial(self.evaluate, value))(*map(_struct, value.in_avals))
        return tuple(map(self._rewritten, value)) if type(value) is tuple else value


def _is_array(x: Any) -> bool:
    """Whether it is known, and more than one number: random keys are none."""
    return isinstance(x, _Known) and np.size(x.value) > 1 and not jnp.issubdtype(x.value.dtype, jax.dtypes.extended)


def _staged(x: Any) -> Any:
    return x.staged if isinstance(x, _Known) else x


def _literal(atom: Any) -> Any:
    return np.asarray(atom.val, atom.aval.dtype)


def _struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
