import re

import numpy as np
import pytest

from flaxmpc.data.labels import REGRESSION, read_labels
from flaxmpc.data.tables import Table


def table(labels, names=None, source="train.csv") -> Table:
    return Table(source, {"label": labels}, range(2, 2 + len(labels)), {"label": names} if names else {})


def ids(labels, names=None, warnings=None):
    """The ids, or numbers, of a training table alone, and the names of the classes."""
    found, id2label = read_labels({"train": table(labels)}, "label", names, [] if warnings is None else warnings)
    return found["train"].tolist(), id2label


@pytest.mark.parametrize(
    ("labels", "expected", "id2label"),
    [
        (["None", "some", "None"], [0, 1, 0], ("None", "some")),
        (["null", "N/A", "-"], [2, 1, 0], ("-", "N/A", "null")),
        ([" bad", "good\t", "bad"], [0, 1, 0], ("bad", "good")),
        (["1", "0", "+1", "01"], [1, 0, 1, 1], ("LABEL_0", "LABEL_1")),
        ([True, False, True], [1, 0, 1], ("LABEL_0", "LABEL_1")),
        (["True", "False", "True"], [1, 0, 1], ("False", "True")),
        # What int() and float() read as numbers too.
        (["1_2", "1_3", "1_2"], [0, 1, 0], ("1_2", "1_3")),
        (["१", "२", "१"], [0, 1, 0], ("१", "२")),
        (["0x1", "0x2", "0x1"], [0, 1, 0], ("0x1", "0x2")),
        (["é", "e", "è"], [2, 0, 1], ("e", "è", "é")),
    ],
)
def test_labels_and_their_classes(labels, expected, id2label):
    assert ids(labels) == (expected, id2label)


@pytest.mark.parametrize("labels", [["0.5", "1", "2"], [0.5, 1, 2.0], [" .5 ", "1.", "2e0"], ["-0.5", "-1", "1e-3"]])
def test_one_number_that_is_not_whole_makes_a_regression(labels):
    warnings = []
    found, id2label = ids(labels, warnings=warnings)
    assert id2label == REGRESSION
    np.testing.assert_array_equal(np.float32(found), np.asarray(labels, np.float32))
    assert warnings == []


def test_whole_numbers_with_a_point_are_numbers_with_a_warning():
    warnings = []
    assert ids(["1.0", "0.0", "5.0"], warnings=warnings) == ([1.0, 0.0, 5.0], REGRESSION)
    assert warnings == [
        "label: whole numbers with a decimal point are numbers to learn, not classes; ids have no point"
    ]
    warnings.clear()
    assert ids(["1.0", "0", "5.000"], REGRESSION, warnings) == ([1.0, 0.0, 5.0], REGRESSION)
    assert warnings == []


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, None], "line 4: label is missing or no label: None"),
        (["0", "", "1"], "line 3: label is missing or no label: ''"),
        (["0", "\u2028 \t", "1"], "line 3: label is missing or no label: '\\u2028 \\t'"),
        ([0, 1, float("nan")], "line 4: label is missing or no label: nan"),
        (["good", "bad", "NaN"], "line 4: label is missing or no label: 'NaN'"),
        ([0, 1, [[1]]], "line 4: label is missing or no label: [[1]]"),
        ([0, 1, b"1"], "line 4: label is missing or no label: b'1'"),
        ([0, 1, -1], "line 4: label -1 is negative"),
        ([1, -1, 1], "line 3: label -1 is negative"),
        ([0, 1, True], "line 4: label True is not a number, as most labels are"),
        ([False, True, 1], "line 4: label 1 is not true or false, as most labels are"),
        ([0.5, 1.5, True], "line 4: label True is not a number, as most labels are"),
        (["good", "bad", True], "line 4: label True is not a name, as most labels are"),
        (["0", "1", "1.0"], "line 4: label 1.0 has a decimal point and others have none, but all are whole"),
        ([0, 1, 1.0], "line 4: label 1.0 has a decimal point and others have none"),
        (["good", "Good", "bad"], "line 3: label 'Good' is the same as another label but for capitals"),
        (["so so", "bad", "so  so"], "line 4: label 'so  so' is the same as another label but for capitals, spaces"),
        (
            ["\u00e9", "e", "e\u0301"],
            "line 4: label 'e\u0301' is the same as another label but for capitals, spaces or",
        ),
        ([0.5, 1.5, float("-inf")], "line 4: label -inf is not finite"),
        ([0.5, 1.5, "Infinity"], "line 4: label inf is not finite"),
        ([0.5, 1.5, "9" * 5000], "line 4: label inf is not finite"),
        ([0.5, 1.5, "1e999"], "line 4: label inf is not finite"),
        ([0.5, 1.5, 1e39], "line 4: label 1e+39 is too large for float32"),
        ([0.5, 1.5, 10**400], "is too large for float32"),
        ([0, 1, 10**400], "but no row of class 2: ids are 0, 1, 2, ... without gaps"),
        ([0, 1, 2**63], "has labels up to 9223372036854775808 but no row of class 2"),
        ([1, 2, 3], "has labels up to 3 but no row of class 0"),
        ([True, True], "has labels up to 1 but no row of class 0"),
        (["one", " one", "one"], "all labels of label for training are one: there is nothing to learn"),
    ],
)
def test_what_is_no_label_is_refused_with_its_row(labels, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        ids(labels)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def test_a_label_that_only_another_split_has_is_named_there():
    for labels, other, message in (
        (["good", "bad"], "Good", "test.csv, line 2: label 'Good' is the same as another label but for capitals"),
        (["0", "1"], "0.0", "test.csv, line 2: label 0.0 has a decimal point"),
        ([0, 1], True, "test.csv, line 2: label True is not a number"),
        ([*map(str, np.arange(50) + 0.5)], "x", "test.csv, line 2: label 'x' is not a number"),
    ):
        found = {"train": table(labels), "test": table([other], source="test.csv")}
        with pytest.raises(ValueError, match=re.escape(message)):
            read_labels(found, "label", None, [])


def test_of_many_classes_a_message_names_the_first():
    found = {"train": table([f"a text {i:04}" for i in range(1000)]), "test": table(["b"], source="test.csv")}
    with pytest.raises(ValueError, match=r"none of the classes: a text 0000, .*, a text 0019 and 980 more$"):
        read_labels(found, "label", None, [])


# ------------------------------------------------------------------------------------------- classes that have names


def test_names_of_classes_count_and_not_their_order():
    known = ("entailment", "neutral", "contradiction")
    turned = ("contradiction", "entailment", "neutral")
    found = {"train": table([0, 1, 2, 0], turned), "test": table([2, 0], known, "test.csv")}
    labels, id2label = read_labels(found, "label", known, [])
    assert id2label == known
    assert labels["train"].tolist() == [2, 0, 1, 2]
    assert labels["test"].tolist() == [2, 0]


def test_names_that_are_the_ids_say_nothing():
    assert read_labels({"train": table([1, 0], ("0", "1"))}, "label", ("no", "yes"), [])[0]["train"].tolist() == [1, 0]
    labels, id2label = read_labels({"train": table([1, 0], ("0", "1"))}, "label", None, [])
    assert (labels["train"].tolist(), id2label) == ([1, 0], ("0", "1"))


@pytest.mark.parametrize(
    ("labels", "names", "known", "message"),
    [
        ([0, 1], ("no", "maybe"), ("no", "yes"), "line 3: label 'maybe' is none of the classes: no, yes"),
        ([0, 1, 2], ("no", "yes"), None, "line 4: label 2 is not a name, as most labels are"),
        ([0, 1, -1], ("no", "yes"), None, "line 4: label -1 is negative (-1 often marks a split whose labels"),
        ([0, 1, None], ("no", "yes"), None, "line 4: label is missing"),
        (["Yes", "no", "no"], None, ("no", "yes"), "line 2: label 'Yes' is none of the classes: no, yes"),
    ],
)
def test_what_the_names_do_not_have_is_refused(labels, names, known, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_labels({"train": table(labels, names)}, "label", known, [])
