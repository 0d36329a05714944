"""What data says of a function's numbers: how large each is, and how far the results move with it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxmpc.secure.bits import PlanError, log2
from flaxmpc.secure.instructions import Function, Instruction, exact_bits

Site = tuple[str, int]
"""What is rounded: an argument's leaf ("input"), a step's result ("step"), or known numbers in a step ("known"). What a
clip compares ("clip") only has a size."""

_DIRECTIONS = 4
_TRIED = 8
_RANGE = 10.0  # log2 of the largest magnitude over the smallest that counts


class Observed(NamedTuple):
    """What batches of arguments say.

    Attributes:
        function: the function for those batches for which it computes the most numbers.
        sizes: log2 of the largest magnitude at each site.
        smallest: log2 of the smallest where all numbers have one sign, at least the largest's less `_RANGE`; else inf.
        outputs: log2 of the largest magnitude of each result.
        effects: the mean square of what moves in the result that moves most, if every number at the site moves by one,
            at random.
        batches: some of them, to try a plan on.
    """

    function: Function
    sizes: dict[Site, float]
    smallest: dict[Site, float]
    outputs: list[float]
    effects: dict[Site, float]
    batches: list[tuple[Any, ...]]

    @classmethod
    def of(cls, fn: Callable[..., Any], batches: Iterable[tuple[Any, ...]]) -> Observed:
        """Computes the function in the clear for every batch; what moves, for some of those of the most numbers.

        Raises:
            SecureError: the function has an operation that no plan is for.
            PlanError: there is no batch, a number is not finite, or the function computes otherwise for some batches.
        """
        functions: dict[Any, Function] = {}
        largest: Function | None = None
        first: list[tuple[Any, ...]] = []
        longest: list[tuple[Any, ...]] = []
        extents: list[tuple[dict[Site, float], dict[Site, float], list[float]]] = []
        for batch in batches:
            key = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(batch))
            if key not in functions:
                functions[key] = Function(fn, batch)
            extents.append(_extents(functions[key], batch))
            if largest is None or functions[key].numbers > largest.numbers:
                largest, longest = functions[key], []
            if functions[key] is largest and len(longest) < _TRIED:
                longest.append(batch)
            if len(first) < _TRIED:
                first.append(batch)
        if largest is None:
            raise PlanError("there is no batch to plan the bits from")
        if any(function.fingerprint != largest.fingerprint for function in functions.values()):
            raise PlanError("for arguments of other shapes the function computes otherwise: it has no plan for all")
        large, small, outputs = zip(*extents, strict=True)
        sizes = {site: max(each[site] for each in large) for site in large[0]}
        return cls(
            largest,
            sizes,
            {site: max(sizes[site] - _RANGE, min(each[site] for each in small)) for site in sizes},
            [max(each) for each in zip(*outputs, strict=True)],
            _effects(largest, longest),
            first,
        )


def rounds_known(step: Instruction) -> bool:
    """Whether a step has known numbers that are rounded."""
    return step.known is not None and step.kind != "clip" and exact_bits(step.known) is None


def _leaves(batch: tuple[Any, ...]) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(batch)]


def _run(function: Function, inputs: list[Any], at: Callable[[Site, Any], Any]) -> list[Any]:
    """The results; `at` is given every site and its value, and returns what it is to be."""
    found = {place: at(("input", place), x) for place, x in enumerate(inputs)}
    for each in function.instructions:
        number = function.number.get(each.out)
        ins = [found[x] if isinstance(x, int) else jnp.asarray(x) for x in each.ins]
        if number is not None and rounds_known(each):
            place = next(i for i, x in enumerate(each.ins) if not isinstance(x, int))
            ins[place] = at(("known", number), ins[place])
        elif number is not None and each.kind == "clip":
            widest = functools.reduce(jnp.maximum, [jnp.abs(x).max(initial=0.0) for x in ins])
            at(("clip", number), 2.0 * widest)  # of the differences that are compared
        out = each.apply(ins)
        found[each.out] = out if number is None else at(("step", number), out)
    return [found[x] if isinstance(x, int) else jnp.asarray(x, jnp.float32) for x in function.outputs]


@jax.jit
def _extent(value: Any) -> tuple[Any, Any]:
    """The largest magnitude, and the smallest as `Observed` has it."""
    size = jnp.abs(value)
    largest = size.max(initial=0.0)
    one_sign = (value.min(initial=jnp.inf) > 0) | (value.max(initial=-jnp.inf) < 0)
    return largest, jnp.where(one_sign, size.min(initial=jnp.inf), jnp.inf)


def _extents(function: Function, batch: tuple[Any, ...]) -> tuple[dict[Site, float], dict[Site, float], list[float]]:
    """Sizes, smallest and outputs of one batch, see `Observed`. Operation by operation: none is compiled twice."""
    found: dict[Site, tuple[Any, Any]] = {}

    def at(site: Site, value: Any) -> Any:
        found[site] = _extent(value)
        return value

    outputs = [_extent(out)[0] for out in _run(function, _leaves(batch), at)]
    found, outputs = jax.device_get((found, outputs))
    if not np.isfinite([*outputs, *(size for size, _ in found.values())]).all():
        raise PlanError("a number of the function is not finite on a batch")
    small = {site: math.inf if math.isinf(size) else log2(float(size)) for site, (_, size) in found.items()}
    large = {site: log2(float(size)) for site, (size, _) in found.items()}
    return large, small, [log2(float(size)) for size in outputs]


def _effects(function: Function, batches: list[tuple[Any, ...]]) -> dict[Site, float]:
    """See `Observed`; of batches of one shape."""

    def moved(inputs: list[Any], moves: Mapping[Site, Any]) -> list[Any]:
        return _run(function, inputs, lambda site, value: value + moves[site] if site in moves else value)

    def look(inputs: list[Any], key: Any) -> dict[Site, Any]:
        zeros: dict[Site, Any] = {}

        def at(site: Site, value: Any) -> Any:
            if site[0] != "clip":
                zeros[site] = jnp.zeros_like(value)
            return value

        outputs = _run(function, inputs, at)
        _, back = jax.vjp(functools.partial(moved, inputs), zeros)

        def look_at(result: int) -> dict[Site, Any]:
            """Of one result's numbers."""

            def add(total: dict[Site, Any], one: Any) -> tuple[dict[Site, Any], None]:
                signs = [jnp.zeros_like(out) for out in outputs]
                signs[result] = jax.random.rademacher(one, outputs[result].shape, outputs[result].dtype)
                (slopes,) = back(signs)
                return {site: total[site] + jnp.square(slopes[site]).sum() for site in total}, None

            none = {site: jnp.zeros(()) for site in zeros}
            total, _ = jax.lax.scan(add, none, jax.random.split(jax.random.fold_in(key, result), _DIRECTIONS))
            return {site: effect / (_DIRECTIONS * outputs[result].size) for site, effect in total.items()}

        effects = map(look_at, range(len(outputs)))
        return functools.reduce(functools.partial(jax.tree.map, jnp.maximum), effects)

    structs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in function.inputs]
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}  # compiling takes longer than running
    compiled = jax.jit(look).lower(structs, jax.random.key(0)).compile(options)
    found = [jax.device_get(compiled(_leaves(batch), jax.random.key(n))) for n, batch in enumerate(batches)]
    effects = {site: max(float(each[site]) for each in found) for site in found[0]}
    if not np.isfinite(list(effects.values())).all():
        raise PlanError("a slope of the function is not finite on a batch")
    return effects
