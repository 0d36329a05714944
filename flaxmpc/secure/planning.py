"""`secure.plan`: a plan of bits made from data, so that few products are truncated and no rounding costs much.

SPU gives all numbers the same fraction bits, and truncates after every product: more than half of the bytes and rounds
of a Transformer's layer. With a plan every number has bits of its own. A product has those of both operands, and is
truncated only where the plan says. It is made from the largest magnitude of every number, so that none leaves the ring,
and from how far the results move with each one, so that no rounding costs more than the others. Then it is tried.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxmpc.secure.bits import RING, SPARE_BITS, TRUNCATED, BitPlan, PlanError, Step, carried, followed
from flaxmpc.secure.fixed import Fixed
from flaxmpc.secure.instructions import Instruction, exact_bits
from flaxmpc.secure.observed import Observed, Site, rounds_known
from flaxmpc.secure.ring import MOST_DROPPED
from flaxmpc.secure.solver import Within, solve

_IN_FLOAT32 = 23.0  # bits of an argument
# Numbers of one sign have so many bits at least. An iteration such as Newton's mends small errors of its start, so they
# have no effect, but not large ones.
_RELATIVE = 7.0
_LARGEST = 4.0  # and so many the largest of all numbers: else a rounding is no small one, whatever its effect seems
_RESULT_ROOM = 20.0  # bits that results have beside those seen: then what tells that one is wrong is told
_ROUNDED = 0.4  # standard deviation of a rounding, in units of the last bit: on shares 0.41, in the clear 0.29

# What truncations are weighed by: a party's bytes and the rounds, on a line of 100 Mbit/s and 80 ms.
_SECONDS_PER_BYTE, _SECONDS_PER_ROUND = 8 / 100e6, 0.04
_TRUNCATION_BYTES, _TRUNCATION_ROUNDS = 28 / 3, 5 / 3


def plan(
    fn: Callable[..., Any],
    batches: Iterable[tuple[Any, ...]],
    *,
    error: float = 0.02,
    progress: Callable[[str], object] = lambda _: None,
) -> BitPlan:
    """Plans the bits of a function from data.

    As few products are truncated as the error allows; the dearest are left out first. The plan is tried on some of the
    batches, in the clear, and made again with another error in mind until it comes near the one that is asked for.

    Args:
        fn: any JAX function of pytrees of floats, made of sums, products, moves, clips and tanh.
        batches: tuples of its arguments. For those of the most numbers the truncations are chosen.
        error: the standard deviation of a result that all roundings together may make, over the batches tried.
        progress: is told every plan that was tried; such as `print`.

    Raises:
        SecureError: an operation that is none of those, by its name.
        PlanError: no plan keeps to the error; or there is no batch, or one of another structure.
        ValueError: an error that is not positive and finite.
    """
    if not 0 < error < math.inf:
        raise ValueError(f"the error of a plan must be positive and finite, not {error:g}")
    seen = Observed.of(fn, map(tuple, batches))
    program = _Program(seen)
    aim, found, best = error, math.inf, None
    for number in range(_TRIES):
        truncated = program.cheapest(aim / (_ROUNDED * math.sqrt(len(program.sites))))
        if truncated is None:
            break
        made = _made(seen, *program.bits(truncated))
        found = _measured(fn, made, seen.batches)
        made = dataclasses.replace(made, error=found)
        progress(f"plan {number + 1} of up to {_TRIES}: {made}")
        if found <= error and (best is None or made.truncations < best.truncations):
            best = made
        if _NEAR * error <= found <= error:
            break
        aim *= min(max(_AIMED * error / found if found else math.inf, 0.3), 2.0)
    if best is None:
        reached = "" if math.isinf(found) else f": the last one's is {found:.2g}"
        raise PlanError(f"the numbers are too large for a plan of bits with an error of {error:g}{reached}")
    return best


# How often a plan is tried; the part of the error that is near enough to it, and that is aimed for.
_TRIES, _NEAR, _AIMED = 6, 0.7, 0.9
_GAP, _SOLVING = 0.05, 20.0  # how far the choice of truncations may be from the best one; after how many seconds more


def _measured(fn: Callable[..., Any], made: BitPlan, batches: Sequence[tuple[Any, ...]]) -> float:
    """The standard deviation of what a plan does to the worst result, in the clear; inf where one is not finite."""
    fixed, plain = Fixed(fn, made), jax.jit(fn)
    squares = collections.defaultdict(list)
    for number, batch in enumerate(batches):
        pairs = zip(jax.tree.leaves(fixed.clear(*batch, seed=number)), jax.tree.leaves(plain(*batch)), strict=True)
        for result, (ours, theirs) in enumerate(pairs):
            squares[result].append(np.square(np.asarray(ours, np.float64) - theirs).ravel())
    found = max(float(np.sqrt(np.concatenate(each).mean())) for each in squares.values())
    return found if math.isfinite(found) else math.inf


# ------------------------------------------------------------------------------------------------------- the bits


class _Bits(NamedTuple):
    """Fraction bits: a sum of variables, by their numbers, and a constant."""

    terms: Mapping[int, float]
    constant: float = 0.0

    def plus(self, other: _Bits, factor: float = 1.0) -> _Bits:
        terms = collections.defaultdict(float, self.terms)
        for variable, own in other.terms.items():
            terms[variable] += factor * own
        return _Bits(dict(terms), self.constant + factor * other.constant)

    def __add__(self, other: Any) -> _Bits:
        return self.plus(other if isinstance(other, _Bits) else _Bits({}, other))


# What a row that is for truncated products alone leaves open where there is none: more bits than any number has.
_OPEN = 100.0
_LEAST, _MOST = -200.0, 60.0


class _Program:
    """A linear program: which products are truncated, the bits of all numbers, and the largest effect of a rounding.

    Only what is truncated, compared or opened must fit into the ring: until then sums and products wrap, and are right.
    Variable 0 is log2 of the largest effect, a standard deviation; a product has a variable that is 1 where it is
    truncated, and 0 where not.
    """

    def __init__(self, seen: Observed):
        function = seen.function
        self._function, self._seen = function, seen
        self._rows: list[tuple[Mapping[int, float], float]] = []  # a sum of factors x variables, and its bound
        self._bounds: list[tuple[float, float]] = [(_LEAST, _MOST)]
        self._truncated: dict[int, int] = {}  # the variable of a product, by its number
        self.sites: dict[Site, _Bits] = {}
        inputs = [
            self._new(("input", place), _IN_FLOAT32 - seen.sizes["input", place])
            for place in range(len(function.inputs))
        ]
        bits = carried(function, inputs, self._product, self._together)
        for place, size in zip(function.outputs, seen.outputs, strict=True):
            if isinstance(place, int):
                self._at_most(bits[place], RING - _RESULT_ROOM - size)
        for site, rounded in self.sites.items():
            number = site[1] if site[0] == "step" else None
            added = site[0] == "known" and function.steps[site[1]].kind == "sum"  # small beside what it is added to
            if seen.smallest[site] < math.inf and not added:
                self._at_least(rounded, _Bits({}, _RELATIVE - seen.smallest[site]), number)
            if not added:
                self._at_least(rounded, _Bits({}, _LARGEST - seen.sizes[site]), number)
            if seen.effects[site] > 0:
                self._at_least(rounded, _Bits({0: -1.0}, 0.5 * math.log2(seen.effects[site])), number)

    def _new(self, site: Site | None = None, most: float = 2 * RING) -> _Bits:
        self._bounds.append((-30.0, most))
        made = _Bits({len(self._bounds) - 1: 1.0})
        if site is not None:
            self.sites[site] = made
        return made

    def _at_most(self, bits: _Bits, bound: float, product: int | None = None) -> None:
        """Where the product of this number is truncated; always where it is None."""
        if product is not None:
            bits, bound = bits.plus(_Bits({self._truncated[product]: _OPEN})), bound + _OPEN
        self._rows.append((bits.terms, bound - bits.constant))

    def _at_least(self, bits: _Bits, other: _Bits, product: int | None = None) -> None:
        self._at_most(other.plus(bits, -1.0), 0.0, product)

    def _together(self, each: Instruction, own: list[_Bits]) -> _Bits:
        number, together = self._function.number.get(each.out, -1), own[0]
        if any(bits != together for bits in own):
            together = self._new()
            for bits in own:
                self._at_least(together, bits)
        if each.kind == "clip":
            self._at_most(together, RING - SPARE_BITS - self._seen.sizes["clip", number])
        if each.kind == "sum" and rounds_known(each):
            self.sites["known", number] = together
        return together

    def _product(self, each: Instruction, raw: _Bits) -> _Bits:
        number = self._function.number[each.out]
        if each.known is not None:
            exact = exact_bits(each.known)
            raw += self._new(("known", number)) if exact is None else exact
        kept = self._new(("step", number))
        self._bounds.append((0.0, 1.0))
        self._truncated[number] = len(self._bounds) - 1
        room = SPARE_BITS + self._seen.sizes["step", number]
        self._at_most(raw, RING - room, number)
        self._at_most(kept, TRUNCATED - room, number)
        self._at_least(raw, kept)
        self._at_least(kept.plus(_Bits({self._truncated[number]: MOST_DROPPED})), raw)
        return kept

    def cheapest(self, effect: float) -> frozenset[int] | None:
        """The products to truncate, by their numbers, for no rounding to have a larger effect; None if none will do."""
        cost = np.zeros(len(self._bounds))
        for number, variable in self._truncated.items():
            sent = math.prod(self._function.steps[number].shape) * _TRUNCATION_BYTES
            cost[variable] = sent * _SECONDS_PER_BYTE + _TRUNCATION_ROUNDS * _SECONDS_PER_ROUND
        found = self._solved(cost, {0: math.log2(effect)}, _SOLVING)
        return None if found is None else frozenset(n for n, v in self._truncated.items() if found[v] > 0.5)

    def bits(self, truncated: frozenset[int]) -> tuple[dict[Site, int], float]:
        """Whole bits of what is rounded, and the error that they make."""
        cost = np.full(len(self._bounds), 1e-4)  # what has no more bits than it needs has room beside them
        cost[0] = 1.0
        found = self._solved(cost, {v: float(n in truncated) for n, v in self._truncated.items()})
        assert found is not None, "that is what the truncations were chosen for"
        whole = np.floor(found + 1e-6)
        bits = {
            site: round(rounded.constant + sum(factor * whole[variable] for variable, factor in rounded.terms.items()))
            for site, rounded in self.sites.items()
            if site[0] != "step" or site[1] in truncated
        }
        return bits, _ROUNDED * math.sqrt(sum(self._seen.effects[site] * 4.0**-b for site, b in bits.items()))

    def _solved(self, cost: np.ndarray, fixed: Mapping[int, float], seconds: float | None = None) -> np.ndarray | None:
        """The variables of the lowest cost; within `seconds` those that say what is truncated are whole."""
        import scipy.sparse

        low, high = np.array([(fixed[i], fixed[i]) if i in fixed else own for i, own in enumerate(self._bounds)]).T
        if (low > high).any():
            return None
        data = [(factor, i, variable) for i, (terms, _) in enumerate(self._rows) for variable, factor in terms.items()]
        factors, rows, variables = zip(*data, strict=True)
        matrix = scipy.sparse.csr_array((factors, (rows, variables)), (len(self._rows), len(low)))
        whole = np.zeros(len(low))
        whole[[] if seconds is None else list(self._truncated.values())] = 1
        return solve(
            cost,
            [Within(matrix, -np.inf, np.array([bound for _, bound in self._rows]))],
            (low, high),
            whole,
            {"mip_rel_gap": _GAP} | ({} if seconds is None else {"time_limit": seconds}),
        )


def _made(seen: Observed, bits: Mapping[Site, int], error: float) -> BitPlan:
    function = seen.function
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
