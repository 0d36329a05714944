"""What those who walk a jaxpr share: which equations call a function, and where in the user's code one stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr

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


def called(eqn: Any) -> ClosedJaxpr | None:
    """The function that an equation calls on its operands, once and as it is; None if it does something else."""
    jaxpr = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
    return ClosedJaxpr(jaxpr, ()) if isinstance(jaxpr, Jaxpr) else jaxpr


def source(eqn: Any) -> str:
    """File name and line of the user's code that made an equation."""
    text = source_info_util.summarize(eqn.source_info)
    found = re.search(r"[^/\\:]+:\d+", text)
    return found.group() if found else text
