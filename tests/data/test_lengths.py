import numpy as np
import pytest

from flaxmpc.data.batches import Split, encode
from flaxmpc.data.lengths import JOINED, bucketed, repeated


def split_of(tokenizer, texts):
    ids, types, _ = encode(tokenizer, texts, 64)
    return Split(ids, np.ones(len(texts), np.int32), types, texts)


SENTENCES = ["a film", "a gripping film of two hours", *["good"] * 70, "word " * 30]


@pytest.mark.parametrize("pairs", [False, True])
def test_every_bucket_has_rows_of_its_lengths(pairs, tokenizer):
    texts = [(text, "good") for text in SENTENCES] if pairs else SENTENCES
    found = bucketed(split_of(tokenizer, texts), tokenizer, (16, 32, 64))
    assert list(found) == [16, 32, 64]
    low = 0
    for high, (rows, joined) in found.items():
        sizes = [len(row) for row in rows.input_ids]
        assert low < min(sizes) <= max(sizes) <= high
        assert joined == (0 if high == 16 else JOINED - (1 if len(rows) > joined else 0))
        assert (rows.token_type_ids is not None) == pairs
        assert len(rows) == (72 if high == 16 else JOINED)
        low = high


def test_rows_of_the_test_set_go_first(tokenizer):
    long = [f"{i} " + "word " * 25 for i in range(100)]
    rows, joined = bucketed(split_of(tokenizer, long), tokenizer, (16, 32))[32]
    assert (len(rows), joined) == (100, 0)
    rows, joined = bucketed(split_of(tokenizer, long), tokenizer, (16, 32))[16]
    assert (len(rows), joined) == (0, 0)  # nothing is cut to be short


def test_the_same_rows_every_time(tokenizer):
    split = split_of(tokenizer, SENTENCES)
    one, other = (bucketed(split, tokenizer, (16, 32))[32][0].input_ids for _ in range(2))
    assert [row.tolist() for row in one] == [row.tolist() for row in other]


def test_a_word_is_repeated_to_the_end(tokenizer):
    rows = repeated(split_of(tokenizer, SENTENCES), tokenizer, 32)
    assert len(rows) == 8
    for row in rows.input_ids:
        assert len(row) == 32
        assert len(set(row[1:-1].tolist())) == 1
