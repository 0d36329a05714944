import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from flaxmpc.data.batches import SPLITS, Batch, Split, batches, collate, encode, movie_sentences, plan, split_of

LENGTHS = (8, 16)


@pytest.fixture(scope="module")
def movies():
    return movie_sentences()


def numbered(sizes) -> Split:
    """Rows of these sizes, no two alike; each row's label is its place, and its types are 1 in the second half."""
    ids = [[100 + i] * size for i, size in enumerate(sizes)]
    types = [[int(2 * place >= size) for place in range(size)] for size in sizes]
    return Split(ids, np.arange(len(ids)), types, [str(row) for row in ids])


SIZES = np.random.default_rng(0).integers(1, 17, 23)


# ----------------------------------------------------------------------------------------------- the shipped sentences


def test_the_shipped_sentences_are_whole(movies):
    assert {split: len(movies[split]) for split in movies} == {"train": 8470, "validation": 1116, "test": 1019}
    labels = np.concatenate([movies[split]["label"] for split in SPLITS])
    assert len(labels) == 10_605
    assert labels.mean() == pytest.approx(0.494, abs=5e-4)
    assert movies["train"].features["label"].names == ["negative", "positive"]


def test_a_label_is_the_sign_of_the_rating(movies):
    for split in SPLITS:
        rating = np.asarray(movies[split]["rating"])
        assert ((rating > 0) == np.asarray(movies[split]["label"])).all()
        assert np.abs(rating).max() <= 4


def test_sentences_are_text_of_one_line(movies):
    for split in SPLITS:
        assert all(text == text.strip() and text and "\n" not in text for text in movies[split]["sentence"])


def test_no_sentence_stands_in_two_splits(movies):
    texts = {split: set(movies[split]["sentence"]) for split in SPLITS}
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]


@pytest.mark.parametrize(
    ("sentence", "split"),
    [
        ("A gripping, beautifully acted film.", "train"),
        ("Offers that rare combination of entertainment and education.", "validation"),
        (
            "Not for everyone, but for those with whom it will connect, it's a nice departure from standard "
            "moviegoing fare.",
            "test",
        ),
    ],
)
def test_the_split_of_a_sentence_is_fixed(sentence, split):
    assert split_of(sentence) == split
    assert split_of(f"  {sentence}\n") == split


def test_the_split_of_a_pair_is_of_both_its_sentences():
    found = {split_of(("The film.", f"It is number {i}.")) for i in range(100)}
    assert found == set(SPLITS)
    assert split_of(("a", "b")) == split_of("a\tb")


# ------------------------------------------------------------------------------------------------------------- splits


def test_a_split_is_sliced_in_all_its_columns():
    split = numbered(SIZES)
    assert split.token_type_ids is not None
    assert split.texts is not None
    for rows in (slice(2, 9, 3), [5, 2, 8], np.arange(23) % 7 == 2):
        places = np.arange(23)[rows]
        part = split[rows]
        assert part.labels.tolist() == places.tolist()
        assert part.input_ids == [split.input_ids[i] for i in places]
        assert part.token_type_ids == [split.token_type_ids[i] for i in places]
        assert part.texts == [split.texts[i] for i in places]
    bare = Split(split.input_ids, split.labels)[:3]
    assert len(bare) == 3
    assert bare.token_type_ids is bare.texts is None


def test_splits_are_added_row_after_row():
    split = numbered(SIZES)
    for both in (split[:5] + split[5:], split + split[:0]):
        assert both.input_ids == split.input_ids
        assert both.token_type_ids == split.token_type_ids
        assert both.labels.tolist() == split.labels.tolist()
        assert both.texts is None
    assert (Split(split.input_ids, split.labels) + split).token_type_ids is None


def test_a_split_has_a_label_for_every_row():
    with pytest.raises(ValueError, match="2 rows of input_ids, but 3 of labels"):
        Split([[1], [2]], np.arange(3))
    with pytest.raises(ValueError, match="2 rows of input_ids, but 1 of token_type_ids"):
        Split([[1], [2]], np.arange(2), [[0]])


# ------------------------------------------------------------------------------------------------------------ batches


@hypothesis.given(
    sizes=st.lists(st.integers(1, 16), max_size=40),
    lengths=st.sets(st.integers(1, 15), max_size=4),
    batch_size=st.integers(1, 7),
    seed=st.none() | st.integers(0, 99) | st.tuples(st.integers(0, 9), st.integers(0, 9)),
    regression=st.booleans(),
)
def test_batches_hold_every_row_once_and_whole(sizes, lengths, batch_size, seed, regression):
    lengths = (*sorted(lengths), 16)
    split = numbered(sizes)
    assert split.token_type_ids is not None
    split = Split(split.input_ids, split.labels.astype(float if regression else int), split.token_type_ids)
    seen = {}
    for batch in batches(split, batch_size=batch_size, lengths=lengths, pad_token_id=9, seed=seed):
        length = batch.input_ids.shape[1]
        assert length in lengths
        for i in range(batch_size):
            tokens, mask, types = batch.input_ids[i], batch.attention_mask[i], batch.token_type_ids[i]
            size = mask.sum()
            assert (mask == (np.arange(length) < size)).all()
            if not batch.row_mask[i]:
                assert (tokens == batch.input_ids[0]).all()
                assert (mask == batch.attention_mask[0]).all()
                assert (types == batch.token_type_ids[0]).all()
                continue
            assert length == next(enough for enough in lengths if size <= enough)
            assert (tokens[size:] == 9).all()
            assert not types[size:].any()
            assert batch.label[i] not in seen
            assert split.labels[batch.place[i]] == batch.label[i]
            seen[batch.label[i]] = tokens[:size].tolist(), types[:size].tolist()
    assert seen == dict(enumerate(zip(split.input_ids, numbered(sizes).token_type_ids or [], strict=True)))


@hypothesis.given(sizes=st.lists(st.integers(1, 16), max_size=40), seed=st.integers(0, 99))
def test_every_seed_gives_equally_many_batches_of_each_length(sizes, seed):
    split = numbered(sizes)
    one, other = (plan(split, batch_size=4, lengths=LENGTHS, seed=s) for s in (None, seed))
    assert sorted((members.length, len(members.rows)) for members in one) == sorted(
        (members.length, len(members.rows)) for members in other
    )


def test_batches_are_those_of_the_plan():
    split = numbered(SIZES)
    made = [collate(split, rows, batch_size=4) for rows in plan(split, batch_size=4, lengths=LENGTHS, seed=1)]
    for one, other in zip(made, batches(split, batch_size=4, lengths=LENGTHS, seed=1), strict=True):
        for column in Batch._fields:
            np.testing.assert_array_equal(getattr(one, column), getattr(other, column))


def test_a_sentence_is_padded_to_the_first_length_that_holds_it():
    found = {}
    for batch in batches(numbered((1, 7, 8, 9, 16)), batch_size=2, lengths=LENGTHS):
        found |= {int(label): batch.input_ids.shape for label in batch.label[batch.row_mask > 0]}
    assert found == {0: (2, 8), 1: (2, 8), 2: (2, 8), 3: (2, 16), 4: (2, 16)}


def test_what_only_fills_a_batch_is_its_first_row_without_weight():
    (batch,) = batches(Split([[5, 6, 7]], np.array([1])), batch_size=3, lengths=LENGTHS)
    assert batch.row_mask.tolist() == [1, 0, 0]
    assert batch.attention_mask.sum(1).tolist() == [3, 3, 3]
    assert batch.input_ids[:, :4].tolist() == [[5, 6, 7, 0]] * 3
    assert batch.label.tolist() == [1, 0, 0]
    assert not batch.token_type_ids.any()
    for column in (batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.label):
        assert column.dtype == np.int32


def test_labels_of_regression_stay_fractions():
    (batch,) = batches(Split([[5], [6]], np.array([0.25, 3.5])), batch_size=3, lengths=LENGTHS)
    assert batch.label.tolist() == [0.25, 3.5, 0]
    assert batch.label.dtype == np.float32


def order(**options) -> list[list[int]]:
    """The rows of every batch."""
    return [members.rows.tolist() for members in plan(numbered(SIZES), batch_size=4, lengths=LENGTHS, **options)]


def test_the_order_is_the_seeds():
    assert order(seed=(0, 1)) == order(seed=(0, 1))
    assert order(seed=(0, 1)) != order(seed=(0, 2))
    assert order(seed=(0, 1)) != order(seed=(1, 1))
    assert order(seed=(0, 1)) != order()


def test_without_a_seed_the_order_is_kept_within_a_length():
    short = [i for i in range(23) if SIZES[i] <= 8]
    long = [i for i in range(23) if SIZES[i] > 8]
    assert [row for rows in order() for row in rows] == short + long


def test_a_sentence_longer_than_all_batches_is_refused_not_dropped():
    with pytest.raises(ValueError, match="a sentence has 17 tokens, more than the longest batch, 16"):
        next(batches(numbered((1, 17)), batch_size=2, lengths=LENGTHS))


def test_no_sentences_are_no_batches():
    assert list(batches(Split([], np.zeros(0)), batch_size=2, lengths=LENGTHS)) == []


# ----------------------------------------------------------------------------------------------------------- encoding

CLS, SEP = 101, 102


def test_sentences_are_cut_with_their_last_token_kept(tokenizer):
    (whole, cut), types, truncated = encode(tokenizer, ["A movie.", "A movie of some length."], 5)
    assert whole.tolist() == [CLS, 1037, 3185, 1012, SEP]
    assert cut.tolist() == [*whole[:3], cut[3], SEP]
    assert truncated.tolist() == [False, True]
    assert types is None


def test_pairs_have_types_and_the_longer_sentence_is_cut(tokenizer):
    (whole, cut), types, truncated = encode(tokenizer, [("A movie.", "A film."), ("A movie of some length.", "A.")], 9)
    assert whole.tolist() == [CLS, 1037, 3185, 1012, SEP, 1037, 2143, 1012, SEP]
    assert types is not None
    assert types[0].tolist() == [0] * 5 + [1] * 4
    assert cut[-4:].tolist() == [SEP, 1037, 1012, SEP]
    assert types[1].tolist() == [0] * 6 + [1] * 3
    assert truncated.tolist() == [False, True]


def test_encoding_in_chunks_keeps_the_order(tokenizer, movies):
    sentences = movies["train"]["sentence"][:4100]
    found = encode(tokenizer, sentences, 12)
    assert len(found.input_ids) == 4100
    alone = encode(tokenizer, sentences[4090:], 12)
    for one, other in zip(found.input_ids[4090:], alone.input_ids, strict=True):
        assert one.tolist() == other.tolist()
    assert found.truncated[4090:].tolist() == alone.truncated.tolist()
    assert encode(tokenizer, [], 12).input_ids == []


@pytest.mark.parametrize(("texts", "least"), [(["a"], 3), ([("a", "b")], 5)])
def test_a_length_without_place_for_a_token_is_refused(tokenizer, texts, least):
    assert len(encode(tokenizer, texts, least).input_ids[0]) == least
    with pytest.raises(ValueError, match=f"max_length is {least - 1}; .* takes at least {least}"):
        encode(tokenizer, texts, least - 1)
