import numpy as np
import pytest

from flaxmpc.convert.checkpoint import Checkpoints


def tree(value):
    return {"params": {"w": np.full((2, 3), value, np.float32)}, "optimizer": [np.int32(value)]}


def test_the_last_is_found_and_restored_by_another_run(tmp_path):
    with Checkpoints(tmp_path / "new" / "checkpoints", max_to_keep=2) as kept:
        assert kept.latest_step() == -1
        for step in (1, 2, 3):
            kept.save(step, tree(step))
    with Checkpoints(tmp_path / "new" / "checkpoints", max_to_keep=2) as again:
        assert again.latest_step() == 3
        found = again.restore(3, tree(0))
    np.testing.assert_array_equal(found["params"]["w"], tree(3)["params"]["w"])
    assert found["optimizer"] == [3]
    assert sorted(path.name for path in (tmp_path / "new" / "checkpoints").iterdir() if path.name.isdigit()) == [
        "2",
        "3",
    ]


def test_a_step_that_is_there_is_left(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=2) as kept:
        kept.save(1, tree(1), wait=True)
        kept.save(1, tree(7), wait=True)
        assert kept.restore(1, tree(0))["optimizer"] == [1]


@pytest.mark.parametrize(("figures", "best"), [([0.2, 0.9, 0.5], 1), ([0.5, 0.9, 0.9], 2)])
def test_the_best_is_that_of_the_largest_figure_and_the_last_of_equals(figures, best, tmp_path):
    options = {"max_to_keep": 1, "best_fn": lambda found: found["figure"], "best_mode": "max"}
    with Checkpoints(tmp_path, **options) as kept:
        assert kept.best_step() == -1
        for step, figure in enumerate(figures):
            kept.save(step, tree(step), {"figure": figure}, wait=True)
        assert kept.best_step() == best
        assert kept.restore(best, tree(0))["optimizer"] == [best]
