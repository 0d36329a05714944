"""Tasks: labelled texts by name or from files, checked, split in three, and encoded. Ready to train on."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxmpc.convert import tables
from flaxmpc.convert.data import SPLITS, Split, Text, encode, movie_sentences, split_of
from flaxmpc.convert.tables import ALL, Table
from flaxmpc.errors import unknown

REGRESSION = ("LABEL_0",)
"""The one label of a regression, named as HF does."""

# The pairs first: a table with question and sentence is one of pairs.
_TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence",),
    ("text",),
)

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


class Glue(NamedTuple):
    """A task of GLUE (Wang et al., arXiv 1804.07461): its columns, its labels, the metrics it is ranked by."""

    text_columns: tuple[str, ...]
    id2label: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)


GLUE: dict[str, Glue] = {
    "cola": Glue(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "sst2": Glue(("sentence",), ("negative", "positive")),
    "mrpc": Glue(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": Glue(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": Glue(("sentence1", "sentence2"), REGRESSION, ("pearson", "spearman")),
    "mnli": Glue(("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "qnli": Glue(("question", "sentence"), ("entailment", "not_entailment")),
    "rte": Glue(("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "wnli": Glue(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A data set ready to train on.

    Attributes:
        name: of the data set, or the path it was read from.
        train, validation, test: see `Split`; none is empty, and every class is in train. Validation chooses the
            checkpoint, test is looked at once.
        id2label: the names of the classes in order of their ids; one name for regression.
        metrics: names in `flaxmpc.convert.metrics.METRICS`; the first decides which checkpoint is best.
        text_columns: one, or two for pairs.
        warnings: what is odd but no error, a sentence each: texts that are cut, texts that two splits share.
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
    - TASK=FOLDER, such as `sst2=data/sst2`: a local copy of a task of GLUE, handled as the hub's;
    - a file or a folder, see `tables.read`. A name comes before a path: write ./movie for a folder of that name.

    A data set that comes with train, validation and test is used as it is. Where only one of validation and test
    exists, it is the test split, and the tenth of train whose `split_of` is validation chooses the checkpoint. GLUE's
    test labels are not public, so this holds for all of GLUE (for MNLI with the matched validation split). A single
    table is split by `split_of` in three. So all splits are the same at every run, and need no seed.

    Labels are names (strings), ids from 0 without gaps (integers), or numbers for regression (any float among them);
    numbers may be written as strings.

    Args:
        tokenizer: see `flaxmpc.models.folder.load_tokenizer`.
        max_length: tokens that a row is cut at, see `encode`.
        text_columns: one, or two for pairs; by default the first usual names that exist.
        label_column: its name.

    Raises:
        ValueError: an unknown name; a broken file; a missing column (says which exist); no rows; a missing, negative
            or unknown label, or an empty text (says in which row); a class that train lacks.
        FileNotFoundError: a folder with no data in it.
        ConnectionError: the hub cannot be reached.
    """
    name, separator, path = data.partition("=")
    glue = GLUE.get(name)
    if glue is not None:
        found = tables.read(path) if separator else _from_hub(name)
    elif data == "movie":
        found = {split: tables.from_dataset(rows, f"movie {split}") for split, rows in movie_sentences().items()}
    elif Path(data).exists():
        found = tables.read(data)
    else:
        raise unknown("data set or path", data, ("movie", *GLUE))
    name = name if glue is not None else data
    found = _named(found, name)
    if glue is not None:
        found.pop("test", None)

    for table in found.values():
        if not len(table):
            raise ValueError(f"{table.source} has no rows")
    columns = tuple(text_columns) or (glue.text_columns if glue else _usual_text_columns(found))
    if len(columns) > 2:
        raise ValueError(f"a row has one text or two, not {len(columns)}: {', '.join(columns)}")
    for table in found.values():
        _need(table, (*columns, label_column))

    warnings: list[str] = []
    texts = {split: _texts(table, columns, warnings if glue else None) for split, table in found.items()}
    labels, id2label = _labels(found, label_column, glue.id2label if glue else None)
    rows = _three({split: Rows(texts[split], labels[split]) for split in found})
    for split in SPLITS:
        if not rows[split].texts:
            whole = len(found.get(ALL) or found["train"])
            raise ValueError(f"{name} has {whole} rows to be split: too few, none falls in {split}")
    if len(id2label) > 1:
        lacking = sorted(set(range(len(id2label))) - set(rows["train"].labels.tolist()))
        if lacking:
            raise ValueError(f"the training split of {name} has no row of class {lacking[0]} ({id2label[lacking[0]]})")
    warnings += _leaks(rows)

    encoded: dict[str, Split] = {}
    for split in SPLITS:
        ids, types, truncated = encode(tokenizer, rows[split].texts, max_length)
        encoded[split] = Split(ids, rows[split].labels, types, rows[split].texts)
        if truncated.any():
            warnings.append(f"{split}: {truncated.sum()} of {len(ids)} texts are cut at {max_length} tokens")
    default = ("pearson", "spearman") if len(id2label) == 1 else ("accuracy",)
    return Task(
        name,
        **encoded,
        id2label=id2label,
        metrics=glue.metrics if glue else default,
        text_columns=columns,
        warnings=tuple(warnings),
    )


def unlabelled(path: Path, task: Task, tokenizer: Any, max_length: int) -> Split:
    """Texts of a file or folder, see `tables.read`, in the columns of a task's texts; every label is the first.

    A text that is a validation or test row of the task too is left out.

    Raises:
        ValueError: a broken file; a missing column (says which exist); an empty text (says in which row); no texts.
        FileNotFoundError: there is no such path, or no data in it.
    """
    found = tables.read(path).values()
    for table in found:
        _need(table, task.text_columns)
    held_out = {*(task.validation.texts or ()), *(task.test.texts or ())}
    texts = [text for table in found for text in _texts(table, task.text_columns, None) if text not in held_out]
    if not texts:
        raise ValueError(f"{path} has no texts but those of {task.name}'s validation and test rows")
    ids, types, _ = encode(tokenizer, texts, max_length)
    return Split(ids, np.zeros(len(texts), task.train.labels.dtype), types)


class Rows(NamedTuple):
    """Texts with their labels."""

    texts: list[Text]
    labels: np.ndarray

    def where(self, mask: np.ndarray) -> "Rows":
        return Rows([self.texts[row] for row in np.flatnonzero(mask)], self.labels[mask])


def _from_hub(name: str) -> dict[str, Table]:
    import datasets

    try:
        dataset: Any = datasets.load_dataset("nyu-mll/glue", name)
    except Exception as error:  # the hub's client, its transport and datasets each raise their own
        raise ConnectionError(
            f"GLUE's {name} cannot be had from the hub ({error}). Give a local copy: {name}=FOLDER, with "
            "train and validation as files or as datasets.save_to_disk writes them"
        ) from error
    return {split: tables.from_dataset(rows, f"glue {name} {split}") for split, rows in dataset.items()}


def _named(found: Mapping[str, Table], name: str) -> dict[str, Table]:
    """The tables under our names of splits; others, such as MNLI's mismatched ones, are left out."""
    renamed: dict[str, Table] = {}
    for split, table in found.items():
        ours = _SPLIT_NAMES.get(split)
        if ours in renamed:
            raise ValueError(f"{name} has the split {ours} twice: {renamed[ours].source} and {table.source}")
        if ours is not None:
            renamed[ours] = table
    if not renamed.keys() & {"train", ALL}:
        raise ValueError(f"{name} has no training split: a split or file named train is needed, it has {_list(found)}")
    return renamed


def _list(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"


def _usual_text_columns(found: Mapping[str, Table]) -> tuple[str, ...]:
    table = next(iter(found.values()))
    for columns in _TEXT_COLUMNS:
        if set(columns) <= set(table.columns):
            return columns
    usual = " or ".join("+".join(columns) for columns in _TEXT_COLUMNS)
    raise ValueError(
        f"{table.source} has no column of text that is named as usual ({usual}). Its columns are "
        f"{_list(table.columns)}: name one or two as text_columns"
    )


def _need(table: Table, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"{table.source} has no column {_list(missing)}. Its columns are {_list(table.columns)}")


def _texts(table: Table, columns: Sequence[str], warnings: list[str] | None) -> list[Text]:
    """The texts of a table, pairs where there are two columns.

    An empty one is an error; with `warnings` it is counted there, since published sets have some (QQP).
    """
    empty = 0
    texts = [list(table.columns[column][:]) for column in columns]
    for column, values in zip(columns, texts, strict=True):
        for row, value in enumerate(values):
            if not isinstance(value, str):
                what = "is missing" if value is None else f"is {value!r}, not a string"
                raise ValueError(f"{table.at(row)}: {column} {what}")
            if not value.strip():
                if warnings is None:
                    raise ValueError(f"{table.at(row)}: {column} is empty")
                empty += 1
    if empty and warnings is not None:
        warnings.append(f"{table.source}: {empty} texts are empty")
    return texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))  # pyright: ignore[reportReturnType]


def _label(value: Any) -> int | float | str | None:
    """A label as an id, a number or a name; None if it is missing. Files of text have their numbers as strings."""
    if isinstance(value, str):
        text = value.strip()
        for number in (int, float):
            try:
                return _label(number(text))
            except ValueError:
                pass
        return text or None
    if isinstance(value, float):
        return None if np.isnan(value) else value
    return int(value) if isinstance(value, int) else None


class _Labels(NamedTuple):
    """The column of labels of every table, parsed."""

    column: str
    found: Mapping[str, Table]
    values: dict[str, list[Any]]

    @classmethod
    def parse(cls, found: Mapping[str, Table], column: str) -> "_Labels":
        labels = cls(column, found, {})
        for split, table in found.items():
            raw = list(table.columns[column][:])
            labels.values[split] = [_label(value) for value in raw]
            if None in labels.values[split]:
                row = labels.values[split].index(None)
                raise ValueError(f"{table.at(row)}: {column} is missing or no label: {raw[row]!r}")
        return labels

    @property
    def train(self) -> list[Any]:
        return self.values["train"] if "train" in self.values else self.values[ALL]

    def count(self, kind: type) -> int:
        return sum(isinstance(value, kind) for values in self.values.values() for value in values)

    def refuse(self, wrong: Callable[[Any], bool], message: str) -> None:
        """Raises for the first row whose label is wrong."""
        for split, values in self.values.items():
            for row, value in enumerate(values):
                if wrong(value):
                    raise ValueError(f"{self.found[split].at(row)}: {self.column} {value!r} {message}")

    def arrays(self, convert: Callable[[Any], float], dtype: Any) -> dict[str, np.ndarray]:
        return {split: np.asarray([convert(value) for value in values], dtype) for split, values in self.values.items()}


def _labels(
    found: Mapping[str, Table], column: str, names: tuple[str, ...] | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The ids, or numbers, of every table, and the names of the classes.

    Args:
        names: of the classes where they are known, `REGRESSION` for numbers; None: as the column says.
    """
    labels = _Labels.parse(found, column)
    words, numbers = labels.count(str), labels.count(int) + labels.count(float)
    if words and numbers:
        rare, common = (str, "a number") if words < numbers else ((int, float), "a name")
        labels.refuse(lambda value: isinstance(value, rare), f"is not {common}, as most labels are")

    if names is None:
        given = {table.class_names.get(column) for table in found.values()}
        if len(given) > 1:
            raise ValueError(f"the splits name the classes of {column} differently: {_list(given)}")
        names = given.pop()
    if names == REGRESSION or (names is None and labels.count(float)):
        labels.refuse(lambda value: isinstance(value, str), "is not a number")
        labels.refuse(lambda value: not np.isfinite(value), "is not finite")
        return labels.arrays(float, np.float32), REGRESSION

    labels.refuse(lambda value: isinstance(value, float), "is not the id of a class")
    if not words:
        labels.refuse(lambda value: value < 0, "is negative (-1 often marks a split whose labels are not public)")
    if names is None:
        names = tuple(sorted(set(labels.train))) if words else _numbered(labels.train)
    if len(names) < 2:
        raise ValueError(f"all labels of {labels.column} for training are {_list(names)}: there is nothing to learn")
    ids: Mapping[Any, int] = {value: i for i, value in enumerate(names if words else range(len(names)))}
    known = _list(names) if words else f"0 to {len(names) - 1}"
    labels.refuse(lambda value: value not in ids, f"is none of the classes: {known}")
    return labels.arrays(ids.__getitem__, np.int32), names


def _numbered(train: Sequence[int]) -> tuple[str, ...]:
    """HF's names of classes that have none. Ids that leave one out are refused: it could not be learnt."""
    present, largest = set(train), max(train)
    gap = next((i for i in range(largest) if i not in present), None)
    if gap is not None:
        raise ValueError(
            f"the training split has labels up to {largest} but no row of class {gap}: ids are 0, 1, 2, ... without "
            "gaps; else give names"
        )
    return tuple(f"LABEL_{i}" for i in range(largest + 1))


def _three(rows: dict[str, Rows]) -> dict[str, Rows]:
    """Train, validation and test; see `load` for what becomes of fewer."""
    if all(split in rows for split in SPLITS):
        return rows
    whole = rows.get(ALL) or rows["train"]
    buckets = np.asarray([split_of(text) for text in whole.texts])
    held_out = rows.get("test") or rows.get("validation")
    if held_out is None:
        return {split: whole.where(buckets == split) for split in SPLITS}
    chosen = buckets == "validation"
    return {"train": whole.where(~chosen), "validation": whole.where(chosen), "test": held_out}


def _leaks(rows: Mapping[str, Rows]) -> list[str]:
    """A warning for every two splits that share texts."""
    seen = {split: set(rows[split].texts) for split in SPLITS}
    shared = {
        (split, other): sum(text in seen[other] for text in rows[split].texts)
        for split, other in (("validation", "train"), ("test", "train"), ("test", "validation"))
    }
    return [
        f"{count} of {len(rows[split].texts)} texts of {split} are in {other} too"
        for (split, other), count in shared.items()
        if count
    ]
