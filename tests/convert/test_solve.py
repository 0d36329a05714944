import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc.convert.distill import start_student
from flaxmpc.convert.layerwise import alone, apart, forward
from flaxmpc.convert.solve import goals_of, solved


class Case(NamedTuple):
    """A teacher's layer, and a student's that is to be solved for: models of one, their parameters, those beside."""

    teacher: Any
    own: dict
    student: Any
    start: dict
    rest: dict


@pytest.fixture(scope="module")
def case(tiny, tiny_params) -> Case:
    """The student has other parts, and matrices that were moved."""
    student = tiny.clone(config=dataclasses.replace(tiny.config, attention="2quad_freediv", hidden_act="quad"))
    rng = np.random.default_rng(3)
    moved = jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), tiny_params)
    (own,), rest = apart(tiny, tiny_params)
    (start,), _ = apart(student, start_student(student, moved))
    return Case(alone(tiny, 0), own, alone(student, 0), start, rest)


def texts(count: int, seed: int):
    """(what the layer gets, mask) of texts of 4 to 8 tokens."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(8) < rng.integers(4, 9, count)[:, None]).astype(np.int32)
    return jnp.asarray(rng.normal(size=(count, 8, 16)).astype(np.float32)), jnp.asarray(mask)


def solve(case: Case, parts) -> dict:
    """On batches of (what the layer gets, mask, which rows count)."""
    states, masks, rows = zip(*parts, strict=True)
    goals = [goals_of(case.teacher)(case.own, case.rest, *pair) for pair in zip(states, masks, strict=True)]
    counts = [mask * jnp.asarray(row)[:, None] for mask, row in zip(masks, rows, strict=True)]
    return solved(case.student, case.start, case.rest, states, goals.__getitem__, masks, counts, "layer_4")


def test_a_layer_gives_more_nearly_what_its_teachers_gives(case):
    hidden, mask = texts(300, 0)
    found = solve(case, [(hidden, mask, np.ones(300))])
    hidden, mask = texts(60, 1)
    wanted = forward(case.teacher)(case.own, case.rest, hidden, mask).hidden
    errors = [
        float(jnp.square(forward(case.student)(own, case.rest, hidden, mask).hidden - wanted)[mask > 0].mean())
        for own in (case.start, found)
    ]
    assert errors[1] < 0.3 * errors[0]


def test_batches_are_summed_and_padding_counts_for_nothing(case):
    """Nor does what only fills a batch up."""
    hidden, mask = texts(300, 0)
    whole = solve(case, [(hidden, mask, np.ones(300))])
    other, other_mask = texts(20, 1)
    junk = jnp.where(mask[..., None] > 0, hidden, 7.0)  # on padding
    last = jnp.concatenate([junk[200:], other]), jnp.concatenate([mask[200:], other_mask])
    parts = [(junk[:200], mask[:200], np.ones(200)), (*last, np.repeat([1.0, 0.0], [100, 20]))]
    for path, leaf in solve(case, parts).items():
        if path.startswith("attention/") and leaf.ndim == 1 and len(leaf) == 2:
            continue  # scalars, which are set on the first batch alone
        np.testing.assert_allclose(leaf, whole[path], atol=5e-3)


def test_what_diverges_is_refused(case):
    start = case.start | {"intermediate/bias": np.full(24, 1e30, np.float32)}
    said = r"^layer_4 can't be solved for: what output gets is not finite on some text$"
    with pytest.raises(FloatingPointError, match=said):
        solve(case._replace(start=start), [(*texts(20, 0), np.ones(20))])
