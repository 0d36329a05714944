"""Makes tasks of labelled texts, by name or from files: checked, split in three, encoded, and ready to train on."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxmpc.data import columns, tables, words
from flaxmpc.data.batches import SPLITS, Split, Text, encode, movie_sentences, split_of, without_labels
from flaxmpc.data.glue import GLUE, Glue, from_hub
from flaxmpc.data.labels import read_labels
from flaxmpc.data.tables import ALL, Table
from flaxmpc.errors import listed, unknown

# What files and data sets call the splits.
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "validation_matched": "validation",
    "dev_matched": "validation",
    "test": "test",
    ALL: ALL,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A data set ready to train on.

    Attributes:
        name: the name of the data set, or the path it was read from.
        train, validation, test: the rows; none of the splits is empty, and every class is in train. Validation chooses
            the checkpoint, test is looked at once.
        id2label: the names of the classes in order of their ids; one name for regression.
        metrics: `flaxmpc.training.metrics.NAMES`; the first decides which checkpoint is best.
        text_columns: one, or two for pairs.
        warnings: what is odd but no error, a sentence each: texts that are cut, rows that are left out, a text with
            two labels, numbers that look like classes.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    id2label: tuple[str, ...]
    metrics: tuple[str, ...]
    text_columns: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def num_labels(self) -> int:
        """How many logits a model has; 1 for regression."""
        return len(self.id2label)

    @property
    def regression(self) -> bool:
        return self.num_labels == 1


def load(
    data: str, tokenizer: Any, max_length: int, *, text_columns: Sequence[str] = (), label_column: str = "label"
) -> Task:
    """Reads, checks, splits and encodes a data set.

    `data` is one of

    - `movie`, the shipped sentences, see `movie_sentences`;
    - a task of GLUE: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, from the hub;
    - TASK=FOLDER, such as `sst2=data/SST-2`: a local copy of a task of GLUE, in the files that GLUE ships or with the
      hub's columns, handled as the hub's;
    - a file or a folder, see `tables.read`. A name comes before a path: write ./movie for a folder of that name.

    A data set that comes with train, validation and test is used as it is. Where only one of validation and test
    exists, it is the test split, and the tenth of train whose `split_of` is validation chooses the checkpoint. GLUE's
    test labels are not public, so this holds for all of GLUE (for MNLI with the matched validation split). A single
    table is split by `split_of` in three. So all splits are the same at every run, and need no seed.

    No two splits share a text: a row of train whose text is in validation or test is left out, and so is a row of
    validation whose text is in test.

    Labels are names (strings), ids from 0 without gaps (integers), true and false, or numbers for regression (any float
    among them); numbers may be written as strings. Where a column's classes have names, as `datasets.ClassLabel` gives
    them, it is these that count and not their order.

    A table with a column `tokens` has words with tags in place of a text with a label: lists of as many strings, the
    tags in `label_column`, or in `tags` or `ner_tags`. All of the above holds for such rows, too.

    Args:
        data: what is read, see above.
        tokenizer: a fast tokenizer, see `flaxmpc.models.folder.load_tokenizer`.
        max_length: the number of tokens that a row is cut at, see `encode`.
        text_columns: the columns of text, one, or two for pairs; by default the first usual names that exist.
        label_column: the column of labels.

    Raises:
        ValueError: an unknown name; a broken file; a missing column (says which exist); no rows; a missing, negative
            or unknown label, one of another kind than most, one that differs from another only in case, or an empty
            text (says in which row); a split without a text of its own; a class that train lacks.
        FileNotFoundError: a folder with no data in it.
        ConnectionError: the hub cannot be reached.
    """
    name, glue, found = _source(data)
    if words.has_words(next(iter(found.values())), text_columns):
        return _of_words(name, found, tokenizer, max_length, label_column)
    usual = glue.text_columns if glue else ()
    named = columns.text_columns(next(iter(found.values())), text_columns or usual)
    for table in found.values():
        columns.require(table, (*named, label_column))

    warnings: list[str] = []
    texts = {split: columns.texts(table, named, warnings if glue else None) for split, table in found.items()}
    labels, id2label = read_labels(found, label_column, glue.id2label if glue else None, warnings)
    rows = _three({split: Rows(texts[split], labels[split]) for split in found})
    _refuse_empty(name, len(found.get(ALL) or found["train"]), rows)
    rows = _apart(name, rows, warnings)
    _refuse_lacking(name, rows["train"], id2label)
    warnings += _contradictions(rows) if len(id2label) > 1 else []
    encoded = {split: _encoded(split, rows[split], tokenizer, max_length, warnings) for split in SPLITS}
    default = ("pearson", "spearman") if len(id2label) == 1 else ("accuracy",)
    return Task(
        name,
        **encoded,
        id2label=id2label,
        metrics=glue.metrics if glue else default,
        text_columns=named,
        warnings=tuple(warnings),
    )


def _of_words(name: str, found: dict[str, Table], tokenizer: Any, max_length: int, label_column: str) -> Task:
    """A task whose words have tags, see `load`."""
    column = words.tags_column(next(iter(found.values())), label_column)
    for table in found.values():
        columns.require(table, (words.TOKENS, column))
    warnings: list[str] = []
    texts: dict[str, list[Text]] = {split: list(words.texts(table)) for split, table in found.items()}
    tags, id2label = words.read_tags(found, column)
    rows = _three({split: Rows(texts[split], tags[split]) for split in found})
    _refuse_empty(name, len(found.get(ALL) or found["train"]), rows)
    rows = _apart(name, rows, warnings)
    known = {tag for row in rows["train"].labels for tag in row.tolist()}
    if lacking := sorted(set(range(len(id2label))) - known):
        raise ValueError(f"the training split of {name} has no word with the tag {id2label[lacking[0]]}")
    encoded = {
        split: words.encode(split, rows[split].texts, rows[split].labels, tokenizer, max_length, warnings)
        for split in SPLITS
    }
    return Task(
        name,
        **encoded,
        id2label=id2label,
        metrics=("entity_f1", "accuracy"),
        text_columns=(words.TOKENS,),
        warnings=tuple(warnings),
    )


def unlabelled(path: Path, task: Task, tokenizer: Any, max_length: int) -> Split:
    """Reads more texts for a task from a file or folder, in the columns of its texts, see `tables.read`.

    They have no labels: every one is the first. A text that is a validation or test row of the task is left out.

    Raises:
        ValueError: a broken file; a missing column (says which exist); an empty text (says in which row); no texts.
        FileNotFoundError: there is no such path, or no data in it.
    """
    glue = GLUE.get(task.name)
    found = (glue.read(path) if glue else tables.read(path)).values()
    held_out = {*(task.validation.texts or ()), *(task.test.texts or ())}
    texts = [text for table in found for text in _texts_for(task, table) if text not in held_out]
    if not texts:
        raise ValueError(f"{path} has no texts but those of {task.name}'s validation and test rows")
    return without_labels(tokenizer, texts, max_length, task.train)


def _texts_for(task: Task, table: Table) -> Sequence[Text]:
    """A table's texts in the columns of a task's; for one of words with tags, such words or else any texts."""
    named = task.text_columns
    if task.train.by_token:
        if words.TOKENS in table.columns:
            return words.texts(table)
        named = columns.text_columns(table)
        if len(named) > 1:
            raise ValueError(f"{table.source} has pairs of texts, {' and '.join(named)}; {task.name} has single ones")
    columns.require(table, named)
    return columns.texts(table, named)


class Rows(NamedTuple):
    """Texts with their labels."""

    texts: list[Text]
    labels: np.ndarray

    def where(self, mask: np.ndarray) -> "Rows":
        return Rows([self.texts[row] for row in np.flatnonzero(mask)], self.labels[mask])


def _source(data: str) -> tuple[str, Glue | None, dict[str, Table]]:
    """What `load` is asked for: its name, the task of GLUE that it is, and its tables by our names of splits.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: see `load`.
    """
    name, separator, path = data.partition("=")
    glue = GLUE.get(name)
    if glue is not None and separator:
        if not path:
            raise ValueError(f"{data} names no folder")
        found = glue.read(path, _SPLIT_NAMES)
    elif glue is not None:
        found = from_hub(name)
    elif data == "movie":
        found = {split: tables.from_dataset(rows, f"movie {split}") for split, rows in movie_sentences().items()}
    elif Path(data).exists():
        found = tables.read(data, _SPLIT_NAMES)
    else:
        raise unknown("data set or path", data, ("movie", *GLUE))
    name = name if glue is not None else data
    found = _named(found, name)
    if glue is not None:
        found.pop("test", None)
    for table in found.values():
        if not len(table):
            raise ValueError(f"{table.source} has no rows")
    return name, glue, found


def _named(found: Mapping[str, Table], name: str) -> dict[str, Table]:
    """Gives tables our names of splits; others, such as MNLI's mismatched ones, are left out."""
    renamed: dict[str, Table] = {}
    for split, table in found.items():
        ours = _SPLIT_NAMES.get(split)
        if ours in renamed:
            raise ValueError(f"{name} has the split {ours} twice: {renamed[ours].source} and {table.source}")
        if ours is not None:
            renamed[ours] = table
    if not renamed.keys() & {"train", ALL}:
        raise ValueError(f"{name} has no training split: a split or file named train is needed, it has {listed(found)}")
    return renamed


def _three(rows: dict[str, Rows]) -> dict[str, Rows]:
    """Splits rows into train, validation and test; see `load` for what becomes of fewer splits."""
    if all(split in rows for split in SPLITS):
        return rows
    whole = rows.get(ALL) or rows["train"]
    buckets = np.asarray([split_of(text) for text in whole.texts])
    held_out = rows.get("test") or rows.get("validation")
    if held_out is None:
        return {split: whole.where(buckets == split) for split in SPLITS}
    chosen = buckets == "validation"
    return {"train": whole.where(~chosen), "validation": whole.where(chosen), "test": held_out}


def _refuse_empty(name: str, whole: int, rows: Mapping[str, Rows]) -> None:
    """ValueError: a split has no rows. `whole` is the number of rows that were split."""
    for split in SPLITS:
        if not rows[split].texts:
            raise ValueError(f"{name} has {whole} rows to be split: too few, none falls in {split}")


def _refuse_lacking(name: str, train: Rows, id2label: Sequence[str]) -> None:
    """ValueError: train has no row of some class."""
    lacking = sorted(set(range(len(id2label))) - set(train.labels.tolist()))
    if len(id2label) > 1 and lacking:
        raise ValueError(f"the training split of {name} has no row of class {lacking[0]} ({id2label[lacking[0]]})")


def _encoded(split: str, rows: Rows, tokenizer: Any, max_length: int, warnings: list[str]) -> Split:
    """The rows of a split as token ids; says in `warnings` how many texts are cut."""
    ids, types, truncated = encode(tokenizer, rows.texts, max_length)
    if truncated.any():
        warnings.append(f"{split}: {truncated.sum()} of {len(ids)} texts are cut at {max_length} tokens")
    return Split(ids, rows.labels, types, rows.texts)


def _contradictions(rows: Mapping[str, Rows]) -> list[str]:
    """A warning for every split that has a text with two labels."""
    found = []
    for split in SPLITS:
        first: dict[Text, int] = {}
        pairs = zip(rows[split].texts, rows[split].labels.tolist(), strict=True)
        if count := sum(first.setdefault(text, label) != label for text, label in pairs):
            found.append(f"{split}: {count} of {len(rows[split].texts)} rows repeat an earlier text with another label")
    return found


def _apart(name: str, rows: Mapping[str, Rows], warnings: list[str]) -> dict[str, Rows]:
    """Leaves out of train the rows whose text is in validation or test, and of validation those whose is in test.

    What a model has learned, or was chosen by, would count as what it can do. Says in `warnings` how many are left out.

    Raises:
        ValueError: a split has no other rows.
    """
    kept: dict[str, Rows] = {}
    later: set[Text] = set()
    for split in reversed(SPLITS):  # test first
        own = rows[split]
        new = np.array([text not in later for text in own.texts])
        others = " or ".join(other for other in SPLITS if other in kept)
        if not new.any():
            raise ValueError(f"all {len(new)} texts of {name}'s {split} are in {others} too: a split needs its own")
        if not new.all():
            warnings.append(f"{split}: {(~new).sum()} of {len(new)} rows are left out, as their texts are in {others}")
        kept[split] = own if new.all() else own.where(new)
        later.update(own.texts)
    return kept
