import copy
import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc.convert import calibrate
from flaxmpc.convert.distill import start_student
from flaxmpc.convert.finetune import predict
from flaxmpc.data.batches import Batch, Split, batches, encode, movie_sentences
from flaxmpc.models import folder as folders
from flaxmpc.models.base import init_params
from flaxmpc.models.bert import BertForSequenceClassification
from flaxmpc.nn.attention import ATTENTION
from flaxmpc.nn.mask import Mask
from flaxmpc.nn.normalization import CHEBYSHEV, CONSTANT, EXACT

LENGTHS = (16,)

# Of the LayerNorms of two layers.
PLACES = [(layer, place) for layer in range(2) for place in range(2)]
EVERYWHERE: Any = dict.fromkeys(PLACES, CHEBYSHEV)


def model_of(tiny, **changes) -> BertForSequenceClassification:
    config = dataclasses.replace(tiny.config, num_hidden_layers=2, initializer_range=0.3, **changes)
    return BertForSequenceClassification(config)


def first_batch(split: Split, batch_size: int = 64) -> Batch:
    return next(batches(split, batch_size=batch_size, lengths=LENGTHS))


def log_row_means(model, params, batch: Batch) -> list[np.ndarray]:
    """The log of the mean of e^s over the keys of every token's row, (row, head), by layer."""
    inputs = (jnp.asarray(batch.input_ids), jnp.asarray(batch.attention_mask))
    _, states = jax.jit(lambda params: model.apply({"params": params}, *inputs, method="outputs"))(params)
    mask = np.asarray(batch.attention_mask)
    found = []
    for scores in states.scores:
        means = (np.exp(np.asarray(scores, np.float64)) * mask[:, None, None, :]).sum(-1) / mask.sum(-1)[:, None, None]
        found.append(np.log(means).transpose(0, 2, 1)[mask > 0])
    return found


def test_the_keys_bias_takes_over_much_of_what_a_row_sum_did(minilm):
    """On real scores: the sums of their exponentials come together, and near 1, for sentences not seen before too."""
    base = folders.load_pretrained(minilm)
    config = dataclasses.replace(base.model.config, attention="softmax_freediv", num_hidden_layers=2)
    model = BertForSequenceClassification(config)
    start = start_student(model, base.params)
    texts = list(movie_sentences()["validation"]["sentence"])
    split = Split(encode(base.tokenizer, texts[:48], 24).input_ids, np.zeros(48))
    seen, unseen = batches(split, batch_size=24, lengths=(24,))
    found = calibrate.calibrate_attention(model, start, seen)
    for before, after in zip(log_row_means(model, start, unseen), log_row_means(model, found, unseen), strict=True):
        assert after.std(0).mean() < 0.75 * before.std(0).mean()
        assert np.abs(after.mean(0)).mean() < 0.6 < np.abs(before.mean(0)).mean()
    attention, given = found["bert"]["layer_0"]["attention"], start["bert"]["layer_0"]["attention"]
    np.testing.assert_array_equal(attention["query"]["kernel"], given["query"]["kernel"])
    assert np.abs(attention["scale"] - 1.0).mean() < 1.0


def test_softmax_does_not_see_the_keys_bias(tiny, toy_split):
    """So the keys' bias is free for its calibration."""
    model = model_of(tiny)
    params = jax.device_get(init_params(model, seed=5))
    batch = first_batch(toy_split)
    inputs = (jnp.asarray(batch.input_ids), jnp.asarray(batch.attention_mask))
    apply = jax.jit(lambda params: model.apply({"params": params}, *inputs))
    before = apply(params)
    params["bert"]["layer_0"]["attention"]["key"]["bias"] = np.full(16, 3.0, np.float32)
    np.testing.assert_allclose(apply(params), before, atol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "2quad", "2quad_freediv", "scaling"])
def test_only_exponentials_without_a_row_sum_move_their_scores(name):
    assert ATTENTION[name].row_offset(jnp.zeros((1, 2, 3, 3)), Mask.from_tokens(jnp.ones((1, 3)))) is None


def test_variances_are_those_of_every_token_and_no_padding(tiny, toy_split):
    model = model_of(tiny)
    params = init_params(model, seed=1)
    seen = calibrate.variances(model, params, batches(toy_split, batch_size=7, lengths=LENGTHS))
    assert set(seen) == set(PLACES)
    tokens = sum(map(len, toy_split.input_ids))
    assert all(values.shape == (tokens,) and (values > 0).all() for values in seen.values())
    alone = calibrate.variances(model, params, batches(toy_split[:1], batch_size=1, lengths=LENGTHS))
    for place, values in alone.items():
        assert all(np.isclose(seen[place], value, rtol=1e-4).any() for value in values)


def test_ranges_are_cut_around_the_median():
    seen = {(0, 0): np.array([0.01, 1.0, 1.0, 1.0, 500.0]), (0, 1): np.array([0.8, 1.0, 1.5])}
    found = calibrate.ranges(seen)
    assert found == {(0, 0): (pytest.approx(1 / 3), 8.0), (0, 1): (0.8, 1.5)}


def test_ranges_where_the_variances_allow_it(tiny):
    config = model_of(tiny).config
    seen = {place: np.array([0.2, 1.0, 3.0]) for place in PLACES}
    seen[1, 1] = np.array([1e-3, 1.0, 1e4])
    fitted = calibrate.with_calibrated(config, seen, seen, EVERYWHERE)
    first, second = fitted.layer_norms_of(0)
    assert first == second
    assert first.name == "layer_norm_chebyshev"
    assert first.low < 0.2  # pyright: ignore[reportAttributeAccessIssue]
    assert first.high > 3.0  # pyright: ignore[reportAttributeAccessIssue]
    assert fitted.layer_norms_of(1)[1] == EXACT
    assert calibrate.with_calibrated(fitted, seen, seen, EVERYWHERE) == fitted


def test_a_range_that_holds_the_variances_is_kept_and_another_is_found_anew(tiny):
    config = model_of(tiny).config
    seen = {place: np.array([0.2, 1.0, 3.0]) for place in PLACES}
    before: Any = calibrate.with_calibrated(config, seen, seen, EVERYWHERE)
    seen[0, 1] = np.array([0.3, 2.0])
    seen[1, 0] = np.array([0.2, 6.0])
    after: Any = calibrate.with_calibrated(before, seen, seen, EVERYWHERE)
    assert after.layer_norms_of(0) == before.layer_norms_of(0)
    assert after.layer_norms_of(1)[1] == before.layer_norms_of(1)[1]
    assert before.layer_norms_of(1)[0].high < 6.0 < after.layer_norms_of(1)[0].high


def test_constants_are_calibrated_first_and_ranges_later(tiny):
    config, norms = model_of(tiny).config, {place: (CONSTANT, CHEBYSHEV)[place[1]] for place in PLACES}
    seen = {place: np.array([0.2, 1.0, 3.0]) for place in PLACES}
    seen[1, 0] = np.array([4.0])
    start: Any = calibrate.with_norms(config, seen, norms)
    assert [start.layer_norms_of(layer)[1] for layer in range(2)] == [EXACT, EXACT]
    assert start.layer_norms_of(1)[0] == dataclasses.replace(CONSTANT, inverse=0.5)
    other = {place: 2.0 * values for place, values in seen.items()}
    later: Any = calibrate.with_calibrated(start, other, other, norms)
    for layer in range(2):
        assert later.layer_norms_of(layer)[0] == start.layer_norms_of(layer)[0]
        assert later.layer_norms_of(layer)[1].name == "layer_norm_chebyshev"


@pytest.mark.parametrize("far", [0.1, 4.0])
def test_a_layer_norm_is_exact_where_sentences_not_trained_on_leave_its_range(far, tiny):
    config = model_of(tiny).config
    seen = {place: np.array([0.2, 1.0, 3.0]) for place in PLACES}
    held_out = {**seen, (1, 0): np.array([far, 1.0])}
    calibrated = calibrate.with_calibrated(config, seen, seen, EVERYWHERE)
    for start in (config, calibrated):
        found = calibrate.with_calibrated(start, seen, held_out, EVERYWHERE)
        assert found.layer_norms_of(0) == calibrated.layer_norms_of(0)
        assert found.layer_norms_of(1) == (EXACT, calibrated.layer_norms_of(1)[1])


def test_in_training_variances_out_of_their_ranges_do_not_diverge(tiny, toy_split):
    model = model_of(tiny)
    params = init_params(model, seed=1)
    assert calibrate.for_training(model.config).layer_norms_of(0) == (EXACT, EXACT)
    low = dataclasses.replace(CHEBYSHEV, low=1e-6, high=1e-4, depth=7)
    given = dataclasses.replace(model.config, layer_norm=((low, EXACT), (low, low)))
    training = calibrate.for_training(given)
    assert training.layer_norms_of(0)[1] == EXACT
    for config, finite in ((given, False), (training, True)):
        logits = predict(BertForSequenceClassification(config), params, toy_split)
        assert np.isfinite(logits).all() == finite


# ------------------------------------------------------------------------------------------------- r_h

KEYS = np.arange(8) < np.array([8, 5, 2, 1])[:, None]
IDS = (np.random.default_rng(0).integers(1, 40, KEYS.shape) * KEYS).astype(np.int32)


def with_parts(model, **changes):
    return BertForSequenceClassification(dataclasses.replace(model.config, **changes))


def batch_of(rows: int) -> Batch:
    """The four sentences; those from `rows` on only fill up, with one token each."""
    row_mask = (np.arange(4) < rows).astype(np.float32)
    mask = np.where(row_mask[:, None] > 0, KEYS, np.arange(8) == 0).astype(np.int32)
    return Batch(IDS, mask, np.zeros_like(IDS), np.zeros(4, np.int32), row_mask, np.arange(4, dtype=np.int32))


def scores_of(model, params, batch):
    @jax.jit
    def compute(params):
        return model.apply({"params": params}, jnp.array(batch[0]), jnp.array(batch[1]), method="outputs")

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
    found = calibrate.calibrate_attention(model, params, batch)
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
    found = calibrate.calibrate_attention(model, params, batch)
    attention = found["bert"]["layer_0"]["attention"]
    before = np.array(
        row_means(scores_of(model, found, batch)[0], np.asarray(batch.attention_mask), attention["shift"])
    )
    assert before.mean() > 5
    assert 0.95 < (attention["scale"][:, None] * before).mean() < 1.3


def test_rows_that_only_fill_up_do_not_calibrate(student):
    model, params = student
    two = Batch(*(array[:2] for array in batch_of(2)))
    chex.assert_trees_all_close(
        calibrate.calibrate_attention(model, params, batch_of(2)),
        calibrate.calibrate_attention(model, params, two),
        rtol=1e-5,
    )


def test_calibrating_changes_the_constants_alone_and_not_what_was_given(student):
    model, params = student
    before = copy.deepcopy(params)
    found = calibrate.calibrate_attention(model, params, batch_of(4))
    chex.assert_trees_all_equal(params, before)
    for layer in ("layer_0", "layer_1"):
        del found["bert"][layer]["attention"]["scale"], before["bert"][layer]["attention"]["scale"]
    chex.assert_trees_all_equal(found, before)


@pytest.mark.parametrize("attention", ["softmax", "scaling"])
def test_what_has_no_constant_from_data_is_left_as_it_is(attention, tiny):
    model = with_parts(tiny, attention=attention)
    params = jax.device_get(init_params(model))
    chex.assert_trees_all_equal(calibrate.calibrate_attention(model, params, batch_of(4)), params)
