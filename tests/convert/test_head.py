import dataclasses

import jax
import numpy as np
import pytest

from flaxmpc.convert.finetune import predict
from flaxmpc.convert.head import MOST_ERROR, linear_head
from flaxmpc.data.batches import Split
from flaxmpc.models.base import families, init_params
from flaxmpc.models.params import flatten, unflatten

DISTINCT = {family.models[0].__name__: family for family in families()}


def rows(count: int, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    ids = [[2, *rng.integers(4, 40, rng.integers(1, 14)).tolist(), 3] for _ in range(count)]
    return Split(ids, rng.integers(0, 2, count))


def classifier(family, gain: float, **changes):
    """A small classifier whose head is the more linear the smaller `gain` is, the size of what goes into its tanh."""
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    rest = {"vocab_size": 40, "max_position_embeddings": 24, "initializer_range": 0.3, "id2label": tuple("abc")}
    model = family.models[0](family.config(**{**size, **rest, **changes}))
    flat = flatten(jax.device_get(init_params(model, seed=1)))
    rng = np.random.default_rng(0)
    first, second = model.head_matrices
    flat[f"{first}/kernel"] = (gain * rng.normal(size=(16, 16))).astype(np.float32)
    flat[f"{first}/bias"] = (gain * rng.normal(size=16)).astype(np.float32)
    flat[f"{second}/kernel"] = rng.normal(size=(16, 3)).astype(np.float32)
    return model, unflatten(flat)


@pytest.mark.parametrize("name", DISTINCT)
def test_the_head_of_every_family_is_made_linear(name):
    model, params = classifier(DISTINCT[name], 0.02, classifier_activation="tanh")
    held_out = rows(60, 1)
    made, fitted, error = linear_head(model, params, rows(300, 0), held_out)
    assert made.config.classifier_activation.name == "identity"
    assert dataclasses.replace(made.config, classifier_activation="tanh") == model.config
    before, after = (predict(m, p, held_out) for m, p in ((model, params), (made, fitted)))
    off = np.sqrt(np.square(after - before).mean() / before.var(0).mean())
    assert off == pytest.approx(error, rel=0.05, abs=1e-5)
    assert error is not None
    assert error <= MOST_ERROR
    changed = {path for path, leaf in flatten(fitted).items() if not np.array_equal(leaf, flatten(params)[path])}
    assert {path.rpartition("/")[0] for path in changed} == set(model.head_matrices or ())


def test_a_head_that_is_not_nearly_linear_stays():
    model, params = classifier(DISTINCT["BertForSequenceClassification"], 2.0)
    made, same, error = linear_head(model, params, rows(300, 0), rows(60, 1))
    assert error is not None
    assert error > MOST_ERROR
    assert made is model
    assert same is params


def test_a_linear_head_stays():
    model, params = classifier(DISTINCT["BertForSequenceClassification"], 0.02, classifier_activation="identity")
    assert linear_head(model, params, rows(10, 0), rows(10, 1)) == (model, params, None)


def test_rows_that_diverge_have_no_say():
    model, params = classifier(DISTINCT["BertForSequenceClassification"], 0.02)
    flat = flatten(params)
    table = np.array(flat["bert/embeddings/word_embeddings"])
    table[39] = np.nan
    flat["bert/embeddings/word_embeddings"] = table
    poisoned = unflatten(flat)
    few = rows(300, 0)
    clean = Split([[min(id_, 38) for id_ in row] for row in few.input_ids], few.labels)
    bad = Split([[2, 39, 3]] * 5, np.zeros(5, int))
    expected = linear_head(model, poisoned, clean, rows(1, 1) + clean)[1]
    found = linear_head(model, poisoned, clean + bad, clean + bad)[1]
    for path, leaf in flatten(found).items():
        np.testing.assert_allclose(leaf, flatten(expected)[path], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("what", ["all diverge", "all have one answer"])
def test_rows_that_say_nothing_leave_the_head(what):
    model, params = classifier(DISTINCT["BertForSequenceClassification"], 0.02)
    flat = flatten(params)
    _, second = model.head_matrices or ("", "")
    flat[f"{second}/kernel"] = np.full((16, 3), np.nan if what == "all diverge" else 0.0, np.float32)
    params = unflatten(flat)
    assert linear_head(model, params, rows(20, 0), rows(10, 1)) == (model, params, None)
