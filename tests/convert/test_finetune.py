import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc.convert.finetune import Evaluate, classification_loss, computing, epoch_batches, learn, predict
from flaxmpc.training.fit import Schedule
from flaxmpc.training.metrics import accuracy


def test_predictions_are_in_the_order_of_the_sentences(tiny, tiny_params, toy_split):
    logits = predict(tiny, tiny_params, toy_split, batch_size=8)
    apply = jax.jit(tiny.apply)
    padded = [jnp.array([row + [0] * (16 - len(row))]) for row in toy_split.input_ids[:6]]
    one_by_one = [apply({"params": tiny_params}, row, jnp.sign(row))[0] for row in padded]
    np.testing.assert_allclose(logits[:6], one_by_one, atol=1e-5)
    backwards = predict(tiny, tiny_params, toy_split[::-1], batch_size=7)
    np.testing.assert_allclose(backwards[::-1], logits, atol=1e-5)


def test_predictions_see_the_types_of_the_tokens(tiny, tiny_params, toy_split):
    pairs = dataclasses.replace(toy_split, token_type_ids=[np.arange(len(row)) > 1 for row in toy_split.input_ids])
    row, types = jnp.array([pairs.input_ids[0]]), jnp.array([pairs.token_type_ids[0]], jnp.int32)
    expected = tiny.apply({"params": tiny_params}, row, token_type_ids=types)[0]
    found = predict(tiny, tiny_params, pairs, batch_size=8)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    assert np.abs(found - predict(tiny, tiny_params, toy_split, batch_size=8)).max() > 1e-3


def test_a_classifier_learns_and_keeps_its_embeddings(tiny, tiny_params, toy_split, tmp_path):
    schedule = Schedule(epochs=4, learning_rate=0.02, batch_size=8)
    before = accuracy(predict(tiny, tiny_params, toy_split), toy_split.labels)
    evaluate = Evaluate(tiny, toy_split, ("accuracy",))
    params = learn(tiny, tiny_params, toy_split, evaluate, schedule, tmp_path, classification_loss(tiny), seed=1)
    after = accuracy(predict(tiny, params, toy_split), toy_split.labels)
    assert before < 0.8
    assert after > 0.9
    same = jax.tree.map(np.array_equal, params["bert"]["embeddings"], tiny_params["bert"]["embeddings"])
    assert all(jax.tree.leaves(same))


def test_a_classifier_learns_in_bfloat16_and_few_lengths(tiny, tiny_params, toy_split, tmp_path):
    schedule = Schedule(epochs=4, learning_rate=0.02, batch_size=8, padded_lengths=(8,), dtype="bfloat16")
    model = computing(tiny, schedule)
    padded = {batch.input_ids.shape[1] for batch in epoch_batches(toy_split, schedule, 0, 24)(0)}
    assert padded == {8, 24}
    batch = next(epoch_batches(toy_split, schedule, 0, 24)(0))
    key = jax.random.key(0)
    exact, coarse = (jax.jit(classification_loss(each))(tiny_params, batch, key)[0] for each in (tiny, model))
    assert coarse.dtype == jnp.float32
    assert float(coarse) == pytest.approx(float(exact), rel=0.03)
    assert float(coarse) != float(exact)
    evaluate = Evaluate(tiny, toy_split, ("accuracy",))
    params = learn(tiny, tiny_params, toy_split, evaluate, schedule, tmp_path, classification_loss(model), seed=1)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert accuracy(predict(tiny, params, toy_split), toy_split.labels) > 0.85


def test_dropout_acts_while_fine_tuning_and_is_the_seeds(tiny, tiny_params, toy_split, tmp_path):
    wet = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, hidden_dropout_prob=0.5))
    schedule = Schedule(epochs=1, learning_rate=0.01, batch_size=20)

    def trained(model, name, seed=0):
        evaluate = Evaluate(model, toy_split, ("accuracy",))
        params = learn(
            model, tiny_params, toy_split, evaluate, schedule, tmp_path / name, classification_loss(model), seed=seed
        )
        return params["classifier"]["kernel"]

    first = trained(wet, "first")
    assert np.array_equal(first, trained(wet, "again"))
    assert not np.array_equal(first, trained(tiny, "dry"))
    assert not np.array_equal(first, trained(wet, "other seed", seed=1))
