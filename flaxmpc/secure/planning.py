"""`secure.plan`: a plan of bits made from data, so that few products are truncated and no rounding costs much.

SPU gives all numbers the same fraction bits, and truncates after every product: more than half of the bytes and rounds
of a Transformer's layer. With a plan every number has bits of its own. A product has those of both operands, and is
truncated only where the plan says. It is made from the largest magnitude of every number, so that none leaves the ring,
and from how far the results move with each one, so that no rounding costs more than the others. Then it is tried.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxmpc.secure.bits import RING, SPARE_BITS, TRUNCATED, BitPlan, PlanError, Step, followed, log2
from flaxmpc.secure.fixed import Fixed
from flaxmpc.secure.instructions import Function, Instruction, exact_bits, power_of_two
from flaxmpc.secure.ring import MOST_DROPPED

_IN_FLOAT32 = 23.0  # bits of an argument
# Numbers of one sign have so many bits at least. An iteration such as Newton's mends small errors of its start, so they
# have no effect, but not large ones.
_RELATIVE = 7.0
_ROUNDED = 0.4  # standard deviation of a rounding, in units of the last bit: on shares 0.41, in the clear 0.29

# What truncations are weighed by: a party's bytes and the rounds, on a line of 100 Mbit/s and 80 ms.
_SECONDS_PER_BYTE, _SECONDS_PER_ROUND = 8 / 100e6, 0.04
_TRUNCATION_BYTES, _TRUNCATION_ROUNDS = 28 / 3, 5 / 3


def plan(fn: Callable[..., Any], batches: Iterable[tuple[Any, ...]], *, error: float = 0.02) -> BitPlan:
    """Plans the bits of a function from data.

    As few products are truncated as the error allows; the dearest are left out first. The plan is tried on some of the
    batches, in the clear, and made again with a smaller error in mind until it keeps to the one that is asked for.

    Args:
        fn: any JAX function of pytrees of floats, made of sums, products, moves, clips and tanh.
        batches: tuples of its arguments. For those of the most numbers the truncations are chosen.
        error: the standard deviation of a result that all roundings together may make, over the batches tried.

    Raises:
        SecureError: an operation that is none of those, by its name.
        PlanError: no plan keeps to the error; or there is no batch, or one of another structure.
    """
    functions: dict[Any, tuple[Function, Callable[[list[Any]], _Seen]]] = {}
    seen: list[_Seen] = []
    tried: list[tuple[Any, ...]] = []
    for batch in batches:
        if len(tried) < _TRIED:
            tried.append(tuple(batch))
        leaves = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(batch)]
        key = tuple(leaf.shape for leaf in leaves)
        if key not in functions:
            function = Function(fn, batch)
            functions[key] = function, _looking(function)
        seen.append(functions[key][1](leaves))
    if not seen:
        raise PlanError("there is no batch to plan the bits from")
    every = [function for function, _ in functions.values()]
    largest = max(every, key=lambda function: function.numbers)
    if any(function.fingerprint != largest.fingerprint for function in every):
        raise PlanError("for arguments of other shapes the function computes otherwise: it has no plan for all")
    together, aim, found = _Seen.largest(seen), error, math.inf
    for _ in range(_AGAIN):
        made = _fewest(largest, together, aim)
        found = _measured(fn, made, tried)
        if found <= error:
            return dataclasses.replace(made, error=found)
        aim *= min(0.5, error / found)
    raise PlanError(f"no plan of bits has an error of {error:g}: the last one's is {found:.2g}")


_TRIED, _AGAIN = 8, 6


def _measured(fn: Callable[..., Any], made: BitPlan, batches: Sequence[tuple[Any, ...]]) -> float:
    """The standard deviation of what a plan does to a result, in the clear; inf where a result is not finite."""
    fixed, plain = Fixed(fn, made), jax.jit(fn)
    squares = []
    for batch in batches:
        pairs = zip(jax.tree.leaves(fixed.clear(*batch)), jax.tree.leaves(plain(*batch)), strict=True)
        squares += [np.square(np.asarray(ours, np.float64) - theirs).ravel() for ours, theirs in pairs]
    found = float(np.sqrt(np.concatenate(squares).mean()))
    return found if math.isfinite(found) else math.inf


# ------------------------------------------------------------------------------------------------ what data says

# What is rounded: an argument's leaf ("input"), a step's result ("step"), or known numbers in a step ("known"). What a
# clip compares ("clip") only has a size.
_Site = tuple[str, int]
_DIRECTIONS = 4


class _Seen(NamedTuple):
    """What data says.

    Attributes:
        sizes: log2 of the largest magnitude at each site.
        smallest: log2 of the smallest, where all numbers have one sign, or of a thousandth of the largest; else inf.
        outputs: the same of the results.
        effects: the mean square of what moves in a result, if every number at the site moves by one, at random.
    """

    sizes: dict[_Site, float]
    smallest: dict[_Site, float]
    outputs: list[float]
    effects: dict[_Site, float]

    @classmethod
    def largest(cls, every: Sequence[_Seen]) -> _Seen:
        first = every[0]
        return cls(
            {site: max(each.sizes[site] for each in every) for site in first.sizes},
            {site: min(each.smallest[site] for each in every) for site in first.smallest},
            [max(sizes) for sizes in zip(*(each.outputs for each in every), strict=True)],
            {site: max(each.effects[site] for each in every) for site in first.effects},
        )


def _rounds_known(step: Instruction) -> bool:
    """Whether a step has known numbers that are rounded."""
    return step.known is not None and step.kind != "clip" and exact_bits(step.known) is None


def _looking(function: Function) -> Callable[[list[Any]], _Seen]:
    """Compiles what looks at the numbers of one batch."""

    def run(inputs: list[Any], moved: Mapping[_Site, Any]) -> tuple[list[Any], dict[_Site, Any]]:
        """The results, where the sites are moved, and the values at the sites."""
        values: dict[_Site, Any] = {}

        def met(kind: str, number: int, value: Any) -> Any:
            values[kind, number] = value
            return value + moved[kind, number] if (kind, number) in moved else value

        found = {place: met("input", place, x) for place, x in enumerate(inputs)}
        for each in function.instructions:
            number = function.number.get(each.out)
            ins = [found[x] if isinstance(x, int) else jnp.asarray(x) for x in each.ins]
            if number is not None and _rounds_known(each):
                place = next(i for i, x in enumerate(each.ins) if not isinstance(x, int))
                ins[place] = met("known", number, ins[place])
            elif number is not None and each.kind == "clip":
                widest = functools.reduce(jnp.maximum, [jnp.abs(x).max(initial=0.0) for x in ins])
                values["clip", number] = 2.0 * widest  # of the differences that are compared
            out = each.apply(ins)
            found[each.out] = out if number is None else met("step", number, out)
        return [found[x] if isinstance(x, int) else jnp.asarray(x, jnp.float32) for x in function.outputs], values

    def look(inputs: list[Any], key: Any) -> Any:
        outputs, values = run(inputs, {})
        sizes = {site: jnp.abs(value).max(initial=0.0) for site, value in values.items()}
        smallest = {site: _smallest(value) for site, value in values.items()}
        zeros = {site: jnp.zeros_like(value) for site, value in values.items() if site[0] != "clip"}
        _, back = jax.vjp(lambda moved: run(inputs, moved)[0], zeros)

        def add(total: dict[_Site, Any], one: Any) -> tuple[dict[_Site, Any], None]:
            keys = jax.random.split(one, len(outputs))
            signs = [jax.random.rademacher(k, out.shape, out.dtype) for k, out in zip(keys, outputs, strict=True)]
            (slopes,) = back(signs)
            return {site: total[site] + jnp.square(slopes[site]).sum() for site in total}, None

        none = {site: jnp.zeros(()) for site in zeros}
        total, _ = jax.lax.scan(add, none, jax.random.split(key, _DIRECTIONS))
        count = _DIRECTIONS * sum(out.size for out in outputs)
        effects = {site: effect / count for site, effect in total.items()}
        return sizes, smallest, [jnp.abs(out).max(initial=0.0) for out in outputs], effects

    structs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in function.inputs]
    key = jax.random.key(0)
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}  # compiling takes longer than running
    compiled = jax.jit(look).lower(structs, key).compile(options)

    def seen(inputs: list[Any]) -> _Seen:
        sizes, smallest, outputs, effects = jax.device_get(compiled(inputs, key))
        if not np.isfinite([*sizes.values(), *outputs, *effects.values()]).all():
            raise PlanError("a number of the function is not finite on a batch")
        floats = {site: float(effect) for site, effect in effects.items()}
        small = {site: math.inf if math.isinf(size) else log2(size) for site, size in smallest.items()}
        large = {site: log2(size) for site, size in sizes.items()}
        return _Seen(large, small, [log2(size) for size in outputs], floats)

    return seen


def _smallest(value: Any) -> Any:
    """See `_Seen`."""
    low, high = value.min(initial=jnp.inf), value.max(initial=-jnp.inf)
    size = jnp.abs(value)
    one_sign = (low > 0) | (high < 0)
    return jnp.where(one_sign, jnp.maximum(size.min(initial=jnp.inf), size.max(initial=0.0) / 1024), jnp.inf)


# ------------------------------------------------------------------------------------------------------- the bits


class _Bits(NamedTuple):
    """Fraction bits: a sum of variables, by their numbers, and a constant."""

    terms: Mapping[int, float]
    constant: float = 0.0

    def plus(self, other: _Bits, sign: float = 1.0) -> _Bits:
        terms = collections.defaultdict(float, self.terms)
        for variable, factor in other.terms.items():
            terms[variable] += sign * factor
        return _Bits(dict(terms), self.constant + sign * other.constant)

    def value(self, solved: Sequence[float]) -> int:
        return round(self.constant + sum(factor * solved[variable] for variable, factor in self.terms.items()))


class _Program:
    """The linear program whose variables are bits: the largest effect of a rounding is to be small.

    Only what is truncated, compared or opened must fit into the ring: until then sums and products wrap, and are right.
    """

    def __init__(self, function: Function, seen: _Seen, truncated: frozenset[int]):
        self._function, self._seen, self._truncated = function, seen, truncated
        self._rows: list[tuple[Mapping[int, float], float]] = []  # a sum of factors x variables, and its bound
        self._bounds: list[tuple[float, float]] = [(-200.0, 60.0)]  # variable 0 is log2 of the effect
        self.sites: dict[_Site, _Bits] = {}
        bits: dict[int, _Bits] = {}
        for place in range(len(function.inputs)):
            bits[place] = self._new(("input", place), _IN_FLOAT32 - seen.sizes["input", place])
        for each in function.instructions:
            bits[each.out] = self._result(each, [bits[x] for x in each.ins if isinstance(x, int)])
        for place, size in zip(function.outputs, seen.outputs, strict=True):
            if isinstance(place, int):
                self._at_most(bits[place], RING - SPARE_BITS - size)
        for site, rounded in self.sites.items():
            added = site[0] == "known" and function.steps[site[1]].kind == "sum"  # small beside what it is added to
            if seen.smallest[site] < math.inf and not added:
                self._at_most(_Bits({}, _RELATIVE - seen.smallest[site]).plus(rounded, -1.0), 0.0)
            if seen.effects[site] > 0:
                log = 0.5 * math.log2(seen.effects[site])
                self._at_most(_Bits({0: -1.0}, log).plus(rounded, -1.0), 0.0)

    def _new(self, site: _Site | None = None, most: float = RING) -> _Bits:
        self._bounds.append((-30.0, most))
        made = _Bits({len(self._bounds) - 1: 1.0})
        if site is not None:
            self.sites[site] = made
        return made

    def _at_most(self, bits: _Bits, bound: float) -> None:
        self._rows.append((bits.terms, bound - bits.constant))

    def _result(self, each: Instruction, own: list[_Bits]) -> _Bits:
        if each.kind == "shift":
            power = power_of_two(each.known)
            assert power is not None, "that is what a shift is"
            return own[0].plus(_Bits({}, -power))
        number = self._function.number.get(each.out, -1)
        if each.kind == "product":
            return self._product(each, number, own)
        together = own[0]
        if any(bits != together for bits in own):
            together = self._new()
            for bits in own:
                self._at_most(bits.plus(together, -1.0), 0.0)
        if each.kind == "clip":
            self._at_most(together, RING - SPARE_BITS - self._seen.sizes["clip", number])
        if each.kind == "sum" and _rounds_known(each):
            self.sites["known", number] = together
        return together

    def _product(self, each: Instruction, number: int, own: list[_Bits]) -> _Bits:
        if each.known is None:
            raw = own[0].plus(own[1])
        else:
            exact = exact_bits(each.known)
            raw = own[0].plus(self._new(("known", number)) if exact is None else _Bits({}, exact))
        if number not in self._truncated:
            return raw
        room = SPARE_BITS + self._seen.sizes["step", number]
        kept = self._new(("step", number), TRUNCATED - room)
        self._at_most(raw, RING - room)
        self._at_most(raw.plus(kept, -1.0), MOST_DROPPED)
        self._at_most(kept.plus(raw, -1.0), 0.0)
        return kept

    def solved(self) -> tuple[dict[_Site, int], float] | None:
        """Whole bits of what is rounded, and the error that they make; None if there are none."""
        import scipy.optimize
        import scipy.sparse

        data = [(f, i, variable) for i, (terms, _) in enumerate(self._rows) for variable, f in terms.items()]
        factors, rows, variables = zip(*data, strict=True)
        matrix = scipy.sparse.csr_matrix((factors, (rows, variables)), (len(self._rows), len(self._bounds)))
        cost = np.full(len(self._bounds), -1e-4)  # beside the largest effect, the others are to be small
        cost[0] = 1.0
        bounds = [bound for _, bound in self._rows]
        if any(low > high for low, high in self._bounds):
            return None
        found = scipy.optimize.linprog(cost, matrix, bounds, bounds=self._bounds)
        if not found.success:
            return None
        whole = np.floor(found.x + 1e-6)
        bits = {site: rounded.value(whole) for site, rounded in self.sites.items()}
        return bits, _ROUNDED * math.sqrt(sum(self._seen.effects[site] * 4.0**-b for site, b in bits.items()))


def _fewest(function: Function, seen: _Seen, error: float) -> BitPlan:
    """Leaves out truncations, those of one role in all layers together, the dearest first."""
    roles: dict[tuple[str, int], list[int]] = {}
    counts: collections.Counter[str] = collections.Counter()
    seconds: collections.Counter[tuple[str, int]] = collections.Counter()
    for number, step in enumerate(function.steps):
        if step.kind == "product":
            role = re.sub(r"\d+", "", step.where), counts[step.where]
            counts[step.where] += 1
            roles.setdefault(role, []).append(number)
            sent = math.prod(step.shape) * _TRUNCATION_BYTES * _SECONDS_PER_BYTE
            seconds[role] += sent + _TRUNCATION_ROUNDS * _SECONDS_PER_ROUND  # pyright: ignore[reportArgumentType]
    truncated = frozenset(number for numbers in roles.values() for number in numbers)
    best = _Program(function, seen, truncated).solved()
    if best is None or best[1] > error:
        reached = "" if best is None else f": {best[1]:.2g} is the smallest"
        raise PlanError(f"the numbers are too large for a plan of bits with an error of {error:g}{reached}")
    for role, _ in seconds.most_common():
        fewer = truncated.difference(roles[role])
        other = _Program(function, seen, fewer).solved()
        if other is not None and other[1] <= error:
            truncated, best = fewer, other
    return _made(function, seen, *best)


def _made(function: Function, seen: _Seen, bits: Mapping[_Site, int], error: float) -> BitPlan:
    inputs = tuple(bits["input", place] for place in range(len(function.inputs)))
    kept = [bits.get(("step", number)) for number in range(len(function.steps))]
    known = [bits.get(("known", n)) if step.kind == "product" else None for n, step in enumerate(function.steps)]
    raw, outputs = followed(function, inputs, kept, known)
    return BitPlan(
        function.fingerprint,
        inputs,
        tuple(2.0 ** seen.sizes["input", place] for place in range(len(inputs))),
        tuple(
            Step(step.where, math.prod(step.shape), 2.0 ** seen.sizes["step", n], raw[step.out], kept[n], known[n])
            for n, step in enumerate(function.steps)
        ),
        outputs,
        error,
    )
