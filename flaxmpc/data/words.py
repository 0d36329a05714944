"""Tables of words with tags: a row is a sentence, a list of words and as many tags. For named entities and the like."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flaxmpc.data.batches import IGNORED, Split, of_tokens
from flaxmpc.data.tables import Table
from flaxmpc.errors import brief, failing_as, listed

TOKENS, TAGS = "tokens", "tags"
"""The columns of words and of tags, as a .conll file has them."""

_USUAL_TAGS = (TAGS, "ner_tags", "labels")


def has_words(table: Table, text_columns: Sequence[str]) -> bool:
    """Whether the rows of a table are words with tags, and no other columns of text were asked for."""
    return TOKENS in table.columns and tuple(text_columns) in ((), (TOKENS,))


def tags_column(table: Table, label_column: str) -> str:
    """The column of tags: the one that was asked for, or else the first usual name that the table has.

    Raises:
        ValueError: it has none; says which columns it has.
    """
    for name in (label_column, *_USUAL_TAGS):
        if name in table.columns:
            return name
    raise ValueError(
        f"{table.source} has no column of tags that is named as usual ({', '.join(_USUAL_TAGS)}). Its columns are "
        f"{listed(table.columns)}: name one as label_column"
    )


def texts(table: Table) -> list[str]:
    """The words of every row, a space between two: no word has one.

    Raises:
        ValueError: a row is no list of words, or has none, or one is empty or has a space; says in which row.
    """
    found = []
    for row, words in enumerate(table.columns[TOKENS][:]):
        words = _listed(table, row, TOKENS, words)
        if not words:
            raise ValueError(f"{table.at(row)}: no words")
        for word in words:
            if not isinstance(word, str) or not word or " " in word:
                raise ValueError(f"{table.at(row)}: {brief(word)} is no word without spaces")
        found.append(" ".join(words))
    return found


def read_tags(found: Mapping[str, Table], column: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The tags of every table, ids (word,) in arrays of rows; and the names of the tags: O first, if it is one.

    Args:
        found: the tables by split, with words.
        column: the column of tags.

    Raises:
        ValueError: a row has another number of tags than words, or a tag that is no name and no id of one (says in
            which row); or all tags are the same.
    """
    rows = {split: [_tags(table, row, column) for row in range(len(table))] for split, table in found.items()}
    names = {tag for tags in rows.values() for row in tags for tag in row}
    if len(names) < 2:
        raise ValueError(f"all tags of {column} are {listed(names)}: there is nothing to learn")
    ordered = tuple(sorted(names, key=lambda name: (name != "O", name)))
    ids = {name: i for i, name in enumerate(ordered)}
    numbered = {split: [np.array([ids[tag] for tag in row], np.int32) for row in tags] for split, tags in rows.items()}
    return {split: of_tokens(tags) for split, tags in numbered.items()}, ordered


def _tags(table: Table, row: int, column: str) -> list[str]:
    tags = _listed(table, row, column, table.columns[column][row])
    words = table.columns[TOKENS][row]
    if len(tags) != len(words):
        raise ValueError(f"{table.at(row)}: {len(words)} words, but {len(tags)} tags")
    names = table.class_names.get(column, ())
    found = []
    for tag in tags:
        name = names[tag] if isinstance(tag, int) and 0 <= tag < len(names) else tag
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{table.at(row)}: {brief(tag)} is no tag: a name, such as O or B-person")
        found.append(name)
    return found


def _listed(table: Table, row: int, column: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple, np.ndarray)):
        what = "is missing" if value is None else f"is {brief(value)}, not a list"
        raise ValueError(f"{table.at(row)}: {column} {what}")
    return [each.item() if isinstance(each, np.generic) else each for each in value]


def encode(
    split: str, texts: Sequence[Any], tags: np.ndarray, tokenizer: Any, max_length: int, warnings: list[str]
) -> Split:
    """The rows of a split as token ids. The first token of a word has the word's tag, all others have none, as in HF.

    Args:
        split: the name of the split, for `warnings`.
        texts: see `texts`.
        tags: the ids of the tags, an array of arrays (word,).
        tokenizer: a fast tokenizer.
        max_length: the number of tokens that a row is cut at.
        warnings: gets a sentence where rows are cut, and where words have no token and so no answer.

    Raises:
        ValueError: the tokenizer fails, or needs the text of all words.
    """
    ids, labels, lost, cut = [], [], 0, 0
    for text, own in zip(texts, tags, strict=True):
        with failing_as("the tokenizer cannot encode these words"):
            encoding = tokenizer(
                text.split(" "), is_split_into_words=True, truncation=True, max_length=max_length
            ).encodings[0]
        places = np.array([-1 if word is None else word for word in encoding.word_ids])
        first = (places >= 0) & (places != np.concatenate([[-1], places[:-1]]))
        labels.append(np.where(first, own[np.maximum(places, 0)], IGNORED).astype(np.int32))
        ids.append(np.asarray(encoding.ids, np.int32))
        cut += bool(encoding.overflowing)
        lost += len(own) - int(first.sum())
    if cut:
        warnings.append(f"{split}: {cut} of {len(ids)} texts are cut at {max_length} tokens")
    if lost:
        warnings.append(f"{split}: {lost} words have no token, or are cut off, and count nowhere")
    return Split(ids, of_tokens(labels), None, list(texts))
