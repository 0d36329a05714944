import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from flaxmpc.convert import stage0
from flaxmpc.convert.calibrate import Ranges, variances
from flaxmpc.convert.distill import start_student
from flaxmpc.convert.finetune import apply_with_states, in_order
from flaxmpc.convert.smaller import sizes, smaller_params
from flaxmpc.convert.stage0 import layer_by_layer
from flaxmpc.data.batches import Split
from flaxmpc.models.base import families, init_params
from flaxmpc.models.folder import LoadedModel
from flaxmpc.models.params import flatten, unflatten
from flaxmpc.training.fit import Schedule

DISTINCT = {family.models[0].__name__: family for family in families()}
PARTS = {"attention": "2quad_freediv", "hidden_act": "quad"}


def rows(count: int, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    ids = [[2, *rng.integers(5, 40, rng.integers(1, 14)).tolist(), 3] for _ in range(count)]
    return Split(ids, rng.integers(0, 2, count))


SOLVED = Schedule(epochs=0, learning_rate=1e-3)


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


def started(
    student,
    params,
    teacher,
    layers,
    split: Split,
    folder: Path,
    schedule: Schedule = SOLVED,
    ranges: Ranges | None = None,
):
    return layer_by_layer(student, params, teacher, layers, split, ranges, schedule, folder, seed=0)


@pytest.mark.parametrize("name", [f"{name}ForSequenceClassification" for name in ("Bert", "DistilBert", "MPNet")])
def test_every_layer_comes_nearer_to_its_teachers(name, tmp_path):
    """Solved for; and nearer still where it is then trained alone."""
    teacher = teacher_of(name)
    student = teacher.model.clone(config=dataclasses.replace(teacher.model.config, **PARTS))
    start, some, held_out = start_student(student, teacher.params), rows(300, 0), rows(60, 1)
    solved = started(student, start, teacher, range(2), some, tmp_path / "solved")
    before, after = (distances(student, params, teacher, held_out) for params in (start, solved))
    assert all(b < 0.75 * a for a, b in zip(before, after, strict=True))
    changed = {path for path, leaf in flatten(solved).items() if not np.array_equal(leaf, flatten(start)[path])}
    assert all("/layer_" in path and "layer_norm" not in path for path in changed)
    if name.startswith("MPNet"):
        schedule = Schedule(epochs=4, learning_rate=3e-3, batch_size=16)
        trained = started(student, start, teacher, range(2), some, tmp_path / "trained", schedule)
        last = distances(student, trained, teacher, held_out)
        assert all(b < 0.9 * a for a, b in zip(after, last, strict=True))


def moved(params, by: float):
    rng = np.random.default_rng(2)
    flat = flatten(params)
    return unflatten({path: leaf + by * rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in flat.items()})


def test_a_student_that_is_its_teacher_stays_it(tmp_path):
    teacher = teacher_of("BertForSequenceClassification")
    some = rows(120, 0)
    for path, leaf in flatten(started(teacher.model, teacher.params, teacher, range(2), some, tmp_path)).items():
        np.testing.assert_allclose(leaf, flatten(teacher.params)[path], atol=1e-3)


def test_a_smaller_student(tmp_path):
    teacher = teacher_of("BertForSequenceClassification", 4)
    own, layers, some = teacher.model.config, (1, 3), rows(300, 0)
    fields = sizes(own, layers, 1, 12)
    config = dataclasses.replace(own, **fields, **PARTS)
    student = teacher.model.clone(config=config)
    first = next(in_order(some, most=22))
    start = start_student(student, smaller_params(teacher.model, teacher.params, config, layers, [first]))
    found = started(student, start, teacher, layers, some, tmp_path)
    before, after = (distances(student, params, teacher, rows(60, 1), layers) for params in (start, found))
    assert all(b < 0.8 * a for a, b in zip(before, after, strict=True))


def test_a_layer_that_is_trained_alone_stays_in_its_ranges(tmp_path):
    """What it gives does not tell how large what its LayerNorms get is."""
    teacher = teacher_of("BertForSequenceClassification", 1)
    student = teacher.model.clone(config=dataclasses.replace(teacher.model.config, **PARTS))
    start, some = start_student(student, teacher.params), rows(100, 0)
    seen = variances(student, start, in_order(some, most=22))
    wanted = {place: (1.3 * float(np.median(values)), 9 * float(np.median(values))) for place, values in seen.items()}
    schedule, far = Schedule(epochs=8, learning_rate=1e-2, batch_size=16), []
    for ranges in (None, wanted):
        params = started(student, start, teacher, range(1), some, tmp_path / str(bool(ranges)), schedule, ranges)
        found = variances(student, params, in_order(some, most=22))
        logs = [np.log(found[place] / np.clip(found[place], *range_)) for place, range_ in wanted.items()]
        far.append(sum(np.square(log).mean() for log in logs))
    assert far[1] < 0.3 * far[0], far


def test_a_killed_run_goes_on_after_the_last_layer_that_was_done(tmp_path, monkeypatch):
    teacher = teacher_of("BertForSequenceClassification", 3)
    student = teacher.model.clone(config=dataclasses.replace(teacher.model.config, **PARTS))
    start, some = start_student(student, teacher.params), rows(60, 0)
    schedule = Schedule(epochs=1, learning_rate=1e-3, batch_size=16)
    whole = flatten(started(student, start, teacher, range(3), some, tmp_path / "whole", schedule))
    solved, names = stage0.solved, []

    def killed(*args):
        names.append(args[-1])
        if len(names) == 2:
            raise KeyboardInterrupt
        return solved(*args)

    monkeypatch.setattr(stage0, "solved", killed)
    with pytest.raises(KeyboardInterrupt):
        started(student, start, teacher, range(3), some, tmp_path / "parts", schedule)
    found = flatten(started(student, start, teacher, range(3), some, tmp_path / "parts", schedule))
    assert names == ["layer_0", "layer_1", "layer_1", "layer_2"]
    for path, leaf in whole.items():
        np.testing.assert_array_equal(found[path], leaf)
    for path in (tmp_path / "parts" / "checkpoints").glob("*/default/**/*"):
        if path.is_file():
            path.write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"is not as it was written, and no other .*: remove \S*parts, and what"):
        started(student, start, teacher, range(3), some, tmp_path / "parts", schedule)
