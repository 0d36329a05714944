"""Makes texts of every length that users send, for measuring a model one length bucket after the other."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxmpc.data.batches import Split, Text, without_labels

# The rows that a bucket is filled up to by joining texts; and the number of texts that repeat one word.
JOINED, REPEATED = 64, 32


def bucketed(split: Split, tokenizer: Any, lengths: Sequence[int]) -> dict[int, tuple[Split, int]]:
    """Sorts rows into length buckets. Returns each bucket's rows, and how many of them were made by joining texts.

    Test sets have few long texts, and users send paragraphs: a bucket with less than `JOINED` rows is filled up with
    random rows joined until they are longer than the bucket before, and cut where they are too long.

    Args:
        split: the rows, with their texts; none is longer than the last of `lengths`.
        tokenizer: the tokenizer that the rows were encoded with.
        lengths: the buckets in tokens, ascending; a row is in the first that holds it.
    """
    sizes = np.fromiter(map(len, split.input_ids), int, len(split))
    special = tokenizer.num_special_tokens_to_add(split.token_type_ids is not None)
    rng = np.random.default_rng(0)
    found, low = {}, 0
    for high in lengths:
        rows = split[np.flatnonzero((sizes > low) & (sizes <= high))]
        texts = [_joined(split, sizes - special, low - special, rng) for _ in range(JOINED - len(rows))] if low else []
        found[high] = rows + without_labels(tokenizer, texts, high, split) if texts else rows, len(texts)
        low = high
    return found


def repeated(split: Split, tokenizer: Any, length: int) -> Split:
    """Makes texts of one word again and again, `length` tokens long: the least like what a model learns from."""
    assert split.texts is not None
    words = sorted({word for text in split.texts for word in re.findall(r"\w+", "".join(text))})
    chosen = np.random.default_rng(0).choice(words, min(REPEATED, len(words)), replace=False)
    texts = [" ".join([str(word)] * length) for word in chosen]
    pairs = split.token_type_ids is not None
    return without_labels(tokenizer, [(text, text) for text in texts] if pairs else texts, length, split)


def _joined(split: Split, sizes: np.ndarray, least: int, rng: np.random.Generator) -> Text:
    """Random texts of the split, joined to one of more than `least` tokens."""
    assert split.texts is not None
    chosen: list[Text] = []
    tokens = 0
    while tokens <= least:
        row = int(rng.integers(len(split)))
        chosen.append(split.texts[row])
        tokens += max(1, int(sizes[row]))
    pairs = [text for text in chosen if not isinstance(text, str)]
    if pairs:
        first, second = zip(*pairs, strict=True)
        return " ".join(first), " ".join(second)
    return " ".join(text for text in chosen if isinstance(text, str))
