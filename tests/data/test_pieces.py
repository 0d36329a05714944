import numpy as np
import pytest

from flaxmpc.data.batches import Split
from flaxmpc.data.pieces import pieces

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


def test_the_seed_chooses_and_the_share_counts():
    same, again, other = (pieces(SPLIT, 0.5, seed=seed).input_ids for seed in (3, 3, 4))
    assert len(same) == 4
    assert all(np.array_equal(a, b) for a, b in zip(same, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(same, other, strict=True))
    assert len(pieces(SPLIT, 0.0, seed=0)) == 0


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_cannot_be_is_refused(share):
    with pytest.raises(ValueError, match=r"pieces is .*between 0 and 1"):
        pieces(SPLIT, share, seed=0)
