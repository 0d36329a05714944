"""A budget for a request on shares, and the choice of parts that loses least within it."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flaxmpc import secure
from flaxmpc.errors import brief
from flaxmpc.secure.solver import Within, solve

Where = tuple[int, str]
"""A place for a part: its layer, and "attention", "activation", "after_attention" or "after_feed_forward"."""

Part = tuple[Where, str]
"""A part by its name, in a place."""

Table = Mapping[Where, Mapping[str, float]]
"""A number for each part that a place may have, by the part's name."""


class _Measure(NamedTuple):
    """One thing that a budget may be of: its unit, how many of what a cost has are one, and how it is read there."""

    unit: str
    one: float
    of: Callable[[secure.Cost], float]


_MEASURES = {
    "lan": _Measure("s", 1.0, secure.LAN.seconds),
    "wan": _Measure("s", 1.0, secure.WAN.seconds),
    "bytes": _Measure("MB", 1e6, lambda cost: float(cost.bytes_sent)),
    "rounds": _Measure("", 1.0, lambda cost: cost.rounds),
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a request on shares may take.

    Attributes:
        what: `lan` or `wan`, modelled seconds; `bytes`, of all parties; or `rounds`.
        most: so many of it.
    """

    what: str
    most: float

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """From wan=20s, lan=1.5s, bytes=300MB or rounds=200.

        Raises:
            ValueError: another text, or a number that is not above 0.
        """
        found = re.fullmatch(r"(\w+)=([0-9.e+-]+)([A-Za-z]*)", text)
        measure = _MEASURES.get(found[1]) if found else None
        try:
            most = float(found[2]) * measure.one if found and measure and found[3] == measure.unit else 0.0
        except ValueError:
            most = 0.0
        if not 0 < most < float("inf"):
            forms = ", ".join(f"{name}=20{one.unit}" for name, one in _MEASURES.items())
            raise ValueError(f"the budget {brief(text)} is none of the form {forms}, with a number above 0")
        assert found is not None
        return cls(found[1], most)

    def of(self, cost: secure.Cost) -> float:
        """How much of it a run takes."""
        return _MEASURES[self.what].of(cost)

    def text(self, amount: float) -> str:
        """An amount of it, with its unit."""
        measure = _MEASURES[self.what]
        return f"{amount / measure.one:.4g} {measure.unit or self.what}"


class Choice(NamedTuple):
    """A part for every place, by its name, with the sums of what the parts lose and cost."""

    parts: dict[Where, str]
    loss: float
    cost: float


def choose(losses: Table, costs: Table, most: float, apart: Sequence[Sequence[Part]] = ()) -> Choice | None:
    """The choice of the least sum of losses whose costs sum to `most` at most; of several the cheapest.

    Args:
        losses, costs: of every part in every place.
        most: the most that the costs may sum to; infinity for any.
        apart: groups of parts of which a choice has one at most.

    Returns:
        None where there is no such choice.
    """
    options = [(where, name) for where, own in losses.items() for name in own]
    loss, cost = (np.array([table[where][name] for where, name in options]) for table in (losses, costs))
    rows = [Within(np.array([[float(where == place) for where, _ in options] for place in losses]), 1, 1)]
    rows += [Within(np.array([[float(option in group) for option in options]]), 0, 1) for group in apart]
    if most < math.inf:
        rows.append(Within(cost[None], -np.inf, most))

    def best(amount: np.ndarray, rows: Sequence[Within]) -> np.ndarray | None:
        found = solve(amount, rows, (0, 1), np.ones(len(options)), {"mip_rel_gap": 0.0})
        return None if found is None else np.round(found)

    found = best(loss, rows)
    if found is None:
        return None
    as_good = Within(loss[None], -np.inf, loss @ found + 1e-9 * np.abs(loss).sum())
    cheaper = best(cost, [*rows, as_good])
    found = found if cheaper is None else cheaper
    parts = dict(option for option, x in zip(options, found, strict=True) if x)
    return Choice(parts, float(loss @ found), float(cost @ found))


def front(
    losses: Table, costs: Table, base: float, apart: Sequence[Sequence[Part]] = (), points: int = 24
) -> list[Choice]:
    """Choices that lose least for budgets from the cheapest to the dearest, cheapest first; each a part dearer.

    Args:
        losses, costs, apart: see `choose`.
        base: what a request costs beside; it is added to the costs of the choices.
        points: how many budgets are looked at.
    """
    cheapest = choose(costs, costs, math.inf, apart)
    assert cheapest is not None, "every place has a part that is in no group"
    most = sum(max(own.values()) for own in costs.values())
    found: list[Choice] = []
    for within in np.geomspace(base + cheapest.cost, base + most, points):
        made = choose(losses, costs, float(within) * (1 + 1e-9) - base, apart)
        if made is not None and (not found or made.parts != found[-1].parts):
            found.append(made)
    return [choice._replace(cost=base + choice.cost) for choice in found]
