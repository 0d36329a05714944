"""`secure.check`: how far a function's numbers stay from what fixed point holds, seen on data in the clear.

SPU overflows without a word: a number that is too large for the ring becomes another one. So the function runs in the
clear on calibration data, with the largest magnitude of every operation recorded against the limit of its kind.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

from flaxmpc.secure.magnitudes import Instrumented, OpMargin
from flaxmpc.secure.party import to_arrays
from flaxmpc.secure.protocol import Config


class OverflowRisk(ValueError):
    """An operation comes too close to what fixed point holds, or beyond; the message says which, and by how much."""


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
        """The operation with the smallest margin; the first of them. ValueError: nothing in the function has one."""
        if not self.operations:
            raise ValueError("the function only moves values: no operation has a margin")
        return min(self.operations, key=lambda op: op.margin_bits)

    @property
    def margin_bits(self) -> float:
        """The smallest margin: by how many bits the numbers may grow before one of them overflows; inf if none can."""
        return min((op.margin_bits for op in self.operations), default=math.inf)

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
    fn: Callable[..., Any],
    batches: Iterable[tuple[Any, ...]],
    *,
    ring: str = "FM64",
    fraction_bits: int = 18,
    exp_mode: str = "auto",
) -> Margins:
    """How far `fn` stays from what fixed point gets wrong on calibration data, computed in the clear.

        secure.check(f, [(params, x) for x in calibration]).require(bits=2.0)

    That is overflow, of int32 and int64 too; results that are not finite; jumps (floor, round, a remainder, a
    conversion to integers, sign) closer to their argument than fixed point is exact; and exponentials of numbers that
    `exp_mode` is not exact for.

    What an overflow can't spoil is left out: values that a `where` or a product with a 0 from a comparison drops, and
    what depends on no argument. Too small numbers, which become 0, are no overflow and not reported; nor are
    comparisons of nearly equal numbers, and a while loop's condition.

    Args:
        fn: any JAX function of pytrees, as for `secure.jit`.
        batches: tuples of its arguments. A batch of other shapes counts as one more run of the same operations.
        ring, fraction_bits, exp_mode: the fixed point, see Config, whose defaults these are.

    Raises:
        ValueError, TypeError: no batch, one that is no tuple of arguments, an argument without fixed-point encoding,
            or settings that Config refuses.
    """
    config = Config(ring=ring, fraction_bits=fraction_bits, exp_mode=exp_mode)
    compiled: dict[Any, Instrumented] = {}
    found: dict[Any, OpMargin] = {}
    if hasattr(batches, "shape") or not isinstance(batches, Iterable):
        raise TypeError(f"batches is a list of tuples of arguments, not a single {type(batches).__name__}: [(x,), ...]")
    for number, batch in enumerate(batches):
        if not isinstance(batch, (tuple, list)):
            raise TypeError(f"batch {number} is a tuple of arguments, not a single {type(batch).__name__}: (x,)")
        args = to_arrays(tuple(batch), config, f"batch {number}")
        leaves, treedef = jax.tree.flatten(args)
        key = (treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in compiled:
            compiled[key] = Instrumented(fn, args, config)
        seen: collections.Counter[Any] = collections.Counter()
        for op in compiled[key](leaves):
            same = (op.primitive, op.where, op.source, op.quantity)
            seen[same] += 1
            place = (*same, seen[same])
            if place not in found or op.magnitude > found[place].magnitude:
                found[place] = op
    if not compiled:
        raise ValueError("there is no batch to check the function on")
    return Margins(config.ring, config.fraction_bits, tuple(found.values()))
