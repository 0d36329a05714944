"""Reads a column of labels: names, ids, or true and false become ids of classes; numbers stay numbers to learn."""

import collections
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxmpc.data.tables import ALL, Table
from flaxmpc.errors import brief, listed

REGRESSION = ("LABEL_0",)
"""The one label of a regression, named as HF does."""

# Not all that int() and float() take: they read a name such as 1_2, and digits of other scripts.
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|inf|infinity)", re.IGNORECASE)


def _label(value: Any) -> int | float | str | None:
    """Parses a label: an id, true or false, a number or a name; None if it is missing. A string may hold a number.

    An integer of more digits than Python reads is an infinite number.
    """
    if isinstance(value, str):
        text = value.strip()
        if not _NUMBER.fullmatch(text):
            return text or None
        try:
            return int(text) if _INTEGER.fullmatch(text) else _label(float(text))
        except ValueError:
            return float(text)
    if isinstance(value, float):
        return None if np.isnan(value) else value
    return value if isinstance(value, int) else None


def _kind(label: int | float | str) -> str:
    return "a name" if isinstance(label, str) else "true or false" if isinstance(label, bool) else "a number"


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


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
            values = labels.values[split] = [_label(value) for value in raw]
            if None in values:
                row = values.index(None)
                raise ValueError(f"{table.at(row)}: {column} is missing or no label: {brief(raw[row])}")
            names = dict(enumerate(table.class_names.get(column, ())))
            if [*names.values()] != [*map(str, names)]:  # else they are the ids once more
                labels.values[split] = [names.get(value, value) for value in values]
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
                    raise ValueError(f"{self.found[split].at(row)}: {self.column} {brief(value)} {message}")

    def arrays(self, convert: Callable[[Any], float], dtype: Any) -> dict[str, np.ndarray]:
        return {split: np.asarray([convert(value) for value in values], dtype) for split, values in self.values.items()}


def read_labels(
    found: Mapping[str, Table], column: str, names: tuple[str, ...] | None, warnings: list[str]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Reads the labels of every table: ids (row,) int32, or numbers (row,) float32; and the names of the classes.

    Args:
        found: the tables by split, one of them of training.
        column: the name of the column.
        names: the names of the classes where they are known, `REGRESSION` for numbers; None: as the column says.
        warnings: gets a sentence where numbers look like classes.

    Raises:
        ValueError: a label that is missing, negative, unknown or of another kind than most (says in which row); or
            labels that nothing can be learned from.
    """
    labels = _Labels.parse(found, column)
    given = {table.class_names.get(column) for table in found.values()}
    negative = "is negative (-1 often marks a split whose labels are not public)"
    if given != {None}:
        labels.refuse(lambda value: not isinstance(value, str) and value < 0, negative)
    kinds = collections.Counter(_kind(value) for values in labels.values.values() for value in values)
    common = max(kinds, key=lambda kind: kinds[kind])
    if len(kinds) > 1:
        labels.refuse(lambda value: _kind(value) != common, f"is not {common}, as most labels are")
    words = common == "a name"

    if names is None:
        if len(given) > 1:
            raise ValueError(f"the splits name the classes of {column} differently: {listed(given)}")
        names = given.pop()
    if names == REGRESSION or (names is None and labels.count(float)):
        return _numbers(labels, None if names else warnings), REGRESSION

    labels.refuse(lambda value: isinstance(value, float), "is not the id of a class")
    if not words:
        labels.refuse(lambda value: value < 0, negative)
    if names is None and words:
        first: dict[str, str] = {}
        alike = "is the same as another label but for capitals, spaces or the form of letters"
        labels.refuse(lambda value: first.setdefault(_folded(value), value) != value, alike)
        names = tuple(sorted(set(labels.train)))
    elif names is None:
        names = _numbered(labels.train)
    if len(names) < 2:
        raise ValueError(f"all labels of {labels.column} for training are {listed(names)}: there is nothing to learn")
    ids: Mapping[Any, int] = {value: i for i, value in enumerate(names if words else range(len(names)))}
    known = listed(names) if words else f"0 to {len(names) - 1}"
    labels.refuse(lambda value: value not in ids, f"is none of the classes: {known}")
    return labels.arrays(ids.__getitem__, np.int32), names


def _numbers(labels: _Labels, warnings: list[str] | None) -> dict[str, np.ndarray]:
    """The numbers of a regression, by split.

    With `warnings` only a decimal point says that labels are numbers: for whole ones a warning is added there, and 1
    beside 1.0 is refused.
    """
    labels.refuse(lambda value: isinstance(value, (str, bool)), "is not a number")
    labels.refuse(lambda value: abs(value) == np.inf, "is not finite")
    labels.refuse(lambda value: abs(value) > float(np.finfo(np.float32).max), "is too large for float32")
    values = [value for split in labels.values.values() for value in split]
    if warnings is not None and all(isinstance(value, int) or value.is_integer() for value in values):
        if labels.count(int):
            clash = "has a decimal point and others have none, but all are whole: are they classes, or numbers?"
            labels.refuse(lambda value: isinstance(value, float), clash)
        warnings.append(
            f"{labels.column}: whole numbers with a decimal point are numbers to learn, not classes; ids have no point"
        )
    return labels.arrays(float, np.float32)


def _numbered(train: Sequence[int]) -> tuple[str, ...]:
    """HF's names, LABEL_0 and so on, of classes without. ValueError: ids leave one out, which could not be learnt."""
    present, largest = set(train), max(train)
    gap = next((i for i in range(largest) if i not in present), None)
    if gap is not None:
        raise ValueError(
            f"the training split has labels up to {brief(int(largest))} but no row of class {gap}: ids are 0, 1, 2, "
            "... without gaps; else give names"
        )
    return tuple(f"LABEL_{i}" for i in range(largest + 1))
