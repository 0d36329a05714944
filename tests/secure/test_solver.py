import ctypes
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse

from flaxmpc.secure.solver import Within, solve

BOUNDS = (0, 5)


def problem(seed: int):
    """A knapsack of random things."""
    rng = np.random.default_rng(seed)
    return -rng.uniform(1, 2, 12), Within(rng.uniform(1, 2, (1, 12)), -np.inf, 20.0)


@pytest.mark.parametrize("sparse", [False, True])
def test_it_finds_what_costs_least(sparse):
    for seed in range(5):
        cost, row = problem(seed)
        row = row._replace(matrix=scipy.sparse.csr_array(row.matrix) if sparse else row.matrix)
        found = solve(cost, [row], BOUNDS, np.ones(12), {"mip_rel_gap": 0.0})
        assert found is not None
        np.testing.assert_allclose(found, np.round(found), atol=1e-6)
        assert row.matrix @ found <= 20 + 1e-6
        taken = np.round(found).astype(int)
        for more in range(12):  # nothing that is left fits in, nor does what is worth more for what is worth less
            for less in np.flatnonzero(taken):
                changed = taken.copy()
                changed[more] += 1
                changed[less] -= 1
                if changed[more] <= 5 and row.matrix @ changed <= 20:
                    assert cost @ changed >= cost @ taken - 1e-6


def test_what_cannot_be_kept_to_has_no_solution():
    row = Within(np.ones((1, 2)), 11.0, np.inf)
    assert solve(np.ones(2), [row], BOUNDS, np.zeros(2), {}) is None


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param([4.0, 4.0], id="a row that is broken"),
        pytest.param([6.0, 0.0], id="a variable out of its bounds"),
        pytest.param([1.5, 1.0], id="a number that is not whole"),
        pytest.param([np.nan, 1.0], id="no number"),
    ],
)
def test_a_wrong_solution_is_none(wrong, monkeypatch):
    """As https://github.com/scipy/scipy/issues/24141 shows one."""
    row = Within(np.ones((1, 2)), -np.inf, 7.0)
    monkeypatch.setattr(scipy.optimize, "milp", lambda *_, **__: types.SimpleNamespace(x=np.array([3.0, 4.0])))
    assert solve(np.ones(2), [row], BOUNDS, np.ones(2), {}) is not None
    monkeypatch.setattr(scipy.optimize, "milp", lambda *_, **__: types.SimpleNamespace(x=np.array(wrong)))
    assert solve(np.ones(2), [row], BOUNDS, np.ones(2), {}) is None


def test_the_infeasible_solution_of_scipys_issue_is_none_or_right():
    b = [42, 252, 277, 41, 222, 48]
    a = np.array(
        [
            [0, 1, 1, 0, 1, 0, 0, 0],
            [0, 0, 1, 1, 1, 0, 1, 1],
            [1, 1, 1, 1, 1, 1, 0, 1],
            [0, 1, 0, 1, 1, 1, 0, 0],
            [0, 1, 0, 0, 1, 1, 0, 1],
            [0, 1, 1, 1, 0, 1, 1, 0],
        ]
    )
    rows = [Within(a, b, b)]
    found = solve(np.ones(8), rows, (0, np.inf), np.ones(8), {})
    assert found is None or np.array_equal(a @ np.round(found), b)


def test_what_the_solver_prints_is_not_on_standard_output(monkeypatch, capfd):
    def prints(*_, **__):
        os.write(1, b"by the descriptor")
        ctypes.CDLL(None).printf(b"by C's buffer")
        return types.SimpleNamespace(x=None)

    print("before")
    monkeypatch.setattr(scipy.optimize, "milp", prints)
    assert solve(np.ones(1), [], BOUNDS, np.ones(1), {}) is None
    print("after")
    printed = capfd.readouterr()
    assert printed.out == "before\nafter\n"
    assert printed.err == "by the descriptorby C's buffer"


def test_it_solves_without_a_standard_output():
    code = """
import os
import numpy as np
from flaxmpc.secure.solver import Within, solve
os.close(1)
found = solve(np.ones(2), [Within(np.ones((1, 2)), 3, 9)], (0, 5), np.ones(2), {})
raise SystemExit(int(found.sum() != 3))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
