"""`secure.check`: how far a function's numbers stay from what fixed point holds, seen on data in the clear.

SPU overflows without a word: a number that is too large for the ring becomes another one. So the function runs in the
clear on calibration data, with the largest magnitude of every operation recorded against the limit of its kind.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from flaxmpc.secure.party import to_arrays
from flaxmpc.secure.protocol import Config


class OverflowRisk(ValueError):
    """An operation comes too close to what fixed point holds, or beyond; the message says which, and by how much."""


@dataclasses.dataclass(frozen=True)
class OpMargin:
    """One operation of a function, and the largest magnitude it met.

    Attributes:
        primitive: JAX's name of it.
        where: the Flax modules that it stands in, or other JAX name scopes; "" if there are none.
        source: file and line that made it.
        shape: of its result, in the batch that met the largest magnitude.
        quantity: what has the limit: the result, or an operand's name.
        magnitude: the largest |value|; inf where a value was not finite.
        limit: from where on SPU's result is wrong.
    """

    primitive: str
    where: str
    source: str
    shape: tuple[int, ...]
    quantity: str
    magnitude: float
    limit: float

    @property
    def margin_bits(self) -> float:
        """log2(limit / magnitude): negative where it overflows, inf where all is zero."""
        if self.magnitude == 0.0:
            return math.inf
        return math.log2(self.limit) - math.log2(self.magnitude) if math.isfinite(self.magnitude) else -math.inf

    def __str__(self) -> str:
        place = f"{self.where}: {self.primitive}" if self.where else self.primitive
        return (
            f"{place} {self.shape} ({self.source}): {self.quantity} up to {self.magnitude:.3g}, limit "
            f"{self.limit:.3g}, so {self.margin_bits:.1f} bits of margin"
        )


@dataclasses.dataclass(frozen=True)
class Margins:
    """What `check` found.

    Attributes:
        ring, fraction_bits: the fixed point that it holds for.
        operations: those of the function, in its order.
    """

    ring: str
    fraction_bits: int
    operations: tuple[OpMargin, ...]

    @property
    def worst(self) -> OpMargin:
        """The operation with the smallest margin; the first of them."""
        return min(self.operations, key=lambda op: op.margin_bits)

    @property
    def margin_bits(self) -> float:
        """The smallest margin: by how many bits the numbers may grow before one of them overflows."""
        return self.worst.margin_bits

    def table(self, n: int = 10) -> list[OpMargin]:
        """The `n` operations with the smallest margins, smallest first."""
        return sorted(self.operations, key=lambda op: op.margin_bits)[:n]

    def require(self, bits: float = 2.0) -> Margins:
        """This, if the margin is at least `bits`.

        Raises:
            OverflowRisk: it is smaller; the message names the first operation where it is, as what follows from a
                number that is too large may be too large as well.
        """
        risky = [op for op in self.operations if op.margin_bits < bits]
        if risky:
            more = f" (and {len(risky) - 1} after it)" if len(risky) > 1 else ""
            raise OverflowRisk(
                f"the fixed point of {self.ring} with {self.fraction_bits} fraction bits is too small for "
                f"{risky[0]}, fewer than {bits:g}{more}: SPU would return garbage without a word"
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """The same as a JSON value; a margin or magnitude that is not finite is None."""

        def finite(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "ring": self.ring,
            "fraction_bits": self.fraction_bits,
            "margin_bits": finite(self.margin_bits),
            "operations": [
                dataclasses.asdict(op)
                | {"shape": list(op.shape), "magnitude": finite(op.magnitude), "margin_bits": finite(op.margin_bits)}
                for op in self.operations
            ],
        }


def check(
    fn: Callable[..., Any], batches: Iterable[tuple[Any, ...]], *, ring: str = "FM64", fraction_bits: int = 18
) -> Margins:
    """How far `fn` stays from overflow on calibration data, computed in the clear.

        secure.check(f, [(params, x) for x in calibration]).require(bits=2.0)

    What an overflow can't spoil is left out: values that a `where` or a product with a 0 from a comparison drops.
    Too small numbers, which become 0, are no overflow and not reported; nor is a while loop's condition.

    Args:
        fn: any JAX function of pytrees, as for `secure.jit`.
        batches: tuples of its arguments. A batch of other shapes counts as one more run of the same operations.
        ring, fraction_bits: see `secure.jit`.

    Raises:
        ValueError, TypeError: no batch, an argument without fixed-point encoding, an unknown ring, or a function
            without floating-point operations.
    """
    config = Config(ring=ring, fraction_bits=fraction_bits)
    compiled: dict[Any, _Instrumented] = {}
    found: dict[Any, OpMargin] = {}
    for number, batch in enumerate(batches):
        args = to_arrays(tuple(batch), config, f"batch {number}")
        leaves, treedef = jax.tree.flatten(args)
        key = (treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in compiled:
            compiled[key] = _Instrumented(fn, args, config)
        seen: collections.Counter[Any] = collections.Counter()
        for op in compiled[key](leaves):
            same = (op.primitive, op.where, op.source, op.quantity)
            seen[same] += 1
            place = (*same, seen[same])
            if place not in found or op.magnitude > found[place].magnitude:
                found[place] = op
    if not compiled:
        raise ValueError("there is no batch to check the function on")
    if not found:
        raise ValueError("the function has no floating-point operation to check")
    return Margins(config.ring, config.fraction_bits, tuple(found.values()))


# ------------------------------------------------------------------------------------------------------- the limits


class _Quantity(NamedTuple):
    """Something of an operation that has a limit."""

    name: str
    value: jax.Array
    limit: float


# Found by experiment with ABY3 and SEMI2K, FM64, 18 fraction bits, spu 0.9.5 (tests/secure/test_check.py has them):
# each is right below its limit, and wrong from twice the limit on at the latest.
_EXP_REACH = 500.0  # exp(x) is (1 + x/256)^256, which grows again below -512


def _product(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[_Quantity]:
    """Before it is truncated a product has twice the fraction bits; the terms of a sum of products may wrap."""
    yield _Quantity("result", out, config.product_limit)


def _div(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[_Quantity]:
    yield from _product(eqn, ins, out, config)
    if not isinstance(eqn.invars[1], Literal):  # else a product with the reciprocal
        # The numerator is multiplied by up to 2 / (the denominator, scaled to [0.5, 1)).
        yield _Quantity("numerator", ins[0], config.product_limit / 2.0)
        yield _Quantity("denominator", ins[1], _unit(config))


def _unit(config: Config) -> float:
    """2^fraction_bits: SPU finds the first bit of a denominator among twice the fraction bits."""
    return 2.0**config.fraction_bits


def _integer_pow(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[_Quantity]:
    """Repeated squaring, of which no power is larger than the last."""
    yield from _product(eqn, ins, out, config)
    if eqn.params["y"] < 0:
        yield _Quantity("denominator", jax.lax.integer_pow(ins[0], -eqn.params["y"]), _unit(config))


def _pow(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[_Quantity]:
    """By the logarithm of the base."""
    yield from _product(eqn, ins, out, config)
    yield _Quantity("base", ins[0], 2.0 * _unit(config))


def _exp(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[_Quantity]:
    yield from _product(eqn, ins, out, config)
    yield _Quantity("negative operand", jnp.minimum(ins[0], 0.0), _EXP_REACH)


def _logistic(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[_Quantity]:
    """1 / (1 + exp(-x))."""
    yield _Quantity("exp(-operand)", jnp.exp(-ins[0]), config.product_limit)
    yield _Quantity("positive operand", jnp.maximum(ins[0], 0.0), _EXP_REACH)


def _rsqrt(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[_Quantity]:
    yield _Quantity("operand", ins[0], _unit(config) / 2.0)


def _log(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[_Quantity]:
    yield _Quantity("operand", ins[0], 2.0 * _unit(config))


def _log1p(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[_Quantity]:
    yield _Quantity("1 + operand", 1.0 + ins[0], 2.0 * _unit(config))


def _sine(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[_Quantity]:
    """The period is subtracted with an error that grows with the angle: 0.005 at the limit."""
    yield _Quantity("operand", ins[0], _unit(config) / 64.0)


def _encoded(eqn: Any, ins: Sequence[Any], out: jax.Array, config: Config) -> Iterator[_Quantity]:
    """No product: sums, comparisons, and erf and tanh, which SPU clips."""
    yield _Quantity("result", out, config.limit)


_LIMITS: dict[str, Callable[[Any, Sequence[Any], jax.Array, Config], Iterator[_Quantity]]] = {
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


# --------------------------------------------------------------------------------------------------- the evaluation

# Their parameter with the function that they call on their operands.
_CALLS = {
    "pjit": "jaxpr",
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}

# Element i of the result depends on element i of the operands alone.
_ELEMENTWISE = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "neg",
        "abs",
        "sign",
        "max",
        "min",
        "integer_pow",
        "square",
        "pow",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log1p",
        "logistic",
        "tanh",
        "erf",
        "rsqrt",
        "sqrt",
        "sin",
        "cos",
        "floor",
        "ceil",
        "round",
        "convert_element_type",
        "copy",
        "select_n",
        "clamp",
    ]
)

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

# A small whole number made of comparisons stays one, without a rounding error, through these.
_EXACT = frozenset(["add", "sub", "neg", "broadcast_in_dim", "reshape", "squeeze", "convert_element_type", "copy"])


class _Step(NamedTuple):
    """An equation of a flat program: operands are numbers of values, or Literals."""

    eqn: Any
    ins: tuple[Any, ...]
    outs: tuple[int, ...]
    where: str


class _Flat:
    """A jaxpr with all calls written out, its values numbered."""

    def __init__(self, closed: ClosedJaxpr, where: str):
        self.constants: dict[int, Any] = {}
        self.steps: list[_Step] = []
        self._count = 0
        self.inputs = [self._new() for _ in closed.jaxpr.invars]
        self.outputs = self._add(closed, self.inputs, where)

    def _new(self) -> int:
        self._count += 1
        return self._count

    def _add(self, closed: ClosedJaxpr, inputs: Sequence[Any], where: str) -> list[Any]:
        env: dict[Any, Any] = dict(zip(closed.jaxpr.invars, inputs, strict=True))
        for var, constant in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            env[var] = self._new()
            self.constants[env[var]] = constant

        def number(atom: Any) -> Any:
            return atom if isinstance(atom, Literal) else env[atom]

        for eqn in closed.jaxpr.eqns:
            ins = tuple(map(number, eqn.invars))
            here = "/".join(part for part in (where, _modules(str(eqn.source_info.name_stack))) if part)
            called = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
            if called is not None:
                outs = self._add(_closed(called), ins, here)
            else:
                outs = [self._new() for _ in eqn.outvars]
                self.steps.append(_Step(eqn, ins, tuple(outs), here))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [number(var) for var in closed.jaxpr.outvars]


def _modules(scope: str) -> str:
    """Flax names a module again for each of its methods: a/b.method/b.other is a/b."""
    return re.sub(r"(?<![^/])([^/]+)(?:/\1(?![^/]))+", r"\1", re.sub(r"\.\w+", "", scope))


def _closed(jaxpr: ClosedJaxpr | Jaxpr) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


class _Instrumented:
    """`fn` for arguments of one shape, as a compiled program that returns the largest magnitudes alone."""

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], config: Config):
        program = _Flat(jax.make_jaxpr(fn)(*args), "")
        self._operations: list[OpMargin] = []

        def magnitudes(leaves: list[Any]) -> jax.Array:
            found = _evaluate(program, leaves, config)[1]
            self._operations = [op for op, _ in found]
            return _stack(found)

        # Compiling takes longer than running, and thoroughly it would take three times as long.
        options: dict[str, Any] = {"xla_backend_optimization_level": 0}
        self._magnitudes = jax.jit(magnitudes).lower(jax.tree.leaves(args)).compile(compiler_options=options)

    def __call__(self, leaves: list[Any]) -> list[OpMargin]:
        magnitudes = np.asarray(self._magnitudes(leaves), np.float64)
        return [
            dataclasses.replace(op, magnitude=float(magnitude))
            for op, magnitude in zip(self._operations, magnitudes, strict=True)
        ]


# Operations, and their traced magnitudes.
_Found = list[tuple[OpMargin, jax.Array]]


def _stack(found: _Found) -> jax.Array:
    return jnp.stack([magnitude for _, magnitude in found]) if found else jnp.zeros(0)


def _evaluate(program: _Flat, args: Sequence[Any], config: Config) -> tuple[list[Any], _Found]:
    """The program's outputs, and what it met on the way."""
    values: dict[int, Any] = dict(program.constants) | dict(zip(program.inputs, args, strict=True))
    exact: set[int] = set()
    inside: dict[int, _Found] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for index, step in enumerate(program.steps):
        ins = [read(atom) for atom in step.ins]
        name = step.eqn.primitive.name
        if name in _BODIES:
            outs, inside[index] = _BODIES[name](step, ins, config)
        else:
            functions, params = step.eqn.primitive.get_bind_params(step.eqn.params)
            outs = step.eqn.primitive.bind(*functions, *ins, **params)
            # Without it XLA would copy a long chain of operations into every maximum along it, and compile for minutes.
            outs = jax.lax.optimization_barrier(outs if step.eqn.primitive.multiple_results else [outs])
            if name in _EXACT and all(
                isinstance(atom, Literal) or atom in exact or jnp.result_type(value) == jnp.bool_
                for atom, value in zip(step.ins, ins, strict=True)
            ):
                exact.update(step.outs)
        values.update(zip(step.outs, outs, strict=True))

    # Which elements of a value have an effect: all (True), those of a mask, or none (the value is not in the dict).
    needed: dict[int, Any] = {atom: True for atom in program.outputs if not isinstance(atom, Literal)}
    found: list[_Found] = []
    for index, step in reversed(list(enumerate(program.steps))):
        masks = [needed.get(out, False) for out in step.outs]
        ins = [read(atom) for atom in step.ins]
        if any(mask is not False for mask in masks):
            for position, atom in enumerate(step.ins):
                if not isinstance(atom, Literal):
                    mask = _needed_of(step, position, ins, masks[0], exact)
                    needed[atom] = _either(needed.get(atom, False), mask)
        here: _Found = list(inside.get(index, ()))
        if index not in inside:
            for out, mask in zip(step.outs, masks, strict=True):
                here += _met(step, ins, values[out], mask, config)
        found.append(here)
    return [read(atom) for atom in program.outputs], [pair for here in reversed(found) for pair in here]


def _either(a: Any, b: Any) -> Any:
    if a is True or b is True:
        return True
    return b if a is False else a if b is False else a | b


def _needed_of(step: _Step, position: int, ins: list[Any], mask: Any, exact: set[int]) -> Any:
    """Which elements of an operand have an effect on the needed ones of the result."""
    name = step.eqn.primitive.name
    shape = step.eqn.outvars[0].aval.shape
    if name not in _ELEMENTWISE or jnp.shape(ins[position]) != shape:
        return True
    if name == "select_n" and position > 0:
        mask = _and(mask, jnp.broadcast_to(ins[0] == position - 1, shape))
    if name == "mul" and not isinstance(other := step.ins[1 - position], Literal) and other in exact:
        mask = _and(mask, jnp.broadcast_to(ins[1 - position] != 0, shape))
    return mask


def _and(mask: Any, other: jax.Array) -> Any:
    return other if mask is True else mask & other


def _met(step: _Step, ins: list[Any], out: Any, mask: Any, config: Config) -> Iterator[tuple[OpMargin, jax.Array]]:
    """The limits of one result, and the largest magnitudes against them."""
    name = step.eqn.primitive.name
    if name in _MOVES or not jnp.issubdtype(jnp.result_type(out), jnp.floating):
        return
    for quantity in _LIMITS.get(name, _encoded)(step.eqn, ins, out, config):
        size = jnp.abs(quantity.value)
        size = jnp.where(jnp.isnan(size), jnp.inf, size)
        if mask is not True:
            size = jnp.where(mask, size, 0.0)
        op = OpMargin(
            primitive=name,
            where=step.where,
            source=_source(step.eqn.source_info),
            shape=tuple(jnp.shape(out)),
            quantity=quantity.name,
            magnitude=0.0,
            limit=quantity.limit,
        )
        yield op, jnp.max(size, initial=0.0).astype(jnp.float32)


def _source(source_info: Any) -> str:
    """File name and line."""
    text = source_info_util.summarize(source_info)
    found = re.search(r"[^/\\:]+:\d+", text)
    return found.group() if found else text


# ------------------------------------------------------------------------------------------------- loops and branches


def _scan(step: _Step, ins: list[Any], config: Config) -> tuple[list[Any], _Found]:
    params = step.eqn.params
    body = _Flat(params["jaxpr"], step.where)
    constants, rest = ins[: params["num_consts"]], ins[params["num_consts"] :]
    num_carry = params["num_carry"]
    operations: list[OpMargin] = []

    def turn(carry: list[Any], x: list[Any]) -> tuple[list[Any], tuple[list[Any], jax.Array]]:
        outs, found = _evaluate(body, [*constants, *carry, *x], config)
        operations[:] = [op for op, _ in found]
        return outs[:num_carry], (outs[num_carry:], _stack(found))

    carry, (ys, magnitudes) = jax.lax.scan(
        turn, rest[:num_carry], rest[num_carry:], length=params["length"], reverse=params["reverse"]
    )
    return [*carry, *ys], list(zip(operations, magnitudes.max(0, initial=0.0), strict=True))


def _while(step: _Step, ins: list[Any], config: Config) -> tuple[list[Any], _Found]:
    params = step.eqn.params
    of_condition, of_body = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    condition, body = (_Flat(params[name], step.where) for name in ("cond_jaxpr", "body_jaxpr"))
    operations: list[OpMargin] = []

    def turn(values: list[Any]) -> tuple[list[Any], jax.Array]:
        outs, found = _evaluate(body, [*ins[of_condition:of_body], *values], config)
        operations[:] = [op for op, _ in found]
        return outs, _stack(found)

    start = ins[of_body:]
    most = jnp.zeros(jax.eval_shape(turn, start)[1].shape)

    def again(state: tuple[list[Any], jax.Array]) -> jax.Array:
        return _evaluate(condition, [*ins[:of_condition], *state[0]], config)[0][0]

    def next_(state: tuple[list[Any], jax.Array]) -> tuple[list[Any], jax.Array]:
        outs, magnitudes = turn(state[0])
        return outs, jnp.maximum(state[1], magnitudes)

    outs, most = jax.lax.while_loop(again, next_, (start, most))
    return outs, list(zip(operations, most, strict=True))


def _cond(step: _Step, ins: list[Any], config: Config) -> tuple[list[Any], _Found]:
    """Only the branch that is taken counts."""
    branches = [_Flat(branch, step.where) for branch in step.eqn.params["branches"]]
    operations: list[list[OpMargin]] = [[] for _ in branches]

    def run(i: int, operands: Any) -> tuple[list[Any], jax.Array]:
        outs, found = _evaluate(branches[i], operands, config)
        operations[i] = [op for op, _ in found]
        return outs, _stack(found)

    sizes = [jax.eval_shape(functools.partial(run, i), ins[1:])[1].shape for i in range(len(branches))]

    def taken(i: int, operands: Any) -> tuple[list[Any], jax.Array]:
        outs, magnitudes = run(i, operands)
        return outs, jnp.concatenate([magnitudes if j == i else jnp.zeros(size) for j, size in enumerate(sizes)])

    outs, magnitudes = jax.lax.switch(ins[0], [functools.partial(taken, i) for i in range(len(branches))], ins[1:])
    return outs, list(zip([op for each in operations for op in each], magnitudes, strict=True))


_BODIES: dict[str, Callable[[_Step, list[Any], Config], tuple[list[Any], _Found]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
