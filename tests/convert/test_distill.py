import copy
import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc.convert.data import Batch
from flaxmpc.convert.distill import calibrate, distill, start_student
from flaxmpc.convert.fit import Schedule
from flaxmpc.models.bert import BertForSequenceClassification, init_params

KEYS = np.arange(8) < np.array([8, 5, 2, 1])[:, None]
IDS = (np.random.default_rng(0).integers(1, 40, KEYS.shape) * KEYS).astype(np.int32)


def with_parts(model, **changes):
    return BertForSequenceClassification(dataclasses.replace(model.config, **changes))


def batch_of(rows: int) -> Batch:
    """The four sentences; those from `rows` on only fill up, with one token each."""
    row_mask = (np.arange(4) < rows).astype(np.float32)
    mask = np.where(row_mask[:, None] > 0, KEYS, np.arange(8) == 0).astype(np.int32)
    return Batch(IDS, mask, np.zeros_like(IDS), np.zeros(4, np.int32), row_mask)


def scores_of(model, params, batch):
    @jax.jit
    def compute(params):
        return model.apply({"params": params}, jnp.array(batch[0]), jnp.array(batch[1]), return_intermediates=True)

    return [np.asarray(scores, np.float64) for scores in compute(params)[1].scores]


def row_means(scores, mask, shift):
    """sum_j f(s_ij) / n of every valid query, one list a head: 2quad written out."""
    return [
        [
            ((scores[b, head, i, : int(mask[b].sum())] + shift[head]) ** 2).mean()
            for b in range(len(mask))
            for i in range(int(mask[b].sum()))
        ]
        for head in range(scores.shape[1])
    ]


# ------------------------------------------------------------------------------------------------------------ replace


def test_a_student_starts_with_all_that_its_teacher_has(tiny, tiny_params):
    student = with_parts(tiny, attention="2quad_freediv", hidden_act="quad")
    params = start_student(student, tiny_params)
    attention = params["bert"]["layer_0"]["attention"]
    np.testing.assert_array_equal(attention.pop("shift"), [5, 5])
    np.testing.assert_array_equal(attention.pop("scale"), [1, 1])
    chex.assert_trees_all_equal(params, tiny_params)


def test_a_teacher_of_another_shape_is_refused(tiny, tiny_params):
    with pytest.raises(ValueError, match=r"bert/layer_0/intermediate/bias is \(24,\) in the teacher and \(32,\)"):
        start_student(with_parts(tiny, intermediate_size=32), tiny_params)


# ---------------------------------------------------------------------------------------------------------- calibrate


@pytest.fixture(scope="module")
def student(tiny):
    """Two layers with scores of some size, and other shifts in every head."""
    model = with_parts(tiny, attention="2quad_freediv", hidden_act="quad", num_hidden_layers=2, initializer_range=0.3)
    params = jax.device_get(init_params(model, seed=2))
    for layer, shift in (("layer_0", [5.0, 4.0]), ("layer_1", [3.0, 6.0])):
        params["bert"][layer]["attention"]["shift"] = np.array(shift, np.float32)
    return model, params


def test_every_constant_is_the_mean_over_the_rows_of_its_layer_in_turn(student):
    model, params = student
    batch = batch_of(4)
    found = calibrate(model, params, batch)
    mask = np.asarray(batch.attention_mask)
    for layer in range(2):
        # The scores of a layer are those with the layers before it calibrated already.
        scores = scores_of(model, found, batch)[layer]
        attention = found["bert"][f"layer_{layer}"]["attention"]
        means = row_means(scores, mask, attention["shift"])
        np.testing.assert_allclose(attention["scale"], [np.mean(1 / np.array(head)) for head in means], rtol=1e-4)
        assert not np.allclose(scores, scores_of(model, params, batch)[layer]) or layer == 0


def test_calibrated_weights_of_a_row_sum_to_about_1(student):
    model, params = student
    batch = batch_of(4)
    found = calibrate(model, params, batch)
    attention = found["bert"]["layer_0"]["attention"]
    before = np.array(
        row_means(scores_of(model, found, batch)[0], np.asarray(batch.attention_mask), attention["shift"])
    )
    assert before.mean() > 5
    assert 0.95 < (attention["scale"][:, None] * before).mean() < 1.3


def test_rows_that_only_fill_up_do_not_calibrate(student):
    model, params = student
    two = Batch(*(array[:2] for array in batch_of(2)))
    chex.assert_trees_all_close(calibrate(model, params, batch_of(2)), calibrate(model, params, two), rtol=1e-5)


def test_calibrating_changes_the_constants_alone_and_not_what_was_given(student):
    model, params = student
    before = copy.deepcopy(params)
    found = calibrate(model, params, batch_of(4))
    chex.assert_trees_all_equal(params, before)
    for layer in ("layer_0", "layer_1"):
        del found["bert"][layer]["attention"]["scale"], before["bert"][layer]["attention"]["scale"]
    chex.assert_trees_all_equal(found, before)


@pytest.mark.parametrize("attention", ["softmax", "scaling"])
def test_what_has_no_constant_from_data_is_left_as_it_is(attention, tiny):
    model = with_parts(tiny, attention=attention)
    params = jax.device_get(init_params(model))
    chex.assert_trees_all_equal(calibrate(model, params, batch_of(4)), params)


# ------------------------------------------------------------------------------------------------------------- distil


@pytest.mark.parametrize(("hidden", "logit", "falls"), [(1.0, 0.0, "hidden_loss"), (0.0, 1.0, "logit_loss")])
def test_a_student_comes_closer_to_its_teacher(hidden, logit, falls, tiny, tiny_params, toy_split, tmp_path):
    teacher = jax.tree.map(lambda leaf: leaf * 1.0, tiny_params)
    teacher["classifier"]["bias"] = np.array([3.0, -3.0], np.float32)
    before = copy.deepcopy(teacher)
    student = with_parts(tiny, attention="2quad_freediv", hidden_act="quad")
    start = start_student(student, tiny_params)
    params = distill(
        student,
        start,
        tiny,
        teacher,
        toy_split,
        toy_split,
        Schedule(epochs=3, learning_rate=0.01, batch_size=8),
        tmp_path / "stage",
        hidden_weight=hidden,
        logit_weight=logit,
    )
    lines = [json.loads(line) for line in (tmp_path / "stage" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1][falls] < 0.9 * lines[0][falls]
    assert all(line["name"] == "stage" and line["loss"] == pytest.approx(line[falls]) for line in lines)
    assert all(0 <= line["validation_accuracy"] <= 1 for line in lines)
    chex.assert_trees_all_equal(teacher, before)
    chex.assert_trees_all_equal(params["bert"]["embeddings"], start["bert"]["embeddings"])
    for scalar in ("shift", "scale"):
        assert (params["bert"]["layer_0"]["attention"][scalar] != start["bert"]["layer_0"]["attention"][scalar]).all()
