"""`hoist`: what a function computes of its parameters alone is computed once, by who has them, and not on shares.

JAX's partial evaluation could be told to do most of this, but newer versions do not have it in public
(`partial_eval_jaxpr_custom`), it takes constants for parameters' values, and it computes in the types of the trace.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Literal

from flaxmpc.errors import listed
from flaxmpc.secure.arithmetic import enable_x64  # pyright: ignore[reportAttributeAccessIssue]
from flaxmpc.secure.jaxpr import bind, called

# They repeat or move numbers, which costs nothing on shares. They stay in the function, so that what is repeated for
# every token, or cut to a text's length, is the same weight for every length.
_MOVES = frozenset(["broadcast_in_dim", "copy", "expand_dims", "reshape", "rev", "slice", "squeeze", "transpose"])


def hoist(fn: Callable[..., Any], params: Any, *inputs: Any, dtype: Any = None) -> tuple[Hoisted, dict[str, Any]]:
    """Splits a function where its inputs come in: `g(weights, *inputs)` is `fn(params, *inputs)`.

    The owner of the parameters computes the weights, which are what `fn` makes of parameters alone; `g` does the rest,
    on shares say. What only repeats or moves a parameter is left to `g`. So are functions with loops and branches that
    look at inputs, whole.

        g, weights = secure.hoist(model, params, x)
        secure.jit(g)(weights, x)

    Args:
        fn: any JAX function of pytrees.
        params: its first argument; with jax.ShapeDtypeStruct leaves the weights are such, too.
        *inputs: its other arguments, arrays or jax.ShapeDtypeStruct: only shapes and types are looked at.
        dtype: the type of floating-point numbers while the weights are computed, such as "float64"; by default their
            own, which the weights have in any case.

    Returns:
        `g`, which takes inputs of other shapes too; and the weights, numpy arrays by where they come from: the path of
        a parameter, or the module and the operation that made them.
    """
    structs = jax.tree.map(_struct, params)
    hoisted = Hoisted(fn, structs, jax.tree.map(_struct, inputs))
    leaves = jax.tree.leaves(params)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return hoisted, hoisted.structs
    return hoisted, dict(zip(hoisted.structs, hoisted.first.compute(leaves, dtype), strict=True))


class Hoisted:
    """What `hoist` leaves of a function: (weights, *inputs) -> its output, for inputs of any shapes.

    Attributes:
        structs: the weights' shapes and types, jax.ShapeDtypeStruct each.
    """

    def __init__(self, fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]):
        self._fn = fn
        self._params = params
        self._traces: dict[Any, _Trace] = {}
        self._lock = threading.Lock()
        self.first = self._trace(inputs)
        self.structs: dict[str, Any] = {}
        for place in self.first.weights.values():
            label, count = self.first.labels[place], 1
            while label in self.structs:
                count += 1
                label = f"{self.first.labels[place]}.{count}"
            self.structs[label] = _struct(self.first.values[place].aval)

    def _trace(self, inputs: tuple[Any, ...]) -> _Trace:
        leaves, treedef = jax.tree.flatten(inputs)
        key = (treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        with self._lock:
            if key not in self._traces:
                self._traces[key] = _Trace(self._fn, self._params, inputs)
            return self._traces[key]

    def __call__(self, weights: Mapping[str, Any], *inputs: Any) -> Any:
        """The function's output.

        Raises:
            ValueError: weights of another function, or for inputs of these shapes it makes others of its parameters.
            TypeError: weights that are not by name.
        """
        if not isinstance(weights, Mapping):
            raise TypeError(f"the weights are a dict by name, as `hoist` gives them, not a {type(weights).__name__}")
        if weights.keys() != self.structs.keys():
            strange = sorted(weights.keys() ^ self.structs.keys())
            raise ValueError(f"these are weights of another function: {listed(strange)}")
        trace = self._trace(jax.tree.map(_struct, inputs))
        by_name = {name: weights[label] for name, label in zip(self.first.weights, self.structs, strict=True)}
        if trace.weights.keys() - by_name.keys():
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in jax.tree.leaves(inputs))
            raise ValueError(f"for inputs of the shapes {shapes} the function makes other weights of its parameters")
        return trace.run(by_name, jax.tree.leaves(inputs))


class _Value(NamedTuple):
    """A value in a trace.

    Attributes:
        depends: 0: on nothing; 1: on parameters alone; 2: on inputs.
        aval: its shape and dtype.
        name: what is computed: the same in every trace that computes the same of the parameters; None for 2.
        moved: whether an equation in `_MOVES` made it.
        own: the constant itself, or the place among the parameters or inputs; None for what an equation makes.
    """

    depends: int
    aval: Any
    name: str | None
    moved: bool = False
    own: Any = None


class _Step(NamedTuple):
    """An equation, the places of the values that it reads and makes, and the names of the modules that it is in."""

    eqn: Any
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    names: Any

    def bind(self, values: Sequence[Any], params: Mapping[str, Any]) -> list[Any]:
        """The results; what is traced keeps its modules and the user's line."""
        names = source_info_util.current_name_stack() + self.names
        with source_info_util.user_context(self.eqn.source_info.traceback, name_stack=names):
            return bind(self.eqn, values, params)


class _Trace:
    """A function's values and equations, those of the functions that it calls on parameters in their place.

    Attributes:
        values: all, by their place.
        weights: the names of those that the parameters' owner computes, and a place where each is made.
        labels: words for a reader: the paths of parameters by their places, and what made a value of them.
    """

    def __init__(self, fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]):
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(params, *inputs)
        self._tree = jax.tree.structure(shape)
        self.values: list[_Value] = []
        self.labels = dict(enumerate(map(_path, jax.tree_util.tree_leaves_with_path(params))))
        self._steps: list[_Step] = []
        count = len(jax.tree.leaves(params))
        avals = [var.aval for var in closed.jaxpr.invars]
        places = [self._add(_Value(1, aval, f"parameter {i}", own=i)) for i, aval in enumerate(avals[:count])]
        places += [self._add(_Value(2, aval, None, own=i)) for i, aval in enumerate(avals[count:])]
        self._outs = self._inlined(closed, places, source_info_util.new_name_stack())
        self._left, read = self._needed(self._outs, lambda value: value.depends != 1 or value.moved)
        self._read_weights = sorted(p for p in read if self.values[p].depends == 1 and not self.values[p].moved)
        self.weights: dict[str | None, int] = {}
        for place in self._read_weights:
            self.weights.setdefault(self.values[place].name, place)

    def _add(self, value: _Value) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def _constant(self, value: Any, aval: Any) -> int:
        data = jax.random.key_data(value) if jnp.issubdtype(aval.dtype, jax.dtypes.extended) else value
        digest = hashlib.sha256(np.asarray(data).tobytes()).hexdigest()
        return self._add(_Value(0, aval, f"{aval} {digest}", own=value))

    def _inlined(self, closed: ClosedJaxpr, args: Sequence[int], names: Any) -> list[int]:
        """Adds the equations of a function, in modules of these names, to the steps; the places of its results."""
        places: dict[Any, int] = dict(zip(closed.jaxpr.invars, args, strict=True))
        for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            places[var] = self._constant(value, var.aval)

        def place(atom: Any) -> int:
            return self._constant(atom.val, atom.aval) if isinstance(atom, Literal) else places[atom]

        for eqn in closed.jaxpr.eqns:
            ins = tuple(map(place, eqn.invars))
            within = names + eqn.source_info.name_stack
            of_inputs = ins and all(self.values[place].depends == 2 for place in ins)  # so nothing in it is the owner's
            function = None if of_inputs else called(eqn)
            outs = self._equation(eqn, ins, within) if function is None else self._inlined(function, ins, within)
            places.update(zip(eqn.outvars, outs, strict=True))
        return [place(atom) for atom in closed.jaxpr.outvars]

    def _equation(self, eqn: Any, ins: tuple[int, ...], names: Any) -> tuple[int, ...]:
        depends = 2 if eqn.effects else max((self.values[place].depends for place in ins), default=0)
        text = ""
        if depends < 2:
            text = f"{eqn.primitive.name} {_described(eqn.params)} {[self.values[place].name for place in ins]}"
            text = hashlib.sha256(text.encode()).hexdigest()
        moved = eqn.primitive.name in _MOVES
        outs = tuple(
            self._add(_Value(depends, var.aval, f"{text} {i}" if depends < 2 else None, moved))
            for i, var in enumerate(eqn.outvars)
        )
        if depends == 1:
            self.labels |= dict.fromkeys(outs, "/".join(part for part in (str(names), eqn.primitive.name) if part))
        self._steps.append(_Step(eqn, ins, outs, names))
        return outs

    def _needed(self, wanted: Iterable[int], through: Callable[[_Value], bool]) -> tuple[list[_Step], set[int]]:
        """The steps that make the wanted values, in order, and all values read.

        Args:
            through: whether a value is made, by its step, or taken as it is.
        """
        read, steps = set(wanted), []
        for step in reversed(self._steps):
            if any(place in read and through(self.values[place]) for place in step.outs):
                steps.append(step)
                read.update(step.ins)
        return steps[::-1], read

    def run(self, weights: Mapping[str | None, Any], inputs: Sequence[Any]) -> Any:
        """The function's output, computed or traced, from weights by their names."""
        found = {place: weights[self.values[place].name] for place in self._read_weights}
        return jax.tree.unflatten(self._tree, self._evaluated(self._left, self._outs, found, {2: inputs}))

    def compute(self, params: Sequence[Any], dtype: Any) -> list[np.ndarray]:
        """The weights of parameters, the leaves of the pytree; in between in floating point of another type."""
        wanted = list(self.weights.values())
        steps, _ = self._needed(wanted, lambda value: True)
        given = {1: [np.asarray(leaf) for leaf in params]}
        wide = dtype is not None and np.dtype(dtype).itemsize == 8
        with enable_x64(True) if wide else contextlib.nullcontext():
            made = self._evaluated(steps, wanted, {}, given, dtype)
            return [np.asarray(value, self.values[place].aval.dtype) for place, value in zip(wanted, made, strict=True)]

    def _evaluated(
        self,
        steps: Sequence[_Step],
        wanted: Sequence[int],
        found: dict[int, Any],
        given: Mapping[int, Sequence[Any]],
        dtype: Any = None,
    ) -> list[Any]:
        """The wanted values.

        Args:
            found: values by their places, if they are known; what is computed is added, and dropped after its last use.
            given: parameters or inputs, by what depends on them.
            dtype: the type of floating-point numbers; None: their own.
        """

        def value(place: int) -> Any:
            if place not in found:
                depends, aval, *_, own = self.values[place]
                x = _typed(own, aval) if depends == 0 else given[depends][own]
                found[place] = (
                    x if dtype is None or not jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x, dtype)
                )
            return found[place]

        last = {place: i for i, step in enumerate(steps) for place in step.ins}
        kept = set(wanted)
        for i, step in enumerate(steps):
            params = step.eqn.params
            if dtype is not None:
                params = {name: dtype if _is_float(own) else own for name, own in params.items()}
            made = step.bind([value(place) for place in step.ins], params)
            found.update(zip(step.outs, made, strict=True))
            for place in {*step.ins, *step.outs}:
                if place not in kept and last.get(place, -1) <= i:
                    del found[place]
        return [value(place) for place in wanted]


def _described(value: Any) -> str:
    """All of a parameter of an equation: text leaves out the middle of an array, and the constants of a function."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_described(own)}" for name, own in value.items())
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_described, value))})"
    if isinstance(value, ClosedJaxpr):
        return f"{value.jaxpr} {_described(value.consts)}"
    if isinstance(value, (np.ndarray, jax.Array)):
        return f"{value.dtype}{value.shape} {hashlib.sha256(np.asarray(value).tobytes()).hexdigest()}"
    return str(value)


def _path(item: tuple[Any, Any]) -> str:
    """A leaf's path in its pytree, "bert/pooler/kernel" say."""
    return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in item[0])


def _typed(value: Any, aval: Any) -> Any:
    """A constant with the type that it has in the trace: a literal is a number of Python's, an array may be wider."""
    return value if jnp.issubdtype(aval.dtype, jax.dtypes.extended) else np.asarray(value, aval.dtype)


def _is_float(value: Any) -> bool:
    return isinstance(value, np.dtype) and jnp.issubdtype(value, jnp.floating)


def _struct(x: Any) -> jax.ShapeDtypeStruct:
    x = x if hasattr(x, "dtype") else np.asarray(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
