"""Solves mixed-integer linear programs with scipy's HiGHS: with no word of it on standard output, and checked.

HiGHS prints some lines whatever it is told (https://github.com/jump-dev/HiGHS.jl/issues/312), and has called solutions
optimal that break a constraint (https://github.com/scipy/scipy/issues/24141).
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_TOLERANCE = 1e-6  # HiGHS's own, of rows and of whole numbers
_stdout_lock = threading.Lock()


class Within(NamedTuple):
    """What variables keep to: `low` <= `matrix` @ variables <= `high`.

    Attributes:
        matrix: (row, variable), dense or of scipy.sparse.
        low, high: numbers, or (row,).
    """

    matrix: Any
    low: Any
    high: Any


def solve(
    cost: np.ndarray,
    rows: Sequence[Within],
    bounds: tuple[Any, Any],
    whole: np.ndarray,
    options: Mapping[str, Any],
) -> np.ndarray | None:
    """The variables (n,) of the lowest cost, or the best that were found in time; None if there are none.

    Meanwhile what any thread prints on standard output goes to standard error.

    Args:
        cost: what is minimised, per unit of each variable, (n,).
        rows: what the variables keep to.
        bounds: the least and the most of each variable, numbers or (n,).
        whole: 1 for a variable that is a whole number, else 0, (n,).
        options: scipy.optimize.milp's.
    """
    import scipy.optimize  # a quarter of a second, and few need it

    with _quiet():
        found = scipy.optimize.milp(
            cost,
            constraints=[scipy.optimize.LinearConstraint(*row) for row in rows],
            bounds=scipy.optimize.Bounds(*bounds),
            integrality=whole,
            options=dict(options),
        ).x
    return found if found is not None and _keeps(found, rows, bounds, whole) else None


def _keeps(found: np.ndarray, rows: Sequence[Within], bounds: tuple[Any, Any], whole: np.ndarray) -> bool:
    """Whether variables keep to what they have to."""
    values = [(found, *bounds, 1 + np.abs(found))]
    values += [(row.matrix @ found, row.low, row.high, 1 + abs(row.matrix) @ np.abs(found)) for row in rows]
    within = all(
        ((value >= low - _TOLERANCE * size) & (value <= high + _TOLERANCE * size)).all()
        for value, low, high, size in values
    )
    return within and bool((np.abs(found - np.round(found))[whole > 0] <= _TOLERANCE).all())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Sends what C code prints on standard output to standard error: what a caller reads there is its own."""
    flush = ctypes.CDLL(None).fflush  # C's own buffer, which would be written after the descriptor is back
    with _stdout_lock:
        flush(None)
        try:
            kept = os.dup(1)
        except OSError:  # it is closed: nobody reads it
            yield
            return
        try:
            with contextlib.suppress(OSError):  # there may be no standard error either
                os.dup2(2, 1)
            yield
        finally:
            flush(None)
            os.dup2(kept, 1)
            os.close(kept)
