"""The plan of a model's bits (`secure.plan`), as it is kept in its folder."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flaxmpc import files, secure

FILE = "bits.json"
FOLLOWED_BY = ("ABY3", "REF2K", "SEMI2K")
"""The protocols whose truncations are those that a plan is tried with."""

_BYTES = 16 << 20


def digest(weights: Mapping[str, Any]) -> str:
    """Of folded weights: a plan is for these alone."""
    found = hashlib.sha256()
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name])
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def has(folder: Path) -> bool:
    """Whether a model folder has a plan."""
    return (folder / FILE).is_file()


def follows(folder: Path, config: secure.Config) -> bool:
    """Whether parties of this config follow the plan in a model folder.

    Raises:
        ValueError: they have the fraction bits of plans, but there is none, or their protocol follows none.
    """
    if config.fraction_bits != secure.FRACTION_BITS or config.ring != "FM64":
        return False
    if config.protocol in FOLLOWED_BY and has(folder):
        return True
    why = f"{folder} has none" if config.protocol in FOLLOWED_BY else f"{config.protocol} follows none"
    raise ValueError(
        f"{config.fraction_bits} fraction bits in the ring FM64 are for plans of bits (`flaxmpc plan`), and {why}; "
        "without one a product holds 4 at most: take 18"
    )


def parties(folder: Path, protocol: str = "ABY3", **options: Any) -> secure.InProcess:
    """Parties for the model in a folder: where it has a plan that they can follow, with the plans' fraction bits.

    Args:
        folder: the model's.
        protocol, options: what `secure.InProcess` takes; what is given stays as it is. Without an exp_mode it is that
            of models.
    """
    if has(folder) and protocol in FOLLOWED_BY and options.get("ring", "FM64") == "FM64":
        options.setdefault("fraction_bits", secure.FRACTION_BITS)
    return secure.InProcess(protocol, **{"exp_mode": secure.MODEL_EXP_MODE, **options})


def read(folder: Path, weights: Mapping[str, Any] | None) -> secure.BitPlan:
    """The plan in a model folder.

    Args:
        weights: folded, which the plan must be for; None where they are not at hand.

    Raises:
        ValueError: it is broken, or for other weights.
    """
    path, mend = folder / FILE, "make it again with `flaxmpc plan`, or delete it"
    value = files.read_object(path, _BYTES, folder, mend=mend)
    try:
        found = secure.BitPlan.from_dict(value.get("plan"))
    except secure.PlanError as error:
        raise ValueError(f"{path}: {error}: {mend}") from error
    if weights is not None and value.get("weights") != digest(weights):
        raise ValueError(f"{path} was made for other weights than the folder's: {mend}")
    return found


def write(folder: Path, weights: Mapping[str, Any], plan: secure.BitPlan) -> None:
    """Keeps the plan of a model's folded weights in its folder."""
    files.write_json(folder / FILE, {"weights": digest(weights), "plan": plan.as_dict()})
