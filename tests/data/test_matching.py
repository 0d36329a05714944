import numpy as np
import pytest

from flaxmpc.data.batches import Split
from flaxmpc.data.glue import GLUE
from flaxmpc.data.matching import matched, refuse_other_order
from flaxmpc.data.tasks import Task


def task(*id2label, labels=(0, 1, 2, 1)) -> Task:
    split = Split([[1]] * len(labels), np.array(labels, np.int32) % len(id2label))
    return Task("data", split, split, split, id2label, ("accuracy",), ("sentence",), ())


def test_classes_get_the_ids_of_the_models_labels():
    """MNLI's as some published models order them."""
    found = matched(task(*GLUE["mnli"].id2label), ("CONTRADICTION", "ENTAILMENT", "NEUTRAL"), "model")
    assert found.id2label == ("CONTRADICTION", "ENTAILMENT", "NEUTRAL")
    for split in (found.train, found.validation, found.test):
        assert split.labels.tolist() == [1, 2, 0, 2]
        assert split.labels.dtype == np.int32


@pytest.mark.parametrize("theirs", [("Not equivalent", "equivalent"), ("NOT-EQUIVALENT", "Equivalent ")])
def test_case_spaces_underscores_and_hyphens_do_not_count(theirs):
    found = matched(task("not_equivalent", "equivalent"), theirs, "model")
    assert found.train.labels.tolist() == [0, 1, 0, 1]
    found = matched(task("not_equivalent", "equivalent"), theirs[::-1], "model")
    assert found.train.labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "theirs", [("neg", "pos"), ("negative", "neutral"), ("a", "b", "c"), ("negative", "negative"), ("negative",)]
)
def test_other_labels_are_refused_with_both_lists(theirs):
    with pytest.raises(ValueError, match=r"model has the labels .*; data has negative, positive") as error:
        matched(task("negative", "positive"), theirs, "model")
    assert ", ".join(theirs) in str(error.value)


def test_ids_are_the_models_where_either_has_no_names():
    unnamed, named = ("LABEL_0", "LABEL_1"), ("positive", "negative")
    for theirs, ours, names in ((unnamed, named, named), (named, unnamed, named), (unnamed, unnamed, unnamed)):
        found = matched(task(*ours), theirs, "model")
        assert found.id2label == names
        assert found.train.labels.tolist() == [0, 1, 0, 1]


def test_a_regression_has_nothing_to_match():
    found = matched(task("LABEL_0", labels=(0, 0)), ("score",), "model")
    assert found.id2label == ("score",)


def test_a_model_that_is_right_in_another_order_is_refused():
    labels = np.arange(60) % 3
    right = np.eye(3)[labels]
    refuse_other_order(right, labels, "model on data")
    with pytest.raises(ValueError, match=r"model on data: .* right on 20 of 60 rows, in another order of them on 60"):
        refuse_other_order(right[:, [1, 0, 2]], labels, "model on data")
    right[:] = np.nan
    refuse_other_order(right, labels, "model on data")  # right on none in any order


def test_a_model_that_knows_nothing_is_not_refused():
    rng = np.random.default_rng(0)
    for seed in range(20):
        labels = np.random.default_rng(seed).integers(0, 2, 100)
        refuse_other_order(rng.normal(size=(100, 2)), labels, "model on data")
