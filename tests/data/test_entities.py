"""Entities from tags, and their F1: seqeval 1.2.2 gave the values (`f1_score`, its default mode)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxmpc.data.batches import Split, of_tokens
from flaxmpc.data.entities import Span, spans
from flaxmpc.training.metrics import entity_f1, evaluate

NAMES = ("O", "B-person", "I-person", "B-place", "I-place")
# Ids of the tags of some rows, true and found, and F1.
SEQEVAL = [
    ("3211000 43 23433224 430 4203", "3212013 43 23430224 430 4102", 0.764706),
    ("1134003 204 4331 0224040 24143", "2132003 204 4331 0424000 24143", 0.810811),
    ("2320 30430320 31003024 10243031 24", "2110 00430320 31403024 12242041 22", 0.7),
    ("3402312 31001414 324 44334 12003034", "3402412 31001410 324 42334 13113032", 0.714286),
    ("233100 10344 2420 404 244233", "213100 13344 2420 004 244233", 0.875),
    ("02140341 322 01140220 3212 01413142", "01140341 323 11140210 3232 01433042", 0.711111),
]


def split_of(rows):
    """Rows of words with these tags, a token in between that has none."""
    labels = [np.array([each for tag in row for each in (-100, tag)], np.int32) for row in rows]
    return Split([np.zeros(len(row), np.int32) for row in labels], of_tokens(labels))


def logits_for(rows):
    return np.eye(len(NAMES), dtype=np.float32)[[tag for row in rows for tag in row]]


def test_what_begins_an_entity_and_what_goes_on_with_it():
    tags = ["I-person", "I-person", "B-person", "I-place", "O", "I-place", "B-place", "B-place", "x", "x", "O"]
    assert spans(tags) == [
        Span("person", 0, 2),
        Span("person", 2, 3),
        Span("place", 3, 4),
        Span("place", 5, 6),
        Span("place", 6, 7),
        Span("place", 7, 8),
        Span("x", 8, 10),
    ]
    assert spans([]) == spans(["O", "O"]) == []
    assert spans(["B-creative-work", "I-creative-work"]) == [Span("creative-work", 0, 2)]


@given(st.lists(st.sampled_from(NAMES)))
def test_entities_are_apart_in_order_and_leave_out_no_tag(tags):
    found = spans(tags)
    covered = [place for span in found for place in range(span.start, span.end)]
    assert covered == [place for place, tag in enumerate(tags) if tag != "O"]
    for kind, start, end in found:
        assert {tag[2:] for tag in tags[start:end]} == {kind}
        assert all(tag[0] == "I" for tag in tags[start + 1 : end])


@pytest.mark.parametrize(("true", "found", "f1"), SEQEVAL)
def test_f1_is_that_of_seqeval(true, found, f1):
    true, found = ([[int(tag) for tag in row] for row in rows.split()] for rows in (true, found))
    assert entity_f1(logits_for(found), split_of(true), NAMES) == pytest.approx(f1, abs=1e-6)


def test_an_entity_does_not_go_on_in_the_next_row():
    assert entity_f1(logits_for([[1], [2]]), split_of([[1], [2]]), NAMES) == 1
    assert entity_f1(logits_for([[1, 2]]), split_of([[1, 2]]), NAMES) == 1
    assert entity_f1(logits_for([[1], [0]]), split_of([[1], [2]]), NAMES) == pytest.approx(2 / 3)


def test_no_entity_is_found_by_logits_that_are_not_finite():
    true = [[1, 2, 0, 3]]
    broken = np.where(np.arange(4)[:, None] == 3, np.nan, logits_for(true))
    figures = evaluate(("entity_f1", "accuracy"), broken, split_of(true), NAMES)
    assert figures == {"entity_f1": pytest.approx(1 / 2), "accuracy": 3 / 4}
    assert entity_f1(logits_for([[0, 0]]), split_of([[0, 0]]), NAMES) == 0
