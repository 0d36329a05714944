"""Reads from a compiled program what it takes and gives.

SPU runs a program on whatever it is given, and reads past the end of its results where more are named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy import shares
from flaxmpc.secure.protocol import Config

_FIRST = re.compile(r"module @[\w.$-]+ attributes \{[^(\\]*\} \{")
_SECOND = "  func.func @main("
_TYPE = re.compile(r"tensor<((?:\d{1,18}x)*)(?:!pphlo\.secret<(\w+)>|(\w+))>")


class Signature(NamedTuple):
    """The arrays that a program takes, and those that it gives."""

    inputs: tuple[m.Array, ...]
    outputs: tuple[m.Array, ...]

    @classmethod
    def of(cls, code: bytes) -> Signature:
        """Reads it from code as SPU's compiler writes it: its main function begins in the second line.

        Raises:
            ValueError: it is not such code, or has types that are not shared.
        """
        first, second = [*code.split(b"\n", 2), b""][:2]
        try:
            module, main = first.decode("ascii"), second.decode("ascii")
        except UnicodeDecodeError:
            module = main = ""
        # Nothing but the outermost module's own main function can stand in the second line then.
        if not _FIRST.fullmatch(module) or code.count(b"module") != 1 or not main.startswith(_SECOND):
            raise ValueError("the program is none that SPU's compiler wrote")
        inputs, _, outputs = main[len(_SECOND) :].removesuffix(" {").partition(") -> ")
        if outputs.startswith("("):
            outputs = outputs[1:-1]
        return cls(
            tuple(_array(text.partition(": ")[2]) for text in inputs.split(", ") if text),
            tuple(_array(text) for text in outputs.split(", ")),
        )


def _array(text: str) -> m.Array:
    if not (found := _TYPE.fullmatch(text)):
        raise ValueError(f"the program has a type {text[:80]!r}, which is none that SPU's compiler writes")
    dims, secret, public = found.groups()
    element = secret or public
    if element not in shares.ELEMENTS:
        raise ValueError(f"the program has a type {text[:80]!r}: its elements are none of {', '.join(shares.ELEMENTS)}")
    shape = tuple(int(dim) for dim in dims.split("x")[:-1])
    return m.Array(shape, shares.ELEMENTS[element], "secret" if secret else "public")


def differing(what: str, given: Sequence[m.Array], needed: Sequence[m.Array], *, visibility: bool = True) -> str:
    """The first difference between arrays and those that are needed, in one line; empty if there is none."""
    if len(given) != len(needed):
        return f"{len(given)} {what}s, {len(needed)} are needed"
    for i, (one, other) in enumerate(zip(given, needed, strict=True)):
        if (one.shape, one.dtype) != (other.shape, other.dtype) or (visibility and one.visibility != other.visibility):
            return f"{what} {i} is {_said(one)}, {_said(other)} is needed"
    return ""


def _said(array: m.Array) -> str:
    return f"{array.visibility} {array.dtype} {array.shape}"


def check_program(program: m.ModelProgram, num_weights: int, most_bytes: int, config: Config) -> None:
    """Checks that a model's program is what it says, and that its shares are at most `most_bytes` at a party.

    Raises:
        ValueError: it is not; one line.
    """
    for array in (*program.inputs, *program.outputs):
        if array.shape[:1] != (program.batch,):
            raise ValueError(f"it is for {program.batch} rows, but has an array of {array.shape}")
    for i, array in enumerate(program.inputs):
        if array.visibility != "secret":
            raise ValueError(f"input {i} is {array.visibility[:20]!r}: what clients send is secret")
    for arrays in (program.inputs, program.outputs):
        if (size := sum(shares.num_bytes(array, config) for array in arrays)) > most_bytes:
            raise ValueError(f"its shares have {size} bytes, the limit is max_request_bytes {most_bytes}")
    for count, code in {1: program.code, **program.joint}.items():
        signature = Signature.of(code)
        weights, inputs = signature.inputs[:num_weights], signature.inputs[num_weights:]
        if len(weights) < num_weights:
            raise ValueError(f"its code takes {len(weights)} arrays, but there are {num_weights} weights")
        reason = differing("input", program.inputs * count, inputs) or differing(
            "output", program.outputs * count, signature.outputs, visibility=False
        )
        if reason:
            raise ValueError(f"its code for {count} requests has another signature: {reason}")
