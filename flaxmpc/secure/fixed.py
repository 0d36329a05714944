"""`secure.Fixed`: a function in fixed point, its bits as a plan says, so that few of its products are truncated."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxmpc.secure.arithmetic import enable_x64  # pyright: ignore[reportAttributeAccessIssue]
from flaxmpc.secure.bits import BitPlan, PlanError, followed, known_bits
from flaxmpc.secure.instructions import Function, Instruction
from flaxmpc.secure.ring import by_chance, truncate


class Fixed:
    """A function in fixed point: `encode` its arguments, run this on shares, `decode` its results.

        plan = secure.plan(model, [(params, x) for x in calibration])
        fixed = secure.Fixed(model, plan)
        parties = secure.InProcess(fraction_bits=secure.FRACTION_BITS)
        y = fixed.decode(secure.jit(fixed, parties=parties)(*fixed.encode((params, x))))

    It takes arguments of other shapes than the plan was made from, as long as it computes the same for them.

    Attributes:
        plan: its bits.
    """

    def __init__(self, fn: Callable[..., Any], plan: BitPlan):
        self._fn = fn
        self.plan = plan
        self._functions: dict[Any, tuple[Function, dict[int, int]]] = {}
        self._lock = threading.Lock()

    def _function(self, args: tuple[Any, ...]) -> tuple[Function, dict[int, int]]:
        """The function for arguments of these shapes, and the bits of its values before they are truncated."""
        leaves, tree = jax.tree.flatten(args)
        key = tree, tuple(jnp.shape(leaf) for leaf in leaves)
        with self._lock:
            if key not in self._functions:
                function = Function(self._fn, args)
                if function.fingerprint != self.plan.fingerprint:
                    raise PlanError("the plan of bits is another function's, or for these shapes it computes otherwise")
                steps = self.plan.steps
                counts = len(steps), len(self.plan.inputs), len(self.plan.magnitudes)
                if counts != (len(function.steps), len(function.inputs), len(function.inputs)):
                    raise PlanError("the plan of bits leaves out steps or arguments of the function")
                kept, known = [step.kept for step in steps], [step.known for step in steps]
                raw, outputs = followed(function, self.plan.inputs, kept, known)
                bits = [raw[step.out] for step in function.steps]
                if bits != [step.bits for step in steps] or outputs != self.plan.outputs:
                    raise PlanError("the plan of bits does not add up: other bits follow from its own")
                self._functions[key] = function, raw
            return self._functions[key]

    def __call__(self, *args: Any) -> Any:
        """Encoded results for encoded arguments. PlanError: the plan is another function's."""
        return self._results(args, truncate)

    def _results(self, args: tuple[Any, ...], truncate: Callable[[Any, int], Any]) -> Any:
        function, raw = self._function(args)
        if any(getattr(leaf, "dtype", None) != np.int64 for leaf in jax.tree.leaves(args)):
            raise TypeError("arguments of a function with a plan of bits are int64, as `encode` makes them")
        with enable_x64(True):  # pyright: ignore[reportCallIssue]
            values: dict[int, tuple[Any, int]] = {
                place: (leaf, self.plan.inputs[place]) for place, leaf in enumerate(jax.tree.leaves(args))
            }
            for each in function.instructions:
                out, bits, kept = self._computed(each, function, values, raw[each.out]), raw[each.out], None
                if each.kind == "product":
                    kept = self.plan.steps[function.number[each.out]].kept
                kept = bits if kept is None else min(bits, kept)
                values[each.out] = truncate(out, bits - kept), kept
            outputs = [
                values[x][0] if isinstance(x, int) else _encoded(x, bits)
                for x, bits in zip(function.outputs, self.plan.outputs, strict=True)
            ]
            return jax.tree.unflatten(function.tree, [jnp.asarray(x) for x in outputs])

    def _computed(self, each: Instruction, function: Function, values: dict[int, tuple[Any, int]], bits: int) -> Any:
        """The result of an instruction, with `bits`, from values with their bits."""
        if each.kind == "shift":
            x, _ = values[each.ins[0]]
            return -x if np.asarray(each.known).flat[0] < 0 else x
        if each.kind == "product":
            known = self.plan.steps[function.number[each.out]].known
            return each.apply(
                [values[x][0] if isinstance(x, int) else _encoded(x, known_bits(each, known)) for x in each.ins]
            )
        choice = each.ins[0] if each.eqn.primitive.name == "select_n" else None
        ins = [
            _raised(*values[x], bits) if isinstance(x, int) else x if x is choice else _encoded(x, bits)
            for x in each.ins
        ]
        return ins[0] if each.eqn.primitive.name == "convert_element_type" else each.apply(ins)

    def encode(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments as the function takes them, see `Encoding`."""
        return self.plan.encoding().encode(args)

    def decode(self, outputs: Any) -> Any:
        """Results as the function has them, see `Encoding`."""
        return self.plan.encoding().decode(outputs)

    def clear(self, *args: Any, seed: int | None = None) -> Any:
        """The results for plain arguments, computed with the plan's bits in the clear.

        Args:
            seed: if given, what is truncated is rounded up or down by chance, as on the shares of ABY3 and SEMI2K;
                else to the nearest, as REF2K does.
        """
        encoded = self.encode(args)
        with enable_x64(True):  # pyright: ignore[reportCallIssue]
            found = self._results(encoded, truncate if seed is None else by_chance(jax.random.key(seed)))
        return self.decode(jax.device_get(found))


def _encoded(known: Any, bits: int) -> np.ndarray:
    """The integers of the ring that encode known numbers: modulo 2^64."""
    whole = np.fmod(np.rint(np.asarray(known, np.float64) * 2.0**bits), 2.0**64)
    return np.where(whole >= 2.0**63, whole - 2.0**64, np.where(whole < -(2.0**63), whole + 2.0**64, whole)).astype(
        np.int64
    )


def _raised(x: Any, bits: int, to: int) -> Any:
    return x * np.int64(1 << (to - bits)) if to > bits else x
