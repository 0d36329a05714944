"""Splits labelled texts in three, encodes them as token ids, and puts them in batches. `tasks` reads them."""

import csv
import dataclasses
import gzip
import hashlib
import io
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from rich.console import Console
from rich.progress import track

from flaxmpc.errors import failing_as

Text: TypeAlias = str | tuple[str, str]
"""A sentence, or a pair of sentences."""

IGNORED = -100
"""The label of a token that has none, as in HF."""

SPLITS = ("train", "validation", "test")


def split_of(text: Text) -> str:
    """Chooses the split of a sentence or a pair by a hash of its text: 80 % train, 10 % validation, 10 % test.

    So splits need no seed and no file, and equal texts never stand in two of them.
    """
    sentence = text if isinstance(text, str) else "\t".join(text)
    bucket = int.from_bytes(hashlib.sha256(sentence.strip().encode()).digest()[:8], "big") % 10
    return {8: "validation", 9: "test"}.get(bucket, "train")


def movie_sentences() -> Any:
    """10,605 sentences of movie reviews as a `datasets.DatasetDict` of train, validation and test.

    Columns: sentence; label, 1 (positive) where the mean of about twenty people's ratings in [-4, 4] is above 0,
    else 0; rating. From C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
    Social Media Text", ICWSM 2014 (MIT licence); the sentences are Pang and Lee's, from which SST was made too.
    """
    import datasets

    packed = resources.files("flaxmpc.data").joinpath("movie_sentences.tsv.gz").read_bytes()
    rows = list(csv.reader(io.StringIO(gzip.decompress(packed).decode()), delimiter="\t", quoting=csv.QUOTE_NONE))
    features = datasets.Features(
        sentence=datasets.Value("string"),
        label=datasets.ClassLabel(names=["negative", "positive"]),
        rating=datasets.Value("float32"),
    )
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for rating, sentence in rows:
        row = {"sentence": sentence, "label": int(float(rating) > 0), "rating": float(rating)}
        splits[split_of(sentence)].append(row)
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(found, features=features) for split, found in splits.items()}
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Encoded sentences, or pairs, with their labels: what is trained on, or evaluated.

    `len(split)` is the number of rows, `split[:100]` and `split[[3, 1]]` are splits of some of them, `a + b` is one of
    the rows of both.

    Attributes:
        input_ids: the token ids of every row, each (token,).
        labels: the label of every row, (row,): integers, or floats for regression. Where tokens have the labels, an
            array of arrays: those of every row's tokens, each (token,) int32; `IGNORED` is none.
        token_type_ids: the types of every row's tokens, each (token,): 0 in the first sentence of a pair and 1 in the
            second; None: all are 0.
        texts: the text of every row, as it was before encoding; None where nobody needs them.

    Raises:
        ValueError: not one label, row of types and text for every row of ids.
    """

    input_ids: Sequence[Any]
    labels: np.ndarray
    token_type_ids: Sequence[Any] | None = None
    texts: Sequence[Text] | None = None

    def __post_init__(self):
        for name in ("labels", "token_type_ids", "texts"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self):
                raise ValueError(f"{len(self)} rows of input_ids, but {len(column)} of {name}")

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def by_token(self) -> bool:
        """Whether tokens have labels, not texts."""
        return self.labels.dtype == object

    @property
    def answers(self) -> np.ndarray:
        """The labels (answer,): one for every row, or for every token that has one."""
        return np.concatenate([row[row != IGNORED] for row in self.labels]) if self.by_token else self.labels

    @property
    def sizes(self) -> list[int]:
        """How many answers every row has."""
        return [int((row != IGNORED).sum()) for row in self.labels] if self.by_token else [1] * len(self)

    def logits_of(self, row: int, logits: np.ndarray) -> np.ndarray:
        """The logits (answer, label) of a row, of a model's (label,) for the text, or (token, label) for its tokens."""
        if not self.by_token:
            return logits[None]
        return logits[: len(self.labels[row])][self.labels[row] != IGNORED]

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> "Split":
        places = np.arange(len(self))[rows].tolist()

        def take(column: Sequence[Any] | None) -> list[Any] | None:
            return None if column is None else [column[place] for place in places]

        return Split(
            [self.input_ids[place] for place in places],
            self.labels[places],
            take(self.token_type_ids),
            take(self.texts),
        )

    def __add__(self, other: "Split") -> "Split":
        """The rows of both. Their texts are left out, and so are token types unless both have them."""
        types = None
        if self.token_type_ids is not None and other.token_type_ids is not None:
            types = [*self.token_type_ids, *other.token_type_ids]
        return Split([*self.input_ids, *other.input_ids], np.concatenate([self.labels, other.labels]), types)


class Encoded(NamedTuple):
    """What a tokenizer makes of texts.

    Attributes:
        input_ids: the token ids of every text, each (token,) int32, [CLS] and [SEP] included.
        token_type_ids: the types of every pair's tokens, each (token,) int8; None for sentences.
        truncated: whether each text was longer and is cut, (row,) bool.
    """

    input_ids: list[np.ndarray]
    token_type_ids: list[np.ndarray] | None
    truncated: np.ndarray


def encode(tokenizer: Any, texts: Sequence[Text], max_length: int) -> Encoded:
    """Makes token ids of sentences, or of pairs: [CLS] first [SEP], or [CLS] first [SEP] second [SEP].

    A text of more than `max_length` tokens is cut; of a pair, the longer sentence.

    Args:
        tokenizer: a fast tokenizer, see `flaxmpc.models.folder.load_tokenizer`.
        texts: all of them sentences, or all pairs.
        max_length: the most tokens that a text may have.

    Raises:
        ValueError: `max_length` leaves no place for a token of each sentence, or the tokenizer fails.
    """
    pairs = bool(texts) and not isinstance(texts[0], str)
    least = tokenizer.num_special_tokens_to_add(pairs) + 1 + pairs
    if max_length < least:
        raise ValueError(f"max_length is {max_length}; {'a pair' if pairs else 'a sentence'} takes at least {least}")
    encoded = Encoded([], [] if pairs else None, np.zeros(len(texts), bool))
    # In chunks: the tokenizer's own objects take some hundred bytes a token.
    chunk = 4096
    starts = range(0, len(texts), chunk)
    err = Console(stderr=True)  # standard output may be a command's JSON
    for start in track(starts, "tokenizing", console=err, transient=True, disable=len(starts) < 4):
        columns = zip(*texts[start : start + chunk], strict=True) if pairs else [texts[start : start + chunk]]
        with failing_as("the tokenizer cannot encode these texts"):
            output = tokenizer(*map(list, columns), truncation=True, max_length=max_length, return_token_type_ids=pairs)
        encoded.input_ids.extend(np.asarray(row, np.int32) for row in output["input_ids"])
        if encoded.token_type_ids is not None:
            encoded.token_type_ids.extend(np.asarray(row, np.int8) for row in output["token_type_ids"])
        encoded.truncated[start : start + chunk] = [bool(row.overflowing) for row in output.encodings]
    return encoded


def without_labels(tokenizer: Any, texts: Sequence[Text], max_length: int, like: Split) -> Split:
    """Encodes texts that have no labels: all are 0, of the type of those of another split."""
    ids, types, _ = encode(tokenizer, texts, max_length)
    none = of_tokens([np.zeros(len(row), np.int32) for row in ids])
    return Split(ids, none if like.by_token else np.zeros(len(texts), like.labels.dtype), types)


def of_tokens(labels: Sequence[np.ndarray]) -> np.ndarray:
    """Labels of tokens, as `Split` has them."""
    found = np.empty(len(labels), object)
    for row, own in enumerate(labels):  # at once, NumPy would make one array of rows of one length
        found[row] = own
    return found


class Batch(NamedTuple):
    """Rows of a split, padded to one length, that are computed together; the last ones may only fill the batch up.

    Attributes:
        input_ids, attention_mask, token_type_ids: (batch, token) int32; mask and types are 0 on padding.
        label: (batch,) int32, or float32 for regression; or (batch, token) int32, where tokens have labels.
        row_mask: (batch,) float32, 1; 0 for rows that only fill up.
        place: (batch,) int32, the row's place in its split; 0 for rows that only fill up.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    token_type_ids: np.ndarray
    label: np.ndarray
    row_mask: np.ndarray
    place: np.ndarray

    @property
    def inputs(self) -> tuple[Any, Any, Any]:
        """What a model is applied to: token ids, mask and types."""
        return self.input_ids, self.attention_mask, self.token_type_ids


class Members(NamedTuple):
    """The rows of a split that make a batch, and the number of tokens that they are padded to."""

    rows: np.ndarray
    length: int


def plan(
    split: Split, *, batch_size: int, lengths: Sequence[int], seed: int | Sequence[int] | None = None
) -> list[Members]:
    """Chooses which rows make which batch: rows of about one length, so that little is computed on padding.

    Every row is in one batch. Another seed gives other batches, but equally many of each length.

    Args:
        split: the rows, of which none is longer than the last of `lengths`.
        batch_size: how many rows a batch has; the last batch of a length may have fewer.
        lengths: numbers of tokens, ascending; a row is padded to the first that holds it. Each has its own program.
        seed: shuffles the rows within a length and the order of the batches; None keeps the given order.

    Raises:
        ValueError: a row is longer than the last of `lengths`.
    """
    sizes = np.fromiter(map(len, split.input_ids), int, len(split))
    if sizes.max(initial=0) > lengths[-1]:
        raise ValueError(f"a sentence has {sizes.max()} tokens, more than the longest batch, {lengths[-1]}")
    generator = np.random.default_rng(seed) if seed is not None else None
    edges = np.searchsorted(lengths, sizes)
    found: list[Members] = []
    for edge, length in enumerate(lengths):
        rows = np.flatnonzero(edges == edge)
        if generator is not None:
            generator.shuffle(rows)
        found += [Members(rows[start : start + batch_size], length) for start in range(0, len(rows), batch_size)]
    if generator is not None:
        found = [found[i] for i in generator.permutation(len(found))]
    return found


def collate(split: Split, members: Members, *, batch_size: int, pad_token_id: int = 0) -> Batch:
    """Puts rows of a split in one batch, in their order, then rows that only fill it up."""
    rows, count = members.rows, len(members.rows)
    inputs = padded(split, rows.tolist(), (batch_size, members.length), pad_token_id)
    if split.by_token:
        labels = np.full((batch_size, members.length), IGNORED, np.int32)
        for place, row in enumerate(split.labels[rows]):
            labels[place, : len(row)] = row
    else:
        labels = np.zeros(batch_size, np.float32 if split.labels.dtype.kind == "f" else np.int32)
        labels[:count] = split.labels[rows]
    batch = Batch(*inputs, labels, np.zeros(batch_size, np.float32), np.zeros(batch_size, np.int32))
    batch.row_mask[:count], batch.place[:count] = 1.0, rows
    return batch


def padded(
    encoded: Encoded | Split, rows: Sequence[int], shape: tuple[int, int], pad_token_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Puts rows of token ids in arrays of one shape: ids, mask and types, (batch, token) int32.

    Rows that only fill up are the first once more: what is out of the ordinary, such as an empty sentence, may leave
    the range that a LayerNorm is calibrated for, and 0 x inf is no 0.
    """
    ids = np.full(shape, pad_token_id, np.int32)
    mask, types = np.zeros_like(ids), np.zeros_like(ids)
    for i, row in enumerate([*rows, *[rows[0]] * (shape[0] - len(rows))]):
        tokens = encoded.input_ids[row]
        ids[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = 1
        if encoded.token_type_ids is not None:
            types[i, : len(tokens)] = encoded.token_type_ids[row]
    return ids, mask, types


def batches(
    split: Split,
    *,
    batch_size: int,
    lengths: Sequence[int],
    pad_token_id: int = 0,
    seed: int | Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Makes the batches of a split one after the other, as `plan` chooses them.

    Raises:
        ValueError: see `plan`.
    """
    for members in plan(split, batch_size=batch_size, lengths=lengths, seed=seed):
        yield collate(split, members, batch_size=batch_size, pad_token_id=pad_token_id)
