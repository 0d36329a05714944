"""A plan of bits: how many fraction bits every number of a function has, and where products are truncated."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from flaxmpc.secure.instructions import Function, Instruction, exact_bits, power_of_two
from flaxmpc.secure.ring import FRACTION_BITS, MOST_DROPPED, Integers, integers

SPARE_BITS = 10.0
"""By how many bits every number may grow beyond what was seen, before it leaves the ring.

What leaves the ring comes back anywhere in it: with 10 bits one time in hundreds as large as what was seen.
"""

RING = 62.0
"""Bits of a number that is truncated, opened or compared, the fraction bits included."""

TRUNCATED = RING - FRACTION_BITS
"""The same after it is truncated: SPU multiplies by 2^(FRACTION_BITS - dropped) before."""

_MOST_BITS = 200  # untruncated products wrap, so they may have more than the ring
_SMALLEST = -20.0  # log2 of a magnitude; what is smaller counts as that


class PlanError(ValueError):
    """There is no plan for a function: its numbers have no room in the ring; or a plan is another function's."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What a plan says of one sum, product or clip.

    Attributes:
        where: the modules that it is in, and its primitive.
        elements: how many numbers it computes, for the arguments that truncations were chosen for.
        magnitude: the largest that was seen.
        bits: the fraction bits of the result before it is truncated.
        kept: the fraction bits after that; None where it is not truncated.
        known: the bits of the numbers that it multiplies with, if these are known and not a few whole ones.
    """

    where: str
    elements: int
    magnitude: float
    bits: int
    kept: int | None
    known: int | None

    @property
    def spare_bits(self) -> float:
        """By how many bits the result may grow before it leaves the ring; inf where nothing depends on its size."""
        room = math.inf if self.kept is None else min(RING - self.bits, TRUNCATED - self.kept)
        return room - log2(self.magnitude)


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How arguments of a function, and its results, are numbers of the ring. It says nothing of what is in between.

    Attributes:
        inputs: the bits of the arguments' leaves.
        magnitudes: the largest that was seen of each leaf.
        outputs: the bits of the results' leaves.
    """

    inputs: tuple[int, ...]
    magnitudes: tuple[float, ...]
    outputs: tuple[int, ...]

    def encode(self, tree: Any) -> Any:
        """Arguments as the function takes them.

        Raises:
            ValueError: a number too far beyond those that the plan was made of.
            PlanError: more leaves than the function has.
        """
        leaves, structure = jax.tree.flatten(tree)
        if len(leaves) > len(self.inputs):
            raise PlanError("the plan of bits is another function's: it has fewer arguments")
        return jax.tree.unflatten(structure, list(map(_encoded, leaves, self.inputs, self.magnitudes)))

    def decode(self, outputs: Any) -> Any:
        """Results as the function has them, float32. PlanError: they are not as many."""
        leaves, tree = jax.tree.flatten(outputs)
        if len(leaves) != len(self.outputs):
            raise PlanError(f"the plan of bits is for {len(self.outputs)} results, and there are {len(leaves)}")
        scaled = [
            (np.asarray(x, np.float64) * 2.0**-bits).astype(np.float32)
            for x, bits in zip(leaves, self.outputs, strict=True)
        ]
        return jax.tree.unflatten(tree, scaled)

    def as_dict(self) -> dict[str, Any]:
        """The same as a JSON value."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Any) -> Encoding:
        """From `as_dict`. PlanError: it is none."""
        try:
            found = cls(*(tuple(value[field.name]) for field in dataclasses.fields(cls)))
            _check_numbers((*found.inputs, *found.outputs), found.magnitudes)
            if len(found.inputs) != len(found.magnitudes):
                raise ValueError("a leaf has no magnitude")
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this is no encoding of a plan: {error!r}") from error
        return found


def _encoded(leaf: Any, bits: int, magnitude: float) -> Integers:
    array, most = np.asarray(leaf, np.float64), magnitude * 2.0**SPARE_BITS
    if not (np.abs(array) <= most).all():
        worst = array.flat[np.argmax(np.where(np.isnan(array), np.inf, np.abs(array)))]
        raise ValueError(f"an argument holds {worst:g}; its plan of bits is for up to {most:.3g}")
    return integers(np.rint(array * 2.0**bits))


def _check_numbers(bits: Iterable[Any], sizes: Iterable[Any]) -> None:
    """ValueError: bits that are no whole numbers, or too many; a magnitude that is negative or not finite."""
    for number in bits:
        if type(number) is not int or abs(number) > _MOST_BITS:
            raise ValueError(f"bits are whole numbers up to {_MOST_BITS}, not {number!r}")
    if not all(math.isfinite(size) and size >= 0 for size in sizes):
        raise ValueError("a magnitude is not finite")


@dataclasses.dataclass(frozen=True)
class BitPlan:
    """How many fraction bits every number of a function has.

    Attributes:
        fingerprint: what tells the function from others.
        inputs: the bits of the arguments' leaves.
        magnitudes: the largest that was seen of each leaf.
        steps: what is planned for every sum, product and clip, in order.
        outputs: the bits of the results' leaves.
        error: standard deviation of what all roundings together do to a result.
    """

    fingerprint: str
    inputs: tuple[int, ...]
    magnitudes: tuple[float, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    error: float

    @property
    def truncations(self) -> int:
        return sum(step.kept is not None for step in self.steps)

    @property
    def spare_bits(self) -> float:
        """The fewest of any step."""
        return min((step.spare_bits for step in self.steps), default=math.inf)

    def encoding(self, start: int = 0) -> Encoding:
        """How the arguments from leaf `start` on, and the results, are numbers of the ring."""
        return Encoding(self.inputs[start:], self.magnitudes[start:], self.outputs)

    def as_dict(self) -> dict[str, Any]:
        """The same as a JSON value."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Any) -> BitPlan:
        """From `as_dict`. PlanError: it is none, or one of its numbers has too few bits to spare."""
        try:
            steps = tuple(Step(**step) for step in value["steps"])
            lists = {name: tuple(value[name]) for name in ("inputs", "magnitudes", "outputs")}
            plan = cls(str(value["fingerprint"]), steps=steps, error=float(value["error"]), **lists)
            some = [bits for step in steps for bits in (step.kept, step.known) if bits is not None]
            sizes = (plan.error, *plan.magnitudes, *(step.magnitude for step in steps))
            _check_numbers((*plan.inputs, *plan.outputs, *(step.bits for step in steps), *some), sizes)
            dropped = max((step.bits - step.kept for step in steps if step.kept is not None), default=0)
            if dropped > MOST_DROPPED:
                raise ValueError(f"{dropped} bits are dropped at once; {MOST_DROPPED} can be")
            spare = plan.spare_bits
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this is no plan of bits: {error!r}") from error
        if spare < SPARE_BITS - 1e-6:
            worst = min(steps, key=lambda step: step.spare_bits)
            raise PlanError(f"{worst.where} has {spare:.1f} bits to spare in this plan; {SPARE_BITS:g} are needed")
        return plan

    def __str__(self) -> str:
        return f"{self.truncations} truncations, {self.spare_bits:.1f} bits to spare, error {self.error:.2g}"


def log2(size: float) -> float:
    """log2 of a magnitude, of 0 too."""
    return max(math.log2(size), _SMALLEST) if size > 0 else _SMALLEST


_Bits = TypeVar("_Bits", bound=Any)  # whole numbers, or what can be added to these and to its kind


def carried(
    function: Function,
    inputs: Sequence[_Bits],
    product: Callable[[Instruction, _Bits], _Bits],
    together: Callable[[Instruction, list[_Bits]], _Bits],
) -> dict[int, _Bits]:
    """The bits of every value, by its place.

    Args:
        inputs: the bits of the arguments' leaves.
        product: gives a product's bits, from the sum of what its operands have, without those of known numbers.
        together: gives the bits of what needs the same ones of all its operands, from those that they have.
    """
    bits = dict(enumerate(inputs))
    for each in function.instructions:
        own = [bits[x] for x in each.ins if isinstance(x, int)]
        if each.kind == "shift":
            power = power_of_two(each.known)
            assert power is not None, "that is what a shift is"
            bits[each.out] = own[0] + -power
        elif each.kind == "product":
            bits[each.out] = product(each, functools.reduce(operator.add, own))
        else:
            bits[each.out] = together(each, own)
    return bits


def followed(
    function: Function, inputs: Sequence[int], kept: Sequence[int | None], known: Sequence[int | None]
) -> tuple[dict[int, int], tuple[int, ...]]:
    """The bits of every value before it is truncated, by its place, and those of the results.

    Args:
        inputs: the bits of the arguments' leaves.
        kept, known: every step's, see `Step`.
    """
    raw: dict[int, int] = {}

    def product(each: Instruction, own: int) -> int:
        number = function.number[each.out]
        raw[each.out] = own + (0 if each.known is None else known_bits(each, known[number]))
        most = kept[number]
        return raw[each.out] if most is None else min(most, raw[each.out])

    bits = carried(function, inputs, product, lambda _, own: max(own))
    return bits | raw, tuple(bits[x] if isinstance(x, int) else _RESULT for x in function.outputs)


_RESULT = 20  # bits of a result that is known


def known_bits(each: Instruction, planned: int | None) -> int:
    """The bits of the known numbers of a product."""
    exact = exact_bits(each.known)
    if exact is None:
        if planned is None:
            raise PlanError(f"the plan has no bits for the numbers of {each.where}")
        return planned
    return exact
