import numpy as np
import pytest

from flaxmpc.convert.data import SPLITS, batches, encode, movie_sentences, split_of
from flaxmpc.models.folder import load_tokenizer

LENGTHS = (8, 16)


@pytest.fixture(scope="module")
def movies():
    return movie_sentences()


def sentences(count: int, seed: int = 0) -> list[list[int]]:
    """Token ids, no two sentences alike."""
    rng = np.random.default_rng(seed)
    return [[100 + i, *rng.integers(1, 100, rng.integers(0, 16)).tolist()] for i in range(count)]


def plan(**options) -> list[list[int]]:
    """The members of every batch of 23 sentences, each its own label."""
    ids = sentences(23)
    found = batches(ids, range(len(ids)), batch_size=4, lengths=LENGTHS, **options)
    return [batch.label[batch.row_mask > 0].tolist() for batch in found]


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


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("seed", [None, 0, (0, 3)])
def test_batches_hold_every_sentence_once_and_whole(seed):
    ids = sentences(23)
    seen = {}
    for batch in batches(ids, range(len(ids)), batch_size=4, lengths=LENGTHS, pad_token_id=9, seed=seed):
        for i in np.flatnonzero(batch.row_mask):
            tokens, mask = batch.input_ids[i], batch.attention_mask[i]
            size = mask.sum()
            assert (mask == (np.arange(len(mask)) < size)).all()
            assert (tokens[size:] == 9).all()
            assert batch.label[i] not in seen
            seen[batch.label[i]] = tokens[:size].tolist()
    assert seen == dict(enumerate(ids))


def test_a_sentence_is_padded_to_the_first_length_that_holds_it():
    ids = [[1] * length for length in (1, 7, 8, 9, 16)]
    found = {}
    for batch in batches(ids, range(5), batch_size=2, lengths=LENGTHS):
        found |= {int(label): batch.input_ids.shape for label in batch.label[batch.row_mask > 0]}
    assert found == {0: (2, 8), 1: (2, 8), 2: (2, 8), 3: (2, 16), 4: (2, 16)}


def test_what_only_fills_a_batch_has_one_token_and_no_weight():
    (batch,) = batches([[5, 6, 7]], [1], batch_size=3, lengths=LENGTHS)
    assert batch.row_mask.tolist() == [1, 0, 0]
    assert batch.attention_mask.sum(1).tolist() == [3, 1, 1]
    assert batch.label.tolist() == [1, 0, 0]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.label.dtype == np.int32


def test_the_order_is_the_seeds():
    assert plan(seed=(0, 1)) == plan(seed=(0, 1))
    assert plan(seed=(0, 1)) != plan(seed=(0, 2))
    assert plan(seed=(0, 1)) != plan(seed=(1, 1))
    assert plan(seed=(0, 1)) != plan()


def test_without_a_seed_the_order_is_kept_within_a_length():
    lengths = [len(row) for row in sentences(23)]
    short = [i for i in range(23) if lengths[i] <= 8]
    long = [i for i in range(23) if lengths[i] > 8]
    assert [member for batch in plan() for member in batch] == short + long


def test_a_sentence_longer_than_all_batches_is_refused_not_dropped():
    with pytest.raises(ValueError, match="a sentence has 17 tokens, more than the longest batch, 16"):
        next(batches([[1], [1] * 17], [0, 0], batch_size=2, lengths=LENGTHS))


def test_no_sentences_are_no_batches():
    assert list(batches([], [], batch_size=2, lengths=LENGTHS)) == []


# ----------------------------------------------------------------------------------------------------------- encoding


def test_sentences_are_cut_with_their_last_token_kept(minilm):
    tokenizer = load_tokenizer(minilm)
    cls, sep = 101, 102
    whole, cut = encode(tokenizer, ["A movie.", "A movie of some length."], 5)
    assert whole == [cls, 1037, 3185, 1012, sep]
    assert len(cut) == 5
    assert cut[:3] == whole[:3]
    assert cut[-1] == sep
