import copy
import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

from flaxmpc.convert.distill import Stage, Teacher, distillation_loss, start_student
from flaxmpc.convert.finetune import Evaluate, epoch_batches, learn
from flaxmpc.models.base import init_params
from flaxmpc.models.bert import BertConfig, BertForSequenceClassification


def with_parts(model, **changes):
    return BertForSequenceClassification(dataclasses.replace(model.config, **changes))


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


# ------------------------------------------------------------------------------------------------------------- distil


SHORT = Stage(epochs=3, learning_rate=0.01, batch_size=8)


def stage_of(student, start, model, teacher, split, folder, **changes):
    """One stage; returns the parameters and the lines of its metrics."""
    stage = dataclasses.replace(SHORT, **changes)
    outputs = Teacher(model, teacher, split, with_states=True, with_scores=True, memory=1e9)
    evaluate = Evaluate(student, split, ("accuracy",))
    loss = distillation_loss(student, stage, RANGES, name=folder.name)
    params = learn(student, start, split, evaluate, stage, folder, loss, prepare=outputs)
    return params, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_no_loss_has_is_refused(value):
    with pytest.raises(ValueError, match=f"^range_weight of a stage is {value:g}, not a finite number from 0$"):
        dataclasses.replace(SHORT, range_weight=value)


RANGES = {(0, 0): (0.5, 1.0), (0, 1): (0.5, 1.0)}


@pytest.mark.parametrize("falls", ["hidden", "score", "logit", "label", "range"])
def test_every_loss_falls_where_it_counts(falls, tiny, tiny_params, toy_split, tmp_path):
    teacher = jax.tree.map(lambda leaf: leaf * 1.0, tiny_params)
    teacher["classifier"]["bias"] = np.array([3.0, -3.0], np.float32)
    before = copy.deepcopy(teacher)
    student = with_parts(tiny, attention="2quad_freediv", hidden_act="quad")
    start = start_student(student, tiny_params)
    weights = {f"{falls}_weight": 1.0} if falls != "range" else {"range_weight": 1.0, "logit_weight": 1e-6}
    params, lines = stage_of(student, start, tiny, teacher, toy_split, tmp_path / "stage", **weights)
    assert lines[-1][f"{falls}_loss"] < 0.95 * lines[0][f"{falls}_loss"]
    assert all(line["name"] == "stage" for line in lines)
    assert all(line["loss"] == pytest.approx(line[f"{falls}_loss"], abs=1e-4) for line in lines)
    assert all(0 <= line["validation_accuracy"] <= 1 for line in lines)
    chex.assert_trees_all_equal(teacher, before)
    chex.assert_trees_all_equal(params["bert"]["embeddings"], start["bert"]["embeddings"])
    if falls in ("hidden", "logit"):
        for scalar in ("shift", "scale"):
            assert (
                params["bert"]["layer_0"]["attention"][scalar] != start["bert"]["layer_0"]["attention"][scalar]
            ).all()


def test_the_teachers_outputs_are_the_same_kept_or_not(tiny, tiny_params, toy_split):
    kept, anew = (
        Teacher(tiny, tiny_params, toy_split, with_states=True, with_scores=True, memory=memory) for memory in (1e9, 0)
    )
    assert (kept.kept, anew.kept) == (True, False)
    for batch in epoch_batches(toy_split, SHORT, seed=3)(1):
        rows, tokens = batch.row_mask > 0, batch.attention_mask * batch.row_mask[:, None] > 0
        (_, ours, our_states), (_, theirs, their_states) = kept(batch), anew(batch)
        np.testing.assert_allclose(ours[rows], np.asarray(theirs)[rows], atol=1e-5)
        assert our_states is not None
        assert their_states is not None
        for a, b in zip(jax.tree.leaves(our_states), jax.tree.leaves(their_states), strict=True):
            assert a.shape == b.shape
            mask = tokens if a.ndim == 3 else tokens[:, None, :, None] & tokens[:, None, None, :]
            mask = np.broadcast_to(mask[..., None] if a.ndim == 3 else mask, a.shape)
            np.testing.assert_allclose(a[mask], np.asarray(b)[mask], rtol=1e-3, atol=1e-5)  # kept as float16


def test_on_an_accelerator_the_teachers_outputs_stay_there(tiny, tiny_params, toy_split, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    teacher = Teacher(tiny, tiny_params, toy_split, with_states=True, with_scores=False, memory=1e9)
    targets = teacher(next(epoch_batches(toy_split, SHORT, seed=3)(1)))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((targets.logits, targets.states)))


def test_a_student_of_fewer_layers_is_given_theirs(toy_split):
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24)
    model = BertForSequenceClassification(config)
    params = jax.device_get(init_params(model, seed=1))
    batch = next(epoch_batches(toy_split, SHORT, seed=0)(0))
    tokens = (batch.attention_mask * batch.row_mask[:, None] > 0)[..., None]
    for memory in (1e9, 0):
        asked = {"with_states": True, "with_scores": True, "memory": memory}
        whole, some = (
            Teacher(model, params, toy_split, **asked, layers=layers)(batch).states for layers in (None, (1, 3))
        )
        assert whole is not None
        assert some is not None
        assert (len(some.hidden_states), len(some.scores)) == (2, 2)
        for ours, theirs in ((0, 1), (1, 3)):
            pairs = (some.hidden_states[ours], whole.hidden_states[theirs]), (some.scores[ours], whole.scores[theirs])
            for one, other in pairs:
                np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
        np.testing.assert_array_equal(some.embeddings * tokens, whole.embeddings * tokens)


def test_what_no_loss_asks_for_is_not_kept(tiny, tiny_params, toy_split):
    batch = next(epoch_batches(toy_split, SHORT, seed=0)(0))
    for memory in (1e9, 0):
        states = Teacher(tiny, tiny_params, toy_split, with_states=True, with_scores=False, memory=memory)(batch).states
        assert states is not None
        assert states.scores == ()
        none = Teacher(tiny, tiny_params, toy_split, with_states=False, with_scores=False, memory=memory)(batch)
        assert none.states is None
        assert none.logits.shape == (8, 2)
