"""What is measured of a model that is not finite everywhere, and what becomes of it."""

import json
import types
from typing import Any

import numpy as np
import pytest

from flaxmpc.convert.configs import Conversion
from flaxmpc.convert.evaluate import evaluate, secure_logits
from flaxmpc.convert.runs import resolve
from flaxmpc.data.batches import Split
from flaxmpc.models import folder as folders
from flaxmpc.models.folder import read_config
from flaxmpc.serve.classify import TextRun
from flaxmpc.serve.private import Logits, plan_bits
from flaxmpc.training import metrics


@pytest.fixture
def diverging(tmp_path, write_classifier):
    """diverging(position) -> a converted model, and a teacher, of 24 positions; not finite from that position on."""

    def make(position: int):
        folder = write_classifier(tmp_path)
        loaded = folders.load(folder)
        loaded.params["bert"]["embeddings"]["position_embeddings"][position:] = 3e38  # their mean overflows
        folders.save(tmp_path / "student", loaded.model, loaded.params, folder)
        words = ["a", "the", "film", "movie", "acted", "very", "beautifully"]
        rows = [f"{a} {b} {mood},{label}" for mood, label in (("good", 1), ("bad", 0)) for a in words for b in words]
        (tmp_path / "data.csv").write_text("\n".join(["sentence,label", *rows]) + "\n")
        config = Conversion(folder, str(tmp_path / "data.csv"), tmp_path / "student", max_length=24)
        (tmp_path / "student" / "recipe.json").write_text(json.dumps(resolve(config)))
        results = {"test_sentences": len(rows), "accuracy": 0.5}
        (tmp_path / "student" / "results.json").write_text(json.dumps(results))
        return tmp_path / "student", folder

    return make


def test_a_model_is_for_the_lengths_at_which_all_is_finite(diverging):
    student, teacher = diverging(16)
    results = evaluate(student, teacher=teacher, ref2k_sentences=4, aby3_sentences=0)
    short, long = results["lengths"]
    assert (short["length"], long["length"]) == (16, 24)
    assert short["finite"] == short["rows"] > 0 == short["joined"]
    assert short["repeated_finite"] == short["repeated"] > 0
    assert short["teacher_agreement"] == 1
    assert short["ref2k_agreement"] > 0.9
    assert (long["finite"], long["joined"], long["rows"]) == (0, 64, 64)
    assert long["teacher_agreement"] == 0  # a row that is not finite has no label
    assert "ref2k_rows" not in long
    assert read_config(student).model_max_length == 16
    card = (student / "README.md").read_text()
    assert "| longest text | 16 tokens |" in card
    assert "| up to 24 | 64 | 64 | 0 | 0.0 % |" in card
    assert "Beyond 16 tokens it diverges" in card
    assert json.loads((student / "results.json").read_text(), parse_constant=pytest.fail) == results


def test_a_model_that_is_finite_nowhere_is_an_error(diverging):
    student, _ = diverging(0)
    with pytest.raises(
        FloatingPointError, match=r"student has logits that are not finite for \d+ of \d+ texts of up to 16"
    ):
        evaluate(student)


def test_the_largest_difference_is_of_finite_rows():
    from flaxmpc.convert.evaluate import _largest_difference

    plain = np.array([[1.0, 2.0], [np.nan, 0.0], [np.inf, 0.0]])
    assert _largest_difference(plain + 0.25, plain) == 0.25


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_length": 10**9}, "recipe.json has max_length 1000000000, as no recipe of `flaxmpc convert` has"),
        ({"data": ["a"]}, r"recipe.json has data \['a'\]"),
        ({"text_columns": "text"}, "recipe.json has text_columns 'text'"),
        ({"label_column": None}, "recipe.json has label_column None"),
    ],
)
def test_a_recipe_that_convert_did_not_write_is_refused(fields, message, tmp_path):
    recipe = {"data": "movie", "max_length": 64, "text_columns": [], "label_column": "label", **fields}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path)


def test_a_text_that_infer_gives_no_answer_to_counts_as_wrong():
    """Though the label of what overflowed may be the right one by chance."""
    plain = np.array([[0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.1, 0.2]], np.float32)
    secret = plain + 0.01
    secret[0] *= 1e7
    secret[2] = [np.nan, 1.0]
    split = Split([[1, 2]] * 4, np.array([0, 1, 0, 1]))
    run = TextRun(range(4), np.ones((4, 2)), np.ones((4, 2)), None)
    cost: Any = object()
    classifier: Any = types.SimpleNamespace(runs=lambda *_: [run], answer=lambda _: Logits(secret, plain, cost))
    ours, theirs, _ = secure_logits(classifier, split, 4)
    np.testing.assert_array_equal(theirs, plain)
    assert np.isfinite(ours).all(-1).tolist() == [False, True, False, True]
    assert metrics.agreement(ours, theirs) == metrics.accuracy(ours, split.labels) == 0.5


def test_a_model_with_a_plan_of_bits_is_measured_by_it(write_classifier, tmp_path):
    norm = {"name": "layer_norm_chebyshev", "low": 0.2, "high": 40.0, "depth": 5}
    folder = write_classifier(tmp_path / "model", layer_norm=norm, num_hidden_layers=1)
    texts = [f"{mood} film {i}" for i in range(24) for mood in ("good", "bad")]
    rows = [f"{text},{int(text.startswith('good'))}" for text in texts]
    (tmp_path / "data.csv").write_text("\n".join(["sentence,label", *rows]) + "\n")
    config = Conversion(folder, str(tmp_path / "data.csv"), folder, max_length=16)
    (folder / "recipe.json").write_text(json.dumps(resolve(config)))
    (folder / "results.json").write_text(json.dumps({"test_sentences": 8, "accuracy": 0.5}))
    without = evaluate(folder, ref2k_sentences=2, aby3_sentences=0)
    assert without["planned"] is False
    plan_bits(folders.load(folder), texts[:3])
    planned = evaluate(folder, ref2k_sentences=2, aby3_sentences=0)
    assert planned["planned"] is True
    assert 0 < planned["ref2k_max_logit_difference"] < 0.1
    assert planned["ref2k_max_logit_difference"] != without["ref2k_max_logit_difference"]
    assert "REF2K (FM64, bits as planned), 2 rows" in (folder / "README.md").read_text()
