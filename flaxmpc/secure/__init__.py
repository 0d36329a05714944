"""Run any JAX function of pytrees on secret shares with SPU, and know what it cost.

Importing this does not import spu: it loads with the first function that is compiled or the first parties. Nor does it
import what takes a network: that loads with the first `Cluster`.
"""

from typing import TYPE_CHECKING, Any

from flaxmpc.secure._spu import SecureError
from flaxmpc.secure.bits import BitPlan, Encoding, PlanError
from flaxmpc.secure.cache import cache_dir
from flaxmpc.secure.check import Margins, OverflowRisk, check
from flaxmpc.secure.cost import Cost, OpCost
from flaxmpc.secure.fixed import Fixed
from flaxmpc.secure.hoist import Hoisted, hoist
from flaxmpc.secure.jit import Program, Run, SecureFunction, jit
from flaxmpc.secure.magnitudes import OpMargin
from flaxmpc.secure.network import LAN, WAN, Network
from flaxmpc.secure.party import InProcess, Parties, Party, Planned, Resident
from flaxmpc.secure.planning import plan
from flaxmpc.secure.protocol import EXP_MODES, MODEL_EXP_MODE, PROTOCOLS, Config, Protocol, get_protocol
from flaxmpc.secure.ring import FRACTION_BITS

if TYPE_CHECKING:
    from flaxmpc.secure.deploy.client import Cluster

__all__ = [
    "EXP_MODES",
    "FRACTION_BITS",
    "LAN",
    "MODEL_EXP_MODE",
    "PROTOCOLS",
    "WAN",
    "BitPlan",
    "Cluster",
    "Config",
    "Cost",
    "Encoding",
    "Fixed",
    "Hoisted",
    "InProcess",
    "Margins",
    "Network",
    "OpCost",
    "OpMargin",
    "OverflowRisk",
    "Parties",
    "Party",
    "PlanError",
    "Planned",
    "Program",
    "Protocol",
    "Resident",
    "Run",
    "SecureError",
    "SecureFunction",
    "cache_dir",
    "check",
    "get_protocol",
    "hoist",
    "jit",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name != "Cluster":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flaxmpc.secure.deploy.client import Cluster

    return Cluster
