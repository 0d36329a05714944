import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from flaxmpc import secure
from flaxmpc.convert import conversion as converting
from flaxmpc.convert import search as searching
from flaxmpc.convert.budget import choose
from flaxmpc.convert.calibrate import variances
from flaxmpc.convert.configs import Conversion
from flaxmpc.convert.conversion import convert
from flaxmpc.convert.distill import Stage, start_student
from flaxmpc.convert.finetune import apply_with_states, in_order, predict
from flaxmpc.convert.search import (
    NORM_PLACES,
    REFERENCE,
    PartNames,
    near_teacher,
    neighbours,
    norm_of,
    options_for,
    part_costs,
    part_losses,
    with_parts,
)
from flaxmpc.data.batches import Split
from flaxmpc.models import folder as folders
from flaxmpc.nn.normalization import CHEBYSHEV, CONSTANT

NONE = Stage(epochs=0, learning_rate=1.0)
WORDS = ["a", "the", "film", "movie", "gripping", "tedious", "good", "bad"]


@pytest.fixture
def few(monkeypatch):
    """Few parts, so that there is little to compile."""
    monkeypatch.setattr(searching, "ATTENTIONS", ("2quad_freediv",))
    monkeypatch.setattr(searching, "ACTS", ("quad", "identity"))


@pytest.fixture(scope="module")
def teacher(write_classifier, tmp_path_factory):
    own = {"attention": "softmax", "hidden_act": "gelu", "layer_norm": "layer_norm", "model_max_length": 16}
    return write_classifier(tmp_path_factory.mktemp("teacher"), **own)


@pytest.fixture(scope="module")
def loaded(teacher):
    return folders.load(teacher)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    ids = [[2, *rng.integers(5, 18, rng.integers(1, 13)).tolist(), 3] for _ in range(40)]
    return Split(ids, np.arange(40) % 2)


@pytest.fixture(scope="module")
def seen(loaded, rows):
    return variances(loaded.model, loaded.params, in_order(rows, most=16))


def test_its_teachers_own_parts_lose_nothing_and_training_makes_others_lose_less(loaded, seen, rows, few):
    options = options_for(loaded.model.config, range(2))
    assert options[0, "attention"] == ("softmax", "2quad_freediv")
    untrained, trained = (
        part_losses(loaded, range(2), seen, options, rows, rows, seed=0, steps=steps) for steps in (1, 60)
    )
    for where, names in options.items():
        assert set(trained[where]) == set(names)
        for own in ("softmax", "gelu", "layer_norm_chebyshev"):
            assert trained[where].get(own, 0.0) == 0.0
    others = [(where, name) for where, own in trained.items() for name in own if own[name]]
    assert len(others) == 2 * (1 + 2 + 1) + 1, "the last LayerNorm is no constant"
    fell = [trained[where][name] < untrained[where][name] for where, name in others]
    assert np.mean(fell) > 0.7


def test_a_loss_is_that_of_the_teacher_with_this_part(loaded, seen, rows, few):
    own = loaded.model.config
    options = options_for(own, range(2))
    losses = part_losses(loaded, range(2), seen, options, rows, rows, seed=0, steps=0)
    theirs = predict(loaded.model, loaded.params, rows)
    constant = [norm_of("layer_norm_constant", seen[layer, 0]) for layer in range(2)]
    for layer in range(2):
        acts = tuple("quad" if i == layer else "gelu" for i in range(2))
        norms = tuple((constant[i] if i == layer else "layer_norm", "layer_norm") for i in range(2))
        for where, fields in (
            ((layer, "activation"), {"hidden_act": acts}),
            ((layer, "after_attention"), {"layer_norm": norms}),
        ):
            changed = loaded.model.clone(config=dataclasses.replace(own, **fields))
            off = np.square(predict(changed, loaded.params, rows) - theirs).mean() / theirs.var(0).mean()
            name = "quad" if where[1] == "activation" else "layer_norm_constant"
            assert losses[where][name] == pytest.approx(off, rel=1e-3)


def test_costs_are_of_the_places_that_a_part_may_have(loaded, seen, few):
    """What all layers cost together is the sum, where every layer has the same part: no state changes its unit."""
    every = options_for(loaded.model.config, range(2))
    options = {where: names for where, names in every.items() if where[1] == "activation"}
    parties = secure.InProcess("ABY3")

    def of(model):
        return searching.request_cost(model, 16, parties).rounds

    costs = part_costs(loaded.model, seen, options, of)
    for where, own in costs.items():
        assert own[REFERENCE[where[1]]] == 0.0
    plain = dataclasses.replace(loaded.model.config, attention="softmax", hidden_act="gelu", layer_norm="layer_norm")

    def total(changed):
        parts = {where: REFERENCE[where[1]] for where in every} | changed
        return of(loaded.model.clone(config=with_parts(plain, parts, seen)))

    base = total({})
    for name in ("gelu", "identity"):
        both = {(layer, "activation"): name for layer in range(2)}
        assert total(both) - base == pytest.approx(sum(costs[where][name] for where in both), abs=1)


def conversion(teacher, tmp_path, **changes) -> Conversion:
    rng = np.random.default_rng(0)
    texts = {" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(90)}
    data = tmp_path / "data.csv"
    rows = [f"{text},{('negative', 'positive')[i % 2]}" for i, text in enumerate(sorted(texts))]
    data.write_text("\n".join(["sentence,label", *rows]) + "\n")
    fields = {"stage1": NONE, "stage2": NONE, "max_length": 16, "aby3_sentences": 0, **changes}
    return Conversion(teacher, str(data), tmp_path / "own", **fields)


def test_a_student_for_a_budget(teacher, tmp_path, few, monkeypatch):
    monkeypatch.setattr(searching, "ACTS", ("quad",))
    monkeypatch.setattr(searching, "STEPS", 2)
    config = conversion(teacher, tmp_path, budget="rounds=150", num_hidden_layers=1)
    least = (
        r"the cheapest parts take [\d.]+ rounds \(16 tokens, ABY3\): a smaller student takes less, see --num-hidden-"
    )
    with pytest.raises(ValueError, match=f"^the budget is 1 rounds, and {least}"):
        convert(dataclasses.replace(config, out=tmp_path / "none", budget="rounds=1"))
    convert(config)
    kept = json.loads((tmp_path / "own.run" / "search.json").read_text())
    chosen = kept["chosen"]["parts"]
    assert kept["front"][0]["cost"] <= kept["chosen"]["cost"] <= 150 < kept["front"][-1]["cost"]
    assert kept["chosen"]["loss"] >= kept["front"][-1]["loss"] == 0.0, "the dearest is the teacher's"
    made = folders.load(config.out).model.config
    assert [made.attention_of(0).name] == chosen["attention"]
    assert [made.hidden_act_of(0).name] == chosen["activation"]
    assert json.loads((config.out / "recipe.json").read_text())["budget"] == "rounds=150"
    with monkeypatch.context() as patch:  # what stage 0 gave is not trained towards other states again
        patch.setattr(converting, "_searched", lambda *_: PartNames.read(kept, 1, "damaged"))
        patch.setattr(converting, "near_teacher", None)
        convert(dataclasses.replace(config, out=tmp_path / "both", least_squares_rows=20))
    (tmp_path / "own.run" / "search.json").write_text('{"chosen": {"parts": {"attention": ["softmax"]}}}')
    (config.out / "recipe.json").unlink()
    with pytest.raises(ValueError, match=r"search\.json is damaged: remove it, and the parts are searched again$"):
        convert(config)


@pytest.mark.parametrize("field", ["attention", "activation", "layer_norm", "layers_sharing_scores"])
def test_a_budget_and_a_part_are_refused_together(tmp_path, field):
    value = 2 if field == "layers_sharing_scores" else "softmax"
    with pytest.raises(ValueError, match=f"^a budget chooses the parts of every layer: leave {field} out, or the bud"):
        conversion(tmp_path / "teacher", tmp_path, **{field: value}, budget="wan=20s")


def test_no_two_layers_in_a_row_are_without_a_root_after_the_feed_forward():
    rng = np.random.default_rng(0)
    for _ in range(20):
        places = [(layer, field) for layer in range(6) for field in NORM_PLACES]
        losses = {where: {CHEBYSHEV.name: 1.0, CONSTANT.name: rng.uniform(0, 1.2)} for where in places}
        costs = {where: {CHEBYSHEV.name: 0.0, CONSTANT.name: -16.7} for where in places}
        found = choose(losses, costs, math.inf, neighbours(6))
        assert found is not None
        after = [found.parts[layer, "after_feed_forward"] == CONSTANT.name for layer in range(6)]
        assert not any(a and b for a, b in itertools.pairwise(after))
        assert any(after)


def test_layers_that_were_trained_alone_are_near_their_teachers(loaded, seen, rows):
    """A student without roots diverges as it starts; its last layer keeps one, or nobody would see that."""
    assert options_for(loaded.model.config, range(2))[1, "after_feed_forward"] == ("layer_norm_chebyshev",)
    norms = ((norm_of("layer_norm_constant", seen[0, 0]), norm_of("layer_norm_constant", seen[0, 1])), "layer_norm")
    parts = {"attention": "scaling", "hidden_act": "quad", "layer_norm": norms}
    student = loaded.model.clone(config=dataclasses.replace(loaded.model.config, **parts))
    start = start_student(student, loaded.params)

    def distance(params) -> float:
        (batch, *_) = in_order(rows, most=16)
        theirs, ours = (apply_with_states(m)(p, batch) for m, p in ((loaded.model, loaded.params), (student, params)))
        tokens = batch.attention_mask[..., None]
        pairs = zip(ours.intermediates.hidden_states, theirs.intermediates.hidden_states, strict=True)
        return float(sum(np.square((a - b) * tokens).sum() for a, b in pairs))

    found = near_teacher(student, start, loaded, range(2), rows, seed=0, steps=60)
    assert distance(found) < 0.7 * distance(start)
    embeddings = [params["bert"]["embeddings"]["word_embeddings"] for params in (start, found)]
    np.testing.assert_array_equal(*embeddings)
