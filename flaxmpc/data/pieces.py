"""Cuts sentences into short pieces, which a student learns too: people type single words, data sets have sentences."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from flaxmpc.data.batches import Split, of_tokens

# The longest piece of a sentence, in tokens; longer ones stay in the calibrated ranges, as sentences do.
_LONGEST = 6


def pieces(split: Split, share: float, *, seed: int) -> Split:
    """Makes short pieces of random rows: 1 to 6 successive tokens of each sentence.

    A student that has seen no text of three tokens, [CLS] word [SEP], is nowhere near its teacher there: its attention
    is not divided by what it sums to, and the variances leave their ranges. A piece has no label of its own, only the
    teacher's answer; the label of its row stands in its place. Labels of tokens stay theirs.

    Args:
        split: rows [CLS] sentence [SEP], or [CLS] first [SEP] second [SEP].
        share: how many pieces are made for each row, in [0, 1].
        seed: the seed of which rows and which tokens.

    Raises:
        ValueError: a share outside [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"pieces is {share:g}: it is to be between 0 and 1, pieces for each row")
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(split), round(share * len(split)), replace=False)
    chosen = split[rows]
    kept = [_piece(np.asarray(ids), rng) for ids in chosen.input_ids]

    def cut(column: Iterable[Any]) -> list[np.ndarray]:  # with a value for each token
        return [np.asarray(row)[places] for row, places in zip(column, kept, strict=True)]

    types = None if chosen.token_type_ids is None else cut(chosen.token_type_ids)
    labels = of_tokens(cut(chosen.labels)) if split.by_token else chosen.labels
    return Split(cut(chosen.input_ids), labels, types)


def _piece(ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The places of the tokens that stay: [CLS], a span of each sentence, and the [SEP] after it."""
    kept = [0]
    start = 1
    ends = np.flatnonzero(ids == ids[-1])  # the last token is a [SEP], as is what ends the first of a pair
    for end in ends.tolist():
        length = min(int(rng.integers(1, _LONGEST + 1)), end - start)
        first = start + int(rng.integers(0, end - start - length + 1))
        kept += [*range(first, first + length), end]
        start = end + 1
    return np.array(kept)
