"""A function run in the clear, with the largest magnitude that each of its operations meets."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from flaxmpc.secure.expansions import expansion
from flaxmpc.secure.jaxpr import called, callers, calling, modules, names, source
from flaxmpc.secure.limits import Operation, exact, quantities
from flaxmpc.secure.protocol import Config


@dataclasses.dataclass(frozen=True)
class OpMargin:
    """One operation of a function, and the largest magnitude it met.

    Attributes:
        primitive: JAX's name of it.
        where: the Flax modules that it stands in, or other JAX name scopes; "" if there are none.
        source: file and line that made it.
        shape: its result's, in the batch that met the largest magnitude.
        quantity: what has the limit: the result, or an operand's name.
        magnitude: the largest |value|; inf where a value was not finite.
        limit: the magnitude from which on SPU's result is wrong.
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


# Linear in each operand, so what is needed of that goes the way back.
_MOVING = frozenset(
    {"broadcast_in_dim", "concatenate", "dot_general", "reduce_sum", "reshape", "slice", "squeeze", "transpose"}
)

# Element i of the result depends on element i of the operands alone.
_ELEMENTWISE = names(
    """
    add sub mul div neg abs sign max min integer_pow square pow exp exp2 expm1 log log1p logistic tanh erf rsqrt
    sqrt sin cos floor ceil round convert_element_type copy select_n clamp
    """
)

# A small whole number made of comparisons stays one, without a rounding error, through these.
_COUNTS = frozenset(["add", "sub", "neg", "broadcast_in_dim", "reshape", "squeeze", "convert_element_type", "copy"])

# Of one number, however often it stands there, they make one number.
_UNIFORM = _ELEMENTWISE | {"broadcast_in_dim", "reshape", "squeeze"}


class _Step(NamedTuple):
    """An equation of a flat program: operands are numbers of values, or Literals; `callers` call what it is in."""

    eqn: Any
    ins: tuple[Any, ...]
    outs: tuple[int, ...]
    where: str
    callers: tuple[Any, ...]


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
            here = "/".join(part for part in (where, modules(str(eqn.source_info.name_stack))) if part)
            if (function := called(eqn) or expansion(eqn)) is not None:
                with calling(eqn):
                    outs = self._add(function, ins, here)
            else:
                outs = [self._new() for _ in eqn.outvars]
                self.steps.append(_Step(eqn, ins, tuple(outs), here, callers()))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [number(var) for var in closed.jaxpr.outvars]


class Instrumented:
    """`fn` for arguments of one shape, as a compiled program that returns the largest magnitudes alone."""

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], config: Config):
        program = _Flat(jax.make_jaxpr(fn)(*args), "")
        self._operations: list[OpMargin] = []

        def magnitudes(leaves: list[Any]) -> jax.Array:
            found = _evaluate(program, leaves, config, inputs_exact=True)[1]
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


class _Facts:
    """What is known of a program's values beside what they are: that they are constants, or exact in fixed point."""

    def __init__(self, program: _Flat, inputs_exact: bool):
        self._known: set[int] = set(program.constants)
        self._uniform = {atom for atom, value in program.constants.items() if _is_uniform(value)}
        self._exact = set(program.constants) | (set(program.inputs) if inputs_exact else set())

    def is_known(self, step: _Step) -> bool:
        """Whether a step depends on no argument: JAX computes it, while compiling."""
        return all(isinstance(atom, Literal) or atom in self._known for atom in step.ins)

    def learn(self, step: _Step, ins: Sequence[Any], outs: Sequence[Any], config: Config) -> Operation:
        """The step's operation, with its first result; notes what follows for its results."""
        uniform = [self._has(self._uniform, atom) for atom in step.ins]
        exact_ins = [
            self._has(self._exact, atom) or not jnp.issubdtype(jnp.result_type(value), jnp.floating)
            for atom, value in zip(step.ins, ins, strict=True)
        ]
        operation = Operation(step.eqn, ins, outs[0] if outs else None, exact_ins, uniform, config)
        if self.is_known(step):
            self._known.update(step.outs)
            self._exact.update(step.outs)
            if all(uniform) and step.eqn.primitive.name in _UNIFORM:
                self._uniform.update(step.outs)
        elif outs and exact(operation):
            self._exact.update(step.outs)
        return operation

    @staticmethod
    def _has(atoms: set[int], atom: Any) -> bool:
        return isinstance(atom, Literal) or atom in atoms


def _is_uniform(constant: Any) -> bool:
    array = np.asarray(constant)
    return array.size > 0 and bool((array == array.flat[0]).all())


def _evaluate(
    program: _Flat, args: Sequence[Any], config: Config, *, inputs_exact: bool = False
) -> tuple[list[Any], _Found]:
    """The program's outputs, and what it met on the way.

    `inputs_exact`: the arguments are rounded to fixed point, and no more; what a loop hands on may be off by more.
    """
    values: dict[int, Any] = dict(program.constants) | dict(zip(program.inputs, args, strict=True))
    counts: set[int] = set()
    facts = _Facts(program, inputs_exact)
    operations: dict[int, Operation] = {}
    inside: dict[int, _Found] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for index, step in enumerate(program.steps):
        ins = [read(atom) for atom in step.ins]
        name = step.eqn.primitive.name
        if name in _BODIES:
            with calling(*step.callers, step.eqn):
                outs, inside[index] = _BODIES[name](step, ins, config)
        else:
            functions, params = step.eqn.primitive.get_bind_params(step.eqn.params)
            outs = step.eqn.primitive.bind(*functions, *ins, **params)
            # Without it XLA would copy a long chain of operations into every maximum along it, and compile for minutes.
            outs = jax.lax.optimization_barrier(outs if step.eqn.primitive.multiple_results else [outs])
            if name in _COUNTS and all(
                isinstance(atom, Literal) or atom in counts or jnp.result_type(value) == jnp.bool_
                for atom, value in zip(step.ins, ins, strict=True)
            ):
                counts.update(step.outs)
        operations[index] = facts.learn(step, ins, outs, config)
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
                    mask = _needed_of(step, position, ins, masks[0], counts)
                    needed[atom] = _either(needed.get(atom, False), mask)
        here: _Found = list(inside.get(index, ()))
        if index not in inside and not facts.is_known(step):
            for out, mask in zip(step.outs, masks, strict=True):
                here += _met(step, operations[index]._replace(out=values[out]), mask)
        found.append(here)
    return [read(atom) for atom in program.outputs], [pair for here in reversed(found) for pair in here]


def _either(a: Any, b: Any) -> Any:
    if a is True or b is True:
        return True
    return b if a is False else a if b is False else a | b


def _needed_of(step: _Step, position: int, ins: list[Any], mask: Any, counts: set[int]) -> Any:
    """Which elements of an operand have an effect on the needed ones of the result."""
    name = step.eqn.primitive.name
    shape = step.eqn.outvars[0].aval.shape
    if name in _MOVING and mask is not True:
        functions, params = step.eqn.primitive.get_bind_params(step.eqn.params)

        def moved(operand: jax.Array) -> jax.Array:
            others = [jnp.ones(jnp.shape(each)) for each in ins]
            return step.eqn.primitive.bind(*functions, *others[:position], operand, *others[position + 1 :], **params)

        _, back = jax.vjp(moved, jnp.ones(jnp.shape(ins[position])))
        return back(mask.astype(jnp.float32))[0] > 0
    own = jnp.shape(ins[position])
    if name not in _ELEMENTWISE or len(own) != len(shape):
        return True
    if name == "select_n" and position > 0:
        mask = _and(mask, jnp.broadcast_to(ins[0] == position - 1, shape))
    if name == "mul" and not isinstance(other := step.ins[1 - position], Literal) and other in counts:
        mask = _and(mask, jnp.broadcast_to(ins[1 - position] != 0, shape))
    if own != shape and mask is not True:  # broadcast
        mask = mask.any(tuple(axis for axis, size in enumerate(own) if size != shape[axis]), keepdims=True)
    return mask


def _and(mask: Any, other: jax.Array) -> Any:
    return other if mask is True else mask & other


def _met(step: _Step, operation: Operation, mask: Any) -> Iterator[tuple[OpMargin, jax.Array]]:
    """The limits of one result, and the largest magnitudes against them."""
    for quantity in quantities(operation):
        size = jnp.abs(quantity.value)
        size = jnp.where(jnp.isnan(size), jnp.inf, size)
        if mask is not True:
            size = jnp.where(mask, size, 0.0)
        op = OpMargin(
            primitive=step.eqn.primitive.name,
            where=step.where,
            source=source(step.eqn, step.callers),
            shape=tuple(jnp.shape(operation.out)),
            quantity=quantity.name,
            magnitude=0.0,
            limit=quantity.limit,
        )
        yield op, jnp.max(size, initial=0.0).astype(jnp.float32)


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
