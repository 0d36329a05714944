import dataclasses

import jax
import numpy as np
import pytest

from flaxmpc.convert.finetune import apply_with_states, in_order
from flaxmpc.convert.smaller import layers_kept, sizes, smaller_params
from flaxmpc.models import folder  # noqa: F401  it registers the families
from flaxmpc.models.base import families, param_shapes
from flaxmpc.models.params import flatten, unflatten

FAMILIES = {family.config.model_type: family for family in families()}
DISTINCT = {family.prefix: family.config.model_type for family in families()}
SHAPE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
SMALLER = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 10}


def teacher_of(name: str, **changes):
    """A model and random parameters, which take less time than its own initialisation."""
    family = FAMILIES[name]
    model = family.models[0](family.config(**{**SHAPE, **changes}, vocab_size=40, max_position_embeddings=24))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), param_shapes(model))
    return model, params


def student_of(model, params, split, **changes):
    """The student's model, and the parameters that it starts from."""
    layers, fields = sizes_of(model.config, **changes)
    config = dataclasses.replace(model.config, **fields)
    return model.clone(config=config), smaller_params(model, params, config, layers, in_order(split))


def sizes_of(own, num_hidden_layers=None, kept_layers=(), num_attention_heads=None, intermediate_size=None):
    """The layers that are kept, and the fields of the student's config."""
    layers = layers_kept(own.num_hidden_layers, num_hidden_layers, kept_layers)
    return layers, sizes(own, layers, num_attention_heads, intermediate_size)


def test_layers_are_spread_evenly_and_end_with_the_last():
    assert layers_kept(6, 3) == (1, 3, 5)
    assert layers_kept(12, 4) == (2, 5, 8, 11)
    assert layers_kept(0, 0) == ()
    for own in range(1, 30):
        assert layers_kept(own, own) == tuple(range(own))
        for wanted in range(1, own + 1):
            kept = layers_kept(own, wanted)
            assert kept[-1] == own - 1
            steps = np.diff([-1, *kept])
            assert set(steps) <= {own // wanted, -(-own // wanted)}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 0, "num_hidden_layers is 0: the teacher has 3, and its student has 1 to 3"),
        ("num_hidden_layers", 4, "num_hidden_layers is 4: the teacher has 3, and its student has 1 to 3"),
        ("kept_layers", (0, 3), "kept_layers is 0, 3: the teacher's are 0 to 2, each once, ascending"),
        ("kept_layers", (1, 0), "kept_layers is 1, 0: the teacher's are 0 to 2, each once, ascending"),
        ("kept_layers", (1, 1), "kept_layers is 1, 1: the teacher's are 0 to 2, each once, ascending"),
        ("kept_layers", (-1,), "kept_layers is -1: the teacher's are 0 to 2, each once, ascending"),
        ("num_attention_heads", -4, "num_attention_heads is -4: the teacher has 4, and its student has 1 to 4"),
        ("num_attention_heads", 3, r"num_attention_heads is 3, .* 4 heads are merged .*: a divisor, 1, 2, 4"),
        ("intermediate_size", 25, "intermediate_size is 25: the teacher has 24, and its student has 1 to 24"),
    ],
)
def test_sizes_that_no_student_can_have_are_refused(field, value, message):
    config = teacher_of("bert")[0].config
    with pytest.raises(ValueError, match=f"^{message}$"):
        sizes_of(config, **{field: value})


def test_a_students_layer_norms_are_those_of_its_layers():
    model, _ = teacher_of("bert")
    norms = ("layer_norm", {"name": "layer_norm_constant", "inverse": 2.0}, "layer_norm")
    config = dataclasses.replace(model.config, layer_norm=norms)
    _, fields = sizes_of(config, num_hidden_layers=2)
    student = dataclasses.replace(config, **fields)
    assert [student.layer_norms_of(i) for i in range(2)] == [config.layer_norms_of(0), config.layer_norms_of(2)]


@pytest.mark.parametrize("name", DISTINCT.values())
def test_a_student_of_every_family_has_what_it_needs(name, toy_split):
    model, params = teacher_of(name)
    same, as_it_was = student_of(model, params, toy_split)
    assert same.config == dataclasses.replace(model.config, layer_norm=same.config.layer_norm)
    jax.tree.map(np.testing.assert_array_equal, as_it_was, params)
    student, start = student_of(model, params, toy_split, **SMALLER)
    assert all(getattr(student.config, field) == size for field, size in SMALLER.items())
    assert jax.tree.map(np.shape, start) == jax.tree.map(np.shape, param_shapes(student))


@pytest.mark.parametrize(
    ("asked", "layers"), [({"num_hidden_layers": 2}, (0, 2)), ({"kept_layers": (0, 1)}, (0, 1)), ({}, (0, 1, 2))]
)
def test_a_student_of_fewer_layers_starts_with_theirs(toy_split, asked, layers):
    model, params = teacher_of("bert")
    _, start = student_of(model, params, toy_split, **asked)
    for i, layer in enumerate(layers):
        jax.tree.map(np.testing.assert_array_equal, start["bert"][f"layer_{i}"], params["bert"][f"layer_{layer}"])
    assert f"layer_{len(layers)}" not in start["bert"]
    jax.tree.map(np.testing.assert_array_equal, start["classifier"], params["classifier"])


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_merged_heads_have_the_sum_of_their_scores(name, toy_split):
    model, params = teacher_of(name, num_hidden_layers=1)
    student, start = student_of(model, params, toy_split, num_attention_heads=2)
    (batch, *_) = in_order(toy_split)
    (theirs, *_), (ours, *_) = (
        apply_with_states(m)(p, batch).intermediates.scores for m, p in ((model, params), (student, start))
    )
    if name == "mpnet":  # the bias is a number for every head: its mean, which no root divides
        bias = model.bind({"params": params}).encoder.position_bias(theirs.shape[-1])
        theirs = theirs - bias
        ours = ours - bias.reshape(1, 2, 2, *bias.shape[2:]).mean(2)
    expected = theirs.reshape(len(theirs), 2, 2, *theirs.shape[2:]).sum(2) / np.sqrt(2)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_features_that_never_move_are_not_missed(toy_split):
    model, params = teacher_of("bert", num_hidden_layers=1)
    flat = flatten(params)
    rng = np.random.default_rng(0)
    still = rng.permutation(24)[:14]  # those that stay are the 10 others
    flat["bert/layer_0/intermediate/kernel"][:, still] = 0
    student, start = student_of(model, unflatten(flat), toy_split, intermediate_size=10)
    for batch in in_order(toy_split):
        theirs, ours = (apply_with_states(m)(p, batch) for m, p in ((model, unflatten(flat)), (student, start)))
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-4)
        np.testing.assert_allclose(
            ours.intermediates.hidden_states[-1], theirs.intermediates.hidden_states[-1], atol=1e-3
        )


def test_features_are_chosen_by_what_they_move(toy_split):
    """Half of the features with the best choice are nearer to all of them than any other half that is tried."""
    model, params = teacher_of("bert", num_hidden_layers=1)
    (batch, *_) = in_order(toy_split)
    student, start = student_of(model, params, toy_split, intermediate_size=12)
    theirs = apply_with_states(model)(params, batch).intermediates.hidden_states[0]
    chosen = np.square(apply_with_states(student)(start, batch).intermediates.hidden_states[0] - theirs).mean()
    rng = np.random.default_rng(0)
    flat = flatten(params)
    for _ in range(5):
        some = np.sort(rng.permutation(24)[:12])
        others = flatten(start)
        layer = "bert/layer_0"
        others[f"{layer}/intermediate/kernel"] = flat[f"{layer}/intermediate/kernel"][:, some]
        others[f"{layer}/intermediate/bias"] = flat[f"{layer}/intermediate/bias"][some]
        others[f"{layer}/output/kernel"] = flat[f"{layer}/output/kernel"][some]
        others[f"{layer}/output/bias"] = flat[f"{layer}/output/bias"]
        found = apply_with_states(student)(unflatten(others), batch).intermediates.hidden_states[0]
        assert np.square(found - theirs).mean() > chosen
