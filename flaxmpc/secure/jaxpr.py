"""What those who walk a jaxpr share: which equations call a function, and where in the user's code one stands."""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr

from flaxmpc.secure._spu import SecureError

# A place in this folder is none of the user's.
source_info_util.register_exclusion(str(Path(__file__).parent))

# Their parameter with the function that they call on their operands.
_CALLS = {
    "pjit": "jaxpr",
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


def names(text: str) -> frozenset[str]:
    """The names of primitives in a text, with spaces between them."""
    return frozenset(text.split())


def called(eqn: Any) -> ClosedJaxpr | None:
    """The function that an equation calls on its operands, once and as it is; None if it does something else."""
    jaxpr = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
    return ClosedJaxpr(jaxpr, ()) if isinstance(jaxpr, Jaxpr) else jaxpr


# The equations that call the function whose equations are walked, the outermost first.
_CALLING: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("calling", default=())


@contextlib.contextmanager
def calling(*eqns: Any) -> Iterator[None]:
    """While the functions that an equation calls are walked; of several, each calls the next."""
    token = _CALLING.set((*_CALLING.get(), *eqns))
    try:
        yield
    finally:
        _CALLING.reset(token)


def callers() -> tuple[Any, ...]:
    """The equations that call what is walked now, the outermost first."""
    return _CALLING.get()


def source(eqn: Any, callers: Sequence[Any]) -> str:
    """File name and line of the user's code that made an equation.

    JAX traces a function once, and knows the lines of who called it first. Where that was another, it is the line of
    this call.
    """
    place, *inner = (*callers, eqn)
    for each in inner:
        frames = getattr(each.source_info.traceback, "frames", ())
        if not any(f"{frame.file_name}:{frame.line_num}" == _line(place) for frame in frames):
            break
        place = each
    return _line(place).rpartition("/")[2]


def _line(eqn: Any) -> str:
    """Path and line of the user's code that made an equation, as JAX remembers it."""
    text = source_info_util.summarize(eqn.source_info)
    found = re.match(r".*?:\d+", text)
    return found.group() if found else text


def bind(eqn: Any, ins: Sequence[Any], params: Mapping[str, Any] | None = None) -> list[Any]:
    """The results of an equation on values: computed, or traced; by default with its own parameters."""
    functions, own = eqn.primitive.get_bind_params(eqn.params if params is None else params)
    outs = eqn.primitive.bind(*functions, *ins, **own)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def refusal(eqn: Any, reason: str) -> SecureError:
    """The error that names an equation's primitive, and the user's line."""
    return SecureError(f"SPU cannot compute {eqn.primitive.name} ({source(eqn, callers())}): {reason}")


def modules(scope: str) -> str:
    """Flax names a module again for each of its methods: a/b.method/b.other is a/b."""
    return re.sub(r"(?<![^/])([^/]+)(?:/\1(?![^/]))+", r"\1", re.sub(r"\.\w+", "", scope))
