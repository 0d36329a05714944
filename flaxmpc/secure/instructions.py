"""A function as a list of sums, products and moves: what can be computed with a plan of bits."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Literal

from flaxmpc.secure.arithmetic import enable_x64  # pyright: ignore[reportAttributeAccessIssue]
from flaxmpc.secure.jaxpr import bind, called, modules, names, refusal


class Instruction(NamedTuple):
    """One operation on numbers that depend on arguments.

    Attributes:
        kind: "move", "sum", "product", "shift" (by a power of two) or "clip".
        eqn: the equation of the jaxpr.
        ins: its operands, each its place among the function's values, or an array that is known.
        out: the result's place.
        where: the modules that it is in, and its primitive.
    """

    kind: str
    eqn: Any
    ins: tuple[Any, ...]
    out: int
    where: str

    @property
    def known(self) -> Any:
        """The operand that is known; None if none is."""
        return next((x for x in self.ins if not isinstance(x, int)), None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.eqn.outvars[0].aval.shape

    def apply(self, ins: list[Any]) -> Any:
        """The result, of floating-point numbers or of int64."""
        name = self.eqn.primitive.name
        if (function := called(self.eqn)) is not None:
            return _evaluated(function, ins)[0]
        if name in ("div", "mul"):  # a division is a product with the reciprocal, see `Function`
            return ins[0] * ins[1]
        if name == "clamp":  # one comparison, of both ends at once, in place of one after the other
            low, x, high = ins
            below, above = jnp.stack([low - x, x - high]) > 0
            return x + jnp.where(below, low - x, 0) + jnp.where(above, high - x, 0)
        return _bound(self.eqn, ins)


def _bound(eqn: Any, ins: list[Any]) -> Any:
    params = dict(eqn.params)
    if params.get("preferred_element_type") is not None:
        params["preferred_element_type"] = jnp.result_type(*ins)
    return bind(eqn, ins, params)[0]


def _evaluated(closed: ClosedJaxpr, ins: list[Any]) -> list[Any]:
    """The outputs of what `_is_product`, of floating-point numbers or of int64."""
    env = dict(zip(closed.jaxpr.invars, ins, strict=True))
    for eqn in closed.jaxpr.eqns:
        env[eqn.outvars[0]] = _bound(eqn, [env[atom] for atom in eqn.invars])
    return [env[atom] for atom in closed.jaxpr.outvars]


def _is_product(closed: ClosedJaxpr) -> bool:
    """Whether a function only moves its two arguments, multiplies them, and moves the products: it is one product."""
    products: dict[Any, int] = dict.fromkeys(closed.jaxpr.invars, 0)  # how many each value has been through
    for eqn in closed.jaxpr.eqns:
        before = {products.get(atom) if not isinstance(atom, Literal) else None for atom in eqn.invars}
        name = eqn.primitive.name
        if name not in _MOVES | _PRODUCTS or len(before) != 1 or (name in _PRODUCTS and before != {0}):
            return False
        products[eqn.outvars[0]] = (before.pop() or 0) + (name in _PRODUCTS)
    known = closed.jaxpr.constvars or len(closed.jaxpr.invars) != 2
    return not known and [products.get(out) for out in closed.jaxpr.outvars] == [1]


_MOVES = names(
    """
    broadcast_in_dim concatenate convert_element_type copy expand_dims pad reshape rev select_n slice squeeze
    transpose
    """
)
_SUMS = frozenset(["add", "add_any", "neg", "reduce_sum", "sub"])
_PRODUCTS = frozenset(["conv_general_dilated", "dot_general", "mul"])
_CLIPS = frozenset(["clamp", "max", "min"])


class Function:
    """A function for arguments of certain shapes, as instructions.

    Attributes:
        instructions: all of them, in order.
        inputs: shapes of the arguments' leaves, whose places are the first ones.
        outputs: the places of the results, or arrays that are known.
        tree: the results' pytree.
        steps: the instructions that are sums, products and clips: the same ones for arguments of all shapes for which
            the function computes the same.
        number: each step's number among them, by its place.
    """

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...]):
        """Args: args: pytrees of what has a shape. SecureError: an operation that is none of those, by its name."""
        leaves, tree = jax.tree.flatten(args)
        structs = [jax.ShapeDtypeStruct(jnp.shape(leaf), np.float32) for leaf in leaves]
        with enable_x64(False):  # pyright: ignore[reportCallIssue]
            traced, shape = jax.make_jaxpr(fn, return_shape=True)(*jax.tree.unflatten(tree, structs))
            closed = jax.make_jaxpr(functools.partial(_written_out, traced))(*structs)
        self.tree = jax.tree.structure(shape)
        self.inputs = [struct.shape for struct in structs]
        self.instructions: list[Instruction] = []
        env: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, map(np.asarray, closed.consts), strict=True))
        env.update(zip(closed.jaxpr.invars, range(len(structs)), strict=True))

        def read(atom: Any) -> Any:
            return _literal(atom) if isinstance(atom, Literal) else env[atom]

        for eqn in closed.jaxpr.eqns:
            ins = tuple(read(atom) for atom in eqn.invars)
            if not any(isinstance(x, int) for x in ins):
                with jax.ensure_compile_time_eval():
                    env.update(zip(eqn.outvars, map(np.asarray, bind(eqn, ins)), strict=True))
                continue
            place = env[eqn.outvars[0]] = len(structs) + len(self.instructions)
            name = eqn.primitive.name if called(eqn) is None else "product"  # however it is computed
            where = f"{modules(str(eqn.source_info.name_stack))} {name}".strip()
            self.instructions.append(Instruction(*_kind(eqn, ins), place, where))
        self.outputs = [read(atom) for atom in closed.jaxpr.outvars]
        self.steps = [each for each in self.instructions if each.kind in ("sum", "product", "clip")]
        self.number = {step.out: number for number, step in enumerate(self.steps)}

    @property
    def fingerprint(self) -> str:
        """The same for arguments of all shapes for which the function computes the same."""
        text = " ".join([*(step.where for step in self.steps), f"{len(self.inputs)} {len(self.outputs)}"])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def numbers(self) -> int:
        """How many numbers its steps compute."""
        return sum(math.prod(step.shape) for step in self.steps)


def _literal(atom: Any) -> np.ndarray:
    return np.asarray(atom.val, atom.aval.dtype)


def _kind(eqn: Any, ins: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """What an equation is, it, and its operands: a division by known numbers is a product with others."""
    name = eqn.primitive.name
    known = [x for x in ins if not isinstance(x, int)]
    if name == "div" and known and isinstance(ins[0], int):
        name, ins, known = "mul", (ins[0], 1.0 / known[0]), [1.0 / known[0]]
    if name == "mul" and known and power_of_two(known[0]) is not None:
        return "shift", eqn, (next(x for x in ins if isinstance(x, int)), known[0])
    if name in _CLIPS and len(known) == len(ins) - 1:
        return "clip", eqn, ins
    floats = all(jnp.issubdtype(var.aval.dtype, jnp.floating) for var in (*eqn.invars, *eqn.outvars))
    if name in _MOVES and (floats or (name == "select_n" and not isinstance(ins[0], int))):
        return "move", eqn, ins
    if name in _SUMS and floats:
        return "sum", eqn, ins
    if (name in _PRODUCTS or called(eqn) is not None) and floats:
        return "product", eqn, ins
    raise refusal(eqn, "a plan of bits is for sums, products, moves and clips by known numbers")


def power_of_two(known: Any) -> int | None:
    """k where known numbers are all 2^k or all -2^k; None for others."""
    first = float(np.asarray(known).flat[0]) if np.size(known) else 0.0
    if first == 0.0 or not (np.asarray(known) == first).all():
        return None
    mantissa, exponent = math.frexp(abs(first))
    return exponent - 1 if mantissa == 0.5 else None


def exact_bits(known: Any) -> int | None:
    """The fraction bits that hold known numbers as they are, if they are few."""
    scaled = np.asarray(known, np.float64)[..., None] * 2.0 ** np.arange(9)
    whole = (scaled == np.rint(scaled)).reshape(-1, 9).all(0)
    return int(whole.argmax()) if whole.any() else None


# ------------------------------------------------------------------------------------------ written out in products


def _written_out(closed: ClosedJaxpr, *args: Any) -> list[Any]:
    """The outputs of a jaxpr: the functions that it calls in their place, and products in place of some operations."""
    env: dict[Any, Any] = dict(zip(closed.jaxpr.invars, args, strict=True))
    env.update(zip(closed.jaxpr.constvars, closed.consts, strict=True))

    def read(atom: Any) -> Any:
        return _literal(atom) if isinstance(atom, Literal) else env[atom]

    for eqn in closed.jaxpr.eqns:
        ins = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        with jax.named_scope(modules(str(eqn.source_info.name_stack)) or "fn"):
            if (function := called(eqn)) is not None:
                jitted = name in ("pjit", "jit") and all(isinstance(x, Tracer) for x in ins)
                one = jitted and _is_product(function)
                outs = bind(eqn, ins) if one else _written_out(function, *ins)
            elif name == "integer_pow" and eqn.params["y"] > 0:
                outs = [_power(ins[0], eqn.params["y"])]
            elif name == "split":  # what jnp.split is in newer jax
                sizes, axis = eqn.params["sizes"], eqn.params["axis"]
                ends = np.cumsum(sizes).tolist()
                pairs = zip(ends, sizes, strict=True)
                outs = [lax.slice_in_dim(ins[0], end - size, end, axis=axis) for end, size in pairs]
            else:
                outs = [_IN_PRODUCTS[name](*ins)] if name in _IN_PRODUCTS else bind(eqn, ins)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _power(x: Any, exponent: int) -> Any:
    if exponent == 1:
        return x
    half = _power(x, exponent // 2)
    return half * half if exponent % 2 == 0 else half * half * x


_TANH_END = 3.6


@functools.cache
def _tanh_coefficients() -> tuple[float, ...]:
    """tanh(x) / x as a polynomial in y = (x / _TANH_END)^2, of degree 8: x times it is off by the least."""
    from scipy.optimize import linprog

    x = np.linspace(0.0, _TANH_END, 801)[1:]
    terms = np.polynomial.chebyshev.chebvander(2.0 * (x / _TANH_END) ** 2 - 1.0, 8) * x[:, None]
    one = np.ones((len(x), 1))
    found = linprog(
        [*np.zeros(9), 1.0],
        np.block([[terms, -one], [-terms, -one]]),
        np.concatenate([np.tanh(x), -np.tanh(x)]),
        bounds=[(None, None)] * 10,
    )
    series = np.polynomial.Chebyshev(found.x[:-1], domain=[0.0, 1.0])
    return tuple(series.convert(kind=np.polynomial.Polynomial).coef.tolist())


def tanh(x: Any) -> Any:
    """tanh within 0.002, where SPU's own is within 0.005: x, clipped, times a polynomial of its square."""
    c = _tanh_coefficients()
    clipped = lax.clamp(jnp.float32(-_TANH_END), x, jnp.float32(_TANH_END))
    y = (clipped * (1.0 / _TANH_END)) * (clipped * (1.0 / _TANH_END))
    y2 = y * y
    y4 = y2 * y2
    low = (c[0] + c[1] * y) + (c[2] + c[3] * y) * y2
    high = (c[4] + c[5] * y) + (c[6] + c[7] * y) * y2 + c[8] * y4
    return clipped * (low + high * y4)


_IN_PRODUCTS: dict[str, Callable[..., Any]] = {"square": lambda x: x * x, "tanh": tanh}
