"""Definitions are run twice, as a notebook's cell is that runs again."""

import functools
import textwrap

import numpy as np
import pytest

from flaxmpc.nn.same import same


def run(code: str, module: dict | None = None):
    """What a cell leaves as `it`."""
    module = {"__name__": "__main__"} if module is None else module
    exec(compile(textwrap.dedent(code), "<cell>", "exec"), module)
    return module["it"]


SETUP = """
import dataclasses, functools, jax, jax.numpy as jnp, numpy as np
def make(a, b=2):
    return lambda x: a * x + b
"""

CELLS = [
    "it = lambda x: (x + 1) ** 3",
    "it = lambda x: (lambda y: y * 0.5)(x)",
    "def it(x, *, scale=1.5):\n    return x * scale",
    "def it(n):\n    return 1 if n == 0 else n * it(n - 1)",
    "it = make(3.0)",
    "it = make(np.arange(3))",
    "it = make(functools.partial(make, b=3))",
    "it = functools.partial(make, 1, b=(2, [3.0, {'c': None}]))",
    "it = jax.jit(lambda x: x + 1)",
    "@jax.custom_jvp\ndef it(x):\n    return x\nit.defjvp(lambda p, t: (p[0], t[0]))",
    "class Mine:\n    name = 'mine'\n    def __call__(self, x):\n        return x * 2\nit = Mine()",
    "class Mine:\n    def __init__(self, a):\n        self.a = a\n    b = property(lambda self: self.a)\n"
    "    @staticmethod\n    def c(): return 1\n    @classmethod\n    def d(cls): return cls\nit = Mine([1])",
    "class Mine:\n    def f(self):\n        return __class__\nit = Mine().f",
    "@dataclasses.dataclass(frozen=True)\nclass Mine:\n    name: str\n    f: object = None\n    n: int = 3\n"
    "it = Mine('mine', lambda x: x)",
]


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_that_runs_again_gives_the_same(cell):
    module: dict = {"__name__": "__main__"}
    run(SETUP + "it = None", module)
    first = run(cell, module)
    again = run("# a comment, and other lines\n\n" + cell, module)
    assert first is not again
    assert same(first, again)
    assert same([first, {"a": first}], [again, {"a": again}])


@pytest.mark.parametrize("cell", CELLS)
def test_cells_differ_from_one_another(cell):
    module: dict = {"__name__": "__main__"}
    run(SETUP + "it = None", module)
    first = run(cell, module)
    for other in CELLS:
        assert same(first, run(other, module)) == (other == cell)


@pytest.mark.parametrize(
    ("cell", "changed"),
    [
        ("it = lambda x: x + 1", "it = lambda x: x + 2"),
        ("it = lambda x: x + 1", "it = lambda x: x - 1"),
        ("it = lambda x: x * 1", "it = lambda x: x * 1.0"),
        ("it = lambda x: x * 0.0", "it = lambda x: x * -0.0"),
        ("it = lambda x, y: x - y", "it = lambda y, x: x - y"),
        ("it = lambda x: np.sin(x)", "it = lambda x: np.cos(x)"),
        ("it = lambda x: (lambda y: y + 1)(x)", "it = lambda x: (lambda y: y + 2)(x)"),
        ("def it(x, a=1): return x", "def it(x, a=2): return x"),
        ("def it(x, *, a=1): return x", "def it(x, *, a=2): return x"),
        ("it = make(1)", "it = make(2)"),
        ("it = make(1)", "it = make(True)"),
        ("it = make(make(1))", "it = make(make(2))"),
        ("it = make(np.arange(3))", "it = make(np.arange(3.0))"),
        ("it = make(np.arange(3))", "it = make(np.arange(4))"),
        ("it = functools.partial(make, 1)", "it = functools.partial(make, 2)"),
        ("it = functools.partial(make, b=1)", "it = functools.partial(make, a=1)"),
        ("it = jax.jit(lambda x: x + 1)", "it = jax.jit(lambda x: x + 2)"),
        ("class C:\n    a = 1\nit = C()", "class C:\n    a = 2\nit = C()"),
        ("class C:\n    def f(self): return 1\nit = C()", "class C:\n    def f(self): return 2\nit = C()"),
        ("class C(list): pass\nit = C", "class C(dict): pass\nit = C"),
        ("class C: pass\nit = C(); it.a = 1", "class C: pass\nit = C(); it.a = 2"),
        ("it = [1, 2]", "it = (1, 2)"),
        ("it = {'a': 1}", "it = {'b': 1}"),
    ],
)
def test_a_change_makes_another(cell, changed):
    module: dict = {"__name__": "__main__"}
    run(SETUP + "it = None", module)
    assert not same(run(cell, module), run(changed, module))


def test_the_same_code_in_two_modules_is_not_the_same():
    cell = "it = lambda x: scale * x"
    assert not same(run(cell, {"scale": 1}), run(cell, {"scale": 2}))


def test_what_cannot_be_looked_into_is_compared():
    assert same(1.5, 1.5)
    assert same(np.sin, np.sin)
    assert not same(np.sin, np.cos)
    assert not same(functools.partial(np.sin), functools.partial(np.cos))
    assert not same(1, None)
