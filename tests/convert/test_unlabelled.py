import numpy as np
import pytest

from flaxmpc.convert.data import Split
from flaxmpc.convert.unlabelled import joined, pieces

CLS, SEP = 1, 2
SENTENCES = [np.array([CLS, *range(10 * i, 10 * i + n), SEP]) for i, n in enumerate((9, 1, 3, 8, 5, 7, 2, 9), 1)]
SPLIT = Split(SENTENCES, np.arange(8))


def test_pieces_are_spans_of_one_sentence():
    found = pieces(SPLIT, 1.0, seed=0)
    for piece, label in zip(found.input_ids, found.labels, strict=True):
        inner = piece[1:-1]
        assert (piece[0], piece[-1]) == (CLS, SEP)
        assert 1 <= len(inner) <= 6
        assert (np.diff(inner) == 1).all()
        assert inner[0] // 10 == inner[-1] // 10 == label + 1  # all of the row whose label it has
    assert sorted(found.labels) == list(range(8))


def test_every_length_and_every_place_is_taken():
    long = Split([np.array([CLS, *range(10, 22), SEP])] * 2000, np.zeros(2000))
    found = pieces(long, 1.0, seed=0).input_ids
    lengths = np.array([len(piece) - 2 for piece in found])
    assert np.bincount(lengths).tolist()[0] == 0
    assert (np.bincount(lengths)[1:] > 250).all()
    assert {int(piece[1]) for piece in found if len(piece) == 3} == set(range(10, 22))


def test_a_pair_keeps_a_span_of_each_sentence_and_its_types():
    pair = np.array([CLS, 10, 11, 12, SEP, 20, 21, 22, 23, 24, 25, 26, 27, SEP])
    types = np.array([0] * 5 + [1] * 9)
    found = pieces(Split([pair] * 50, np.zeros(50), [types] * 50), 1.0, seed=0)
    assert found.token_type_ids is not None
    for piece, own in zip(found.input_ids, found.token_type_ids, strict=True):
        first, second = piece[1 : list(piece).index(SEP)], piece[list(piece).index(SEP) + 1 : -1]
        assert len(first) >= 1
        assert (first // 10 == 1).all()
        assert 1 <= len(second) <= 6
        assert (second // 10 == 2).all()
        np.testing.assert_array_equal(own, [0] * (len(first) + 2) + [1] * (len(second) + 1))


def test_joined_is_the_start_of_one_sentence_and_the_rest_of_another():
    found = joined(SPLIT, 40.0, seed=0)
    assert len(found) == 320
    places = set()
    for text, label in zip(found.input_ids, found.labels, strict=True):
        inner = text[1:-1]
        assert (text[0], text[-1]) == (CLS, SEP)
        assert SEP not in inner
        sources = inner // 10
        change = np.flatnonzero(np.diff(sources))
        assert len(change) <= 1
        assert 1 <= len(inner) <= max(len(SENTENCES[source - 1]) - 2 for source in {*sources, label + 1})
        head, rest = np.split(inner, change + 1) if len(change) else (inner, inner[:0])
        assert (np.diff(head) == 1).all()
        if len(rest):
            assert sources[0] == label + 1
            assert head[0] % 10 == 0  # a start
            assert rest[-1] == SENTENCES[sources[-1] - 1][-2]  # an end
            assert (np.diff(rest) == 1).all()
            places.add((len(head) > len(rest), len(head) < len(rest)))
    assert len(places) == 3  # cut early, late and in the middle


def test_a_pair_is_joined_sentence_by_sentence_with_its_types():
    one = np.array([CLS, 10, 11, 12, SEP, 20, 21, 22, 23, SEP])
    other = np.array([CLS, 30, 31, SEP, 40, 41, 42, 43, 44, 45, SEP])
    types = [np.array([0] * 5 + [1] * 5), np.array([0] * 4 + [1] * 7)]
    found = joined(Split([one, other], np.arange(2), types), 30.0, seed=0)
    assert found.token_type_ids is not None
    for text, own in zip(found.input_ids, found.token_type_ids, strict=True):
        middle = list(text).index(SEP)
        assert set(text[1:middle] // 10) <= {1, 3}
        assert set(text[middle + 1 : -1] // 10) <= {2, 4}
        np.testing.assert_array_equal(own, [0] * (middle + 1) + [1] * (len(text) - middle - 1))


@pytest.mark.parametrize("make", [pieces, joined])
def test_the_seed_chooses_and_the_share_counts(make):
    same, again, other = (make(SPLIT, 0.5, seed=seed).input_ids for seed in (3, 3, 4))
    assert len(same) == 4
    assert all(np.array_equal(a, b) for a, b in zip(same, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(same, other, strict=True))
    assert len(make(SPLIT, 0.0, seed=0)) == 0


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_of_pieces_that_cannot_be_is_refused(share):
    with pytest.raises(ValueError, match=r"pieces is .*between 0 and 1"):
        pieces(SPLIT, share, seed=0)


@pytest.mark.parametrize("share", [-0.1, float("inf"), float("nan")])
def test_a_share_of_joined_sentences_that_cannot_be_is_refused(share):
    with pytest.raises(ValueError, match=r"joined is .*0 or more"):
        joined(SPLIT, share, seed=0)
