"""The tasks of GLUE: their columns, labels and metrics, from the hub or from a local copy."""

import dataclasses
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flaxmpc.data import tables
from flaxmpc.data.labels import REGRESSION
from flaxmpc.data.tables import Table

HUB_ID = "nyu-mll/glue"


class Glue(NamedTuple):
    """A task of GLUE (Wang et al., arXiv 1804.07461), with the names that the hub gives to its columns and labels.

    Attributes:
        text_columns: the hub's names of the columns of text, one or two.
        id2label: the hub's names of the classes in order of their ids; `REGRESSION` for numbers.
        metrics: the metrics that the task is ranked by.
        shipped: the hub's name of a column -> its name in the files that GLUE itself ships, where that is another.
        unnamed: the columns of GLUE's own files that come without a line of names.
    """

    text_columns: tuple[str, ...]
    id2label: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    shipped: Mapping[str, str] = {}
    unnamed: tuple[str, ...] = ()

    def read(self, path: str | Path, splits: Container[str] | None = None) -> dict[str, Table]:
        """The tables of a local copy by the name of their split, see `tables.read`, with the hub's names of columns.

        Args:
            path: a folder of the files that GLUE ships, or in any form that `tables.read` knows.
            splits: the files that are read; None: all.
        """
        found = tables.read(path, splits, self.unnamed)
        for split, table in found.items():
            columns, class_names = dict(table.columns), dict(table.class_names)
            for hubs, shipped in self.shipped.items():
                if hubs not in columns and shipped in columns:
                    columns[hubs] = columns[shipped]
                    class_names |= {hubs: class_names[shipped]} if shipped in class_names else {}
            found[split] = dataclasses.replace(table, columns=columns, class_names=class_names)
        return found


GLUE: dict[str, Glue] = {
    "cola": Glue(
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("matthews_correlation",),
        unnamed=("source", "label", "original_label", "sentence"),
    ),
    "sst2": Glue(("sentence",), ("negative", "positive")),
    "mrpc": Glue(
        ("sentence1", "sentence2"),
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    ),
    "qqp": Glue(
        ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"), {"label": "is_duplicate"}
    ),
    "stsb": Glue(("sentence1", "sentence2"), REGRESSION, ("pearson", "spearman"), {"label": "score"}),
    "mnli": Glue(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        shipped={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
    ),
    "qnli": Glue(("question", "sentence"), ("entailment", "not_entailment")),
    "rte": Glue(("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "wnli": Glue(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}


def from_hub(name: str) -> dict[str, Table]:
    """The tables of a task by the name of their split, as the hub has them.

    Raises:
        ConnectionError: the hub cannot be reached; says how to give a local copy.
    """
    import datasets

    try:
        dataset: Any = datasets.load_dataset(HUB_ID, name)
    except Exception as error:  # the hub's client, its transport and datasets each raise their own
        raise ConnectionError(
            f"GLUE's {name} cannot be had from the hub ({error}). Give a local copy: {name}=FOLDER, with "
            "train and validation as files or as datasets.save_to_disk writes them"
        ) from error
    return {split: tables.from_dataset(rows, f"glue {name} {split}") for split, rows in dataset.items()}
