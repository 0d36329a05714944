import dataclasses

import jax
import numpy as np
import pytest

from flaxmpc.convert.distill import start_student
from flaxmpc.convert.finetune import apply_with_states, in_order
from flaxmpc.convert.smaller import sizes, smaller_params
from flaxmpc.convert.solve import solved
from flaxmpc.data.batches import Split
from flaxmpc.models.base import families, init_params
from flaxmpc.models.folder import LoadedModel
from flaxmpc.models.params import flatten, unflatten

DISTINCT = {family.models[0].__name__: family for family in families()}
PARTS = {"attention": "2quad_freediv", "hidden_act": "quad"}


def rows(count: int, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    ids = [[2, *rng.integers(5, 40, rng.integers(1, 14)).tolist(), 3] for _ in range(count)]
    return Split(ids, rng.integers(0, 2, count))


def teacher_of(name: str, layers: int = 2) -> LoadedModel:
    """A small model whose layers all move their state."""
    family = DISTINCT[name]
    size = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 24}
    rest = {"vocab_size": 40, "max_position_embeddings": 24, "initializer_range": 0.5, "id2label": tuple("ab")}
    model = family.models[0](family.config(**size, **rest))
    return LoadedModel(model, moved(jax.device_get(init_params(model, seed=1)), 0.3), None, None)  # pyright: ignore[reportArgumentType]


def distances(student, params, teacher: LoadedModel, split: Split, layers=None) -> list[float]:
    """The mean squared distance of the student's hidden states from the teacher's, layer by layer."""
    found = []
    for batch in in_order(split, batch_size=len(split), most=22):
        theirs, ours = (
            apply_with_states(m)(p, batch).intermediates.hidden_states
            for m, p in ((teacher.model, teacher.params), (student, params))
        )
        valid = (batch.attention_mask * batch.row_mask[:, None]) > 0
        chosen = theirs if layers is None else [theirs[layer] for layer in layers]
        pairs = zip(ours, chosen, strict=True)
        found.append([float(np.square(np.asarray(a)[valid] - np.asarray(b)[valid]).mean()) for a, b in pairs])
    (only,) = found
    return only


@pytest.mark.parametrize("name", [f"{name}ForSequenceClassification" for name in ("Bert", "DistilBert", "MPNet")])
def test_every_layer_comes_nearer_to_its_teachers(name):
    teacher = teacher_of(name)
    student = teacher.model.clone(config=dataclasses.replace(teacher.model.config, **PARTS))
    start = start_student(student, teacher.params)
    found = solved(student, start, teacher, range(2), list(in_order(rows(300, 0), most=22)))
    held_out = rows(60, 1)
    before, after = (distances(student, params, teacher, held_out) for params in (start, found))
    assert all(b < 0.75 * a for a, b in zip(before, after, strict=True))
    changed = {path for path, leaf in flatten(found).items() if not np.array_equal(leaf, flatten(start)[path])}
    assert all("/layer_" in path and "layer_norm" not in path for path in changed)


def moved(params, by: float):
    rng = np.random.default_rng(2)
    flat = flatten(params)
    return unflatten({path: leaf + by * rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in flat.items()})


def test_a_student_that_is_its_teacher_stays_it_and_padding_counts_for_nothing():
    """Nor does what only fills a batch up."""
    teacher = teacher_of("BertForSequenceClassification")
    some = rows(120, 0)
    one, many = (list(in_order(some, batch_size=size, most=22)) for size in (120, 50))
    for path, leaf in flatten(solved(teacher.model, teacher.params, teacher, range(2), one)).items():
        np.testing.assert_allclose(leaf, flatten(teacher.params)[path], atol=1e-3)
    start = moved(teacher.params, 0.05)
    whole, parted = (flatten(solved(teacher.model, start, teacher, range(2), batches)) for batches in (one, many))
    for path, leaf in whole.items():
        np.testing.assert_allclose(leaf, parted[path], atol=5e-3)


def test_a_smaller_student():
    teacher = teacher_of("BertForSequenceClassification", 4)
    own, layers, some = teacher.model.config, (1, 3), rows(300, 0)
    fields = sizes(own, layers, 1, 12)
    config = dataclasses.replace(own, **fields, **PARTS)
    student = teacher.model.clone(config=config)
    batches = list(in_order(some, most=22))
    start = start_student(student, smaller_params(teacher.model, teacher.params, config, layers, batches[:1]))
    found = solved(student, start, teacher, layers, batches)
    before, after = (distances(student, params, teacher, rows(60, 1), layers) for params in (start, found))
    assert all(b < 0.8 * a for a, b in zip(before, after, strict=True))


def test_what_diverges_is_refused():
    teacher = teacher_of("BertForSequenceClassification")
    student = teacher.model.clone(config=dataclasses.replace(teacher.model.config, **PARTS))
    flat = dict(flatten(start_student(student, teacher.params)))
    flat["bert/layer_0/intermediate/bias"] = np.full(24, 1e30, np.float32)
    said = r"^layer 0 of the student can't be solved for: what output gets is not finite on some text$"
    with pytest.raises(FloatingPointError, match=said):
        solved(student, unflatten(flat), teacher, range(2), list(in_order(rows(20, 0), most=22)))
