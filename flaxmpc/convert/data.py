"""Sentences with labels: where they come from, how they are split, encoded and batched."""

import csv
import gzip
import hashlib
import io
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

SPLITS = ("train", "validation", "test")


def split_of(sentence: str) -> str:
    """The split that a sentence belongs to: 80 % train, 10 % validation, 10 % test, by a hash of its text.

    The split needs no seed and no file, and equal sentences never stand on both sides of it.
    """
    bucket = int.from_bytes(hashlib.sha256(sentence.strip().encode()).digest()[:8], "big") % 10
    return {8: "validation", 9: "test"}.get(bucket, "train")


def movie_sentences() -> Any:
    """10,605 sentences of movie reviews as a `datasets.DatasetDict` of train, validation and test.

    Columns: sentence; label, 1 (positive) where the mean of about twenty people's ratings in [-4, 4] is above 0,
    else 0; rating. From C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
    Social Media Text", ICWSM 2014 (MIT licence); the sentences are Pang and Lee's, from which SST was made too.
    """
    import datasets

    packed = resources.files("flaxmpc.convert").joinpath("movie_sentences.tsv.gz").read_bytes()
    rows = list(csv.reader(io.StringIO(gzip.decompress(packed).decode()), delimiter="\t", quoting=csv.QUOTE_NONE))
    features = datasets.Features(
        sentence=datasets.Value("string"),
        label=datasets.ClassLabel(names=["negative", "positive"]),
        rating=datasets.Value("float32"),
    )
    table: dict[str, dict[str, list]] = {split: {"sentence": [], "label": [], "rating": []} for split in SPLITS}
    for rating, sentence in rows:
        columns = table[split_of(sentence)]
        columns["sentence"].append(sentence)
        columns["label"].append(int(float(rating) > 0))
        columns["rating"].append(float(rating))
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_dict(columns, features=features) for split, columns in table.items()}
    )


class Batch(NamedTuple):
    """A batch of one length. `row_mask` is 0 for rows that only fill it up.

    Attributes:
        input_ids, attention_mask: (batch, token) int32.
        label, row_mask: (batch,) int32 and float32.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    label: np.ndarray
    row_mask: np.ndarray


def encode(tokenizer: Any, sentences: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of every sentence, [CLS] and [SEP] included, cut at `max_length`."""
    return tokenizer(list(sentences), truncation=True, max_length=max_length)["input_ids"]


def batches(
    ids: Sequence[Sequence[int]],
    labels: Sequence[int],
    *,
    batch_size: int,
    lengths: Sequence[int],
    pad_token_id: int = 0,
    seed: int | Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Batches of sentences of about one length, so that little is computed on padding.

    Args:
        ids: token ids of every sentence, none longer than the last of `lengths`.
        labels: one for each.
        lengths: ascending; a sentence is padded to the first that holds it. One program is compiled for each.
        seed: shuffles the sentences within a length and the order of the batches; None keeps the given order.

    Raises:
        ValueError: a sentence is longer than the last of `lengths`.
    """
    longest = max(map(len, ids), default=0)
    if longest > lengths[-1]:
        raise ValueError(f"a sentence has {longest} tokens, more than the longest batch, {lengths[-1]}")
    generator = np.random.default_rng(seed) if seed is not None else None
    edges = np.searchsorted(lengths, [len(row) for row in ids])
    plan: list[tuple[int, np.ndarray]] = []
    for edge, length in enumerate(lengths):
        members = np.flatnonzero(edges == edge)
        if generator is not None:
            generator.shuffle(members)
        plan += [(length, members[start : start + batch_size]) for start in range(0, len(members), batch_size)]
    if generator is not None:
        plan = [plan[i] for i in generator.permutation(len(plan))]
    for length, members in plan:
        batch = Batch(
            np.full((batch_size, length), pad_token_id, np.int32),
            np.zeros((batch_size, length), np.int32),
            np.zeros(batch_size, np.int32),
            np.zeros(batch_size, np.float32),
        )
        # A row that only fills up keeps one token, so that its softmax has a sum to divide by.
        batch.attention_mask[:, 0] = 1
        for row, member in enumerate(members):
            tokens = ids[member]
            batch.input_ids[row, : len(tokens)] = tokens
            batch.attention_mask[row, : len(tokens)] = 1
            batch.label[row] = labels[member]
            batch.row_mask[row] = 1.0
        yield batch
