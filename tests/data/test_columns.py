import pytest

from flaxmpc.data.columns import require, text_columns, texts
from flaxmpc.data.tables import Table


def table(**columns) -> Table:
    return Table("a.csv", columns, lines=[2, 3])


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        (("id", "text"), (), ("text",)),
        (("text", "sentence"), (), ("sentence",)),
        (("sentence", "question", "label"), (), ("question", "sentence")),
        (("sentence1", "sentence"), (), ("sentence",)),
        (("text", "review"), ("review",), ("review",)),
        (("text",), ["b", "a"], ("b", "a")),
    ],
)
def test_the_columns_are_those_given_or_the_first_usual_ones(names, given, expected):
    assert text_columns(table(**{name: ["a", "b"] for name in names}), given) == expected


def test_no_usual_name_and_too_many_are_refused():
    with pytest.raises(
        ValueError, match=r"a\.csv has no column of text that is named as usual \(sentence1\+sentence2 or"
    ):
        text_columns(table(review=["a", "b"]))
    with pytest.raises(ValueError, match="a row has one text or two, not 3: a, b, c"):
        text_columns(table(), ("a", "b", "c"))


def test_what_a_table_lacks_is_named():
    require(table(text=["a", "b"]), ("text",))
    with pytest.raises(ValueError, match=r"a\.csv has no column b, c\. Its columns are text$"):
        require(table(text=["a", "b"]), ("b", "text", "c"))


def test_texts_are_single_or_pairs():
    columns = {"one": ["a", "b"], "other": ["c", "d"]}
    assert texts(table(**columns), ("one",)) == ["a", "b"]
    assert texts(table(**columns), ("other", "one")) == [("c", "a"), ("d", "b")]


@pytest.mark.parametrize(
    ("value", "message"), [(None, "is missing"), (3, "is 3, not a string"), ("", "is empty"), (" \n", "is empty")]
)
def test_what_is_no_text_is_refused_with_its_row(value, message):
    with pytest.raises(ValueError, match=rf"^a\.csv, line 3: other {message}$"):
        texts(table(one=["a", "b"], other=["c", value]), ("one", "other"))


def test_empty_texts_are_counted_where_they_may_be():
    warnings = []
    assert texts(table(text=["", "a"]), ("text",), warnings) == ["", "a"]
    assert warnings == ["a.csv: 1 texts are empty"]
    with pytest.raises(ValueError, match="line 2: text is missing"):
        texts(table(text=[None, "a"]), ("text",), warnings)
