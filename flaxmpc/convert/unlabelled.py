"""Texts made of a data set's own, which a student learns beside them: of any text its teacher has an answer.

    pieces   short, since people type single words, where data sets have sentences
    joined   as long as the sentences, since a student has seen its training set ten times, and a few thousand
             sentences do not say what a teacher does with others (TinyBERT, arXiv 1909.10351, §3.2, replaces words)

Rows are [CLS] sentence [SEP], or [CLS] first [SEP] second [SEP]. What is made of them has no label of its own: a
row's stands in its place.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxmpc.convert.data import Split

# Tokens of each sentence of a piece. Longer texts are as much in range as sentences are.
_LONGEST = 6


def pieces(split: Split, share: float, *, seed: int) -> Split:
    """Short pieces of random rows: of each sentence of a row 1 to 6 tokens in a row.

    A student that has seen no text of three tokens, [CLS] word [SEP], is nowhere near its teacher there: its attention
    is not divided by what it sums to, and the variances leave their ranges.

    Args:
        split: the rows.
        share: pieces for each row, in [0, 1].
        seed: of the choice.

    Raises:
        ValueError: a share outside [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"pieces is {share:g}: it is to be between 0 and 1, pieces for each row")
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(split), round(share * len(split)), replace=False)
    return _made(split, [([row], _piece(np.asarray(split.input_ids[row]), rng)) for row in rows])


def joined(split: Split, share: float, *, seed: int) -> Split:
    """The starts of random rows' sentences, each with the rest of another row's from the same point on.

    The point is a random share of either sentence, so what is joined is no longer than the longer of both.

    Args:
        split: the rows.
        share: joined rows for each row, 0 or more.
        seed: of the choice.

    Raises:
        ValueError: a negative share.
    """
    if not 0.0 <= share < float("inf"):
        raise ValueError(f"joined is {share:g}: it is to be 0 or more, joined sentences for each row")
    rng = np.random.default_rng(seed)
    pairs = rng.integers(len(split), size=(round(share * len(split)), 2))
    both = [(pair, [np.asarray(split.input_ids[row]) for row in pair]) for pair in pairs]
    return _made(split, [(pair, _joined(one, other, rng)) for pair, (one, other) in both])


def _made(split: Split, texts: Sequence[tuple[Any, np.ndarray]]) -> Split:
    """A split of texts, each given by the rows that it is made of and the places of its tokens in them, end to end."""

    def tokens(column: Sequence[Any]) -> list[np.ndarray]:
        return [np.concatenate([np.asarray(column[row]) for row in rows])[places] for rows, places in texts]

    types = None if split.token_type_ids is None else tokens(split.token_type_ids)
    return Split(tokens(split.input_ids), split.labels[[rows[0] for rows, _ in texts]], types)


def _sentences(ids: np.ndarray) -> list[tuple[int, int]]:
    """Where each sentence of a row starts, and where its [SEP] is."""
    ends = np.flatnonzero(ids == ids[-1]).tolist()
    return list(zip([1, *(end + 1 for end in ends[:-1])], ends, strict=True))


def _piece(ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The places of the tokens that stay: [CLS], a span of each sentence, and the [SEP] after it."""
    kept = [0]
    for start, end in _sentences(ids):
        length = min(int(rng.integers(1, _LONGEST + 1)), end - start)
        first = start + int(rng.integers(0, end - start - length + 1))
        kept += [*range(first, first + length), end]
    return np.array(kept)


def _joined(one: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The places of the tokens that stay, of both rows end to end; [CLS] and each [SEP] are the first's."""
    kept = [0]
    for (start, end), (other_start, other_end) in zip(_sentences(one), _sentences(other), strict=False):
        point = rng.random()
        head = start + round(point * (end - start))
        rest = other_start + round(point * (other_end - other_start))
        kept += [*range(start, head), *(len(one) + place for place in range(rest, other_end)), end]
    return np.array(kept)
