import json

import numpy as np
import pytest

from flaxmpc.data.batches import Text
from flaxmpc.models.bert import BertConfig, BertForSequenceClassification
from flaxmpc.secure import cost as costs
from flaxmpc.serve.answers import LABELS, ONE_LABEL, VALUE, Read, head, predict

COST = costs.Cost.from_profile(costs.Config(), costs.Profile(((0, 0),) * 3, {}), 1.0, 0.0)


def model(labels, problem_type=None):
    return BertForSequenceClassification(BertConfig(id2label=tuple("abcdef"[:labels]), problem_type=problem_type))


def answer(logits, problem_type=None, plain=None, text: Text = "good"):
    plain = None if plain is None else np.array(plain, np.float32)
    read = Read(text, None, None)  # what stands where in it is not looked at
    return predict(read, np.array(logits, np.float32), plain, model(len(logits), problem_type), False, COST)


@pytest.mark.parametrize(
    ("labels", "problem_type", "kind"),
    [
        (2, None, ONE_LABEL),
        (3, "single_label_classification", ONE_LABEL),
        (1, None, VALUE),
        (1, "regression", VALUE),
        (1, "single_label_classification", VALUE),  # its softmax would be 1, whatever the logit
        (3, "multi_label_classification", LABELS),
        (1, "multi_label_classification", LABELS),
    ],
)
def test_what_a_head_means(labels, problem_type, kind):
    assert head(model(labels, problem_type)) is kind


def test_a_regression_of_several_values_is_refused():
    with pytest.raises(ValueError, match="a regression has one value, but this model has 3 labels"):
        head(model(3, "regression"))


def test_one_label_of_several():
    found = answer([0.0, 2.0, 1.0], plain=[0.01, 2.0, 1.0])
    assert found.as_dict() == {
        "text": "good",
        "truncated": False,
        "label": "b",
        "score": pytest.approx(0.6652409, abs=1e-6),
        "logits": [0.0, 2.0, 1.0],
        "logits_plaintext": pytest.approx([0.01, 2.0, 1.0]),
        "difference": pytest.approx(0.01),
    }
    assert found.difference == pytest.approx(0.01)
    assert ONE_LABEL.cells(found) == ("b", "0.665")


def test_a_set_of_labels_has_a_probability_each():
    found = answer([0.0, 2.0, -1000.0, 1000.0], "multi_label_classification")
    assert found.labels == ("b", "d")  # those above 0.5: 0 is not
    assert found.probabilities == {"a": 0.5, "b": pytest.approx(0.880797), "c": 0.0, "d": 1.0}
    assert (found.label, found.score, found.value) == (None, None, None)
    assert LABELS.cells(found) == ("b, d", "a 0.500, b 0.881, c 0.000, d 1.000")
    assert LABELS.cells(answer([-1.0], "multi_label_classification"))[0] == "none"


def test_a_regression_has_a_value_and_no_label():
    found = answer([3.25], "regression", plain=[3.3])
    assert found.as_dict() == {
        "text": "good",
        "truncated": False,
        "value": 3.25,
        "logits": [3.25],
        "logits_plaintext": pytest.approx([3.3]),
        "difference": pytest.approx(0.05),
    }
    assert VALUE.cells(found) == ("3.2500",)


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_no_answer(problem_type, bad):
    for found in (answer([0.1, 0.2], problem_type, plain=[0.1, bad]), answer([bad, 0.2], problem_type)):
        assert (found.error or "").startswith("the model diverges on this text")
        assert found.as_dict().keys() == {"text", "truncated", "error"}
        json.dumps(found.as_dict(), allow_nan=False)
        assert np.isnan(found.difference)


def test_logits_far_from_those_in_the_clear_are_no_answer():
    assert answer([0.5, 1.0], plain=[0.6, 0.9]).error is None  # few bits: noise, but not far
    assert answer([520.0], plain=[500.0]).error is None  # a regression of large values
    for logits, plain in (([5.0, 1.0], [0.6, 0.9]), ([700.0], [500.0])):
        assert (answer(logits, plain=plain).error or "").startswith("the logits on shares are off by ")


def test_a_pair_is_two_texts_in_a_record():
    record = answer([0.0, 1.0], text=("a film", "a movie")).as_dict()
    assert (record["text1"], record["text2"]) == ("a film", "a movie")
    assert "text" not in record
