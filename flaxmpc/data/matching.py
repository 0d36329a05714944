"""Which label is which: the classes of data and the labels of a model are matched by their names."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from flaxmpc.data.batches import SPLITS
from flaxmpc.data.tasks import Task


def matched(task: Task, id2label: Sequence[str], owner: str) -> Task:
    """The task with its classes as the ids that a model gives them, by their names: case, spaces, _ and - apart.

    Where the model or the data has no names (LABEL_0, LABEL_1, ...) the ids are the model's already, and the names are
    those that there are: see `refuse_other_order`.

    Args:
        task: the data.
        id2label: the model's.
        owner: whose they are, for messages.

    Raises:
        ValueError: other names, or not as many.
    """
    both = f"{owner} has the labels {', '.join(id2label)}; {task.name} has {', '.join(task.id2label)}"
    if len(id2label) != task.num_labels:
        raise ValueError(f"{both}: not as many")
    if task.regression:
        return dataclasses.replace(task, id2label=tuple(id2label))
    if not (named(id2label) and named(task.id2label)):
        return dataclasses.replace(task, id2label=tuple(id2label if named(id2label) else task.id2label))
    ours, theirs = ([re.sub(r"[\s_-]+", "", name).casefold() for name in names] for names in (task.id2label, id2label))
    if sorted(ours) != sorted(theirs) or len(set(ours)) < len(ours):
        raise ValueError(f"{both}: not the same. Rename the model's, in id2label of its config.json, or the data's")
    ids = np.array([theirs.index(name) for name in ours], np.int32)
    splits = {name: getattr(task, name) for name in SPLITS}
    renumbered = {name: dataclasses.replace(split, labels=ids[split.labels]) for name, split in splits.items()}
    return dataclasses.replace(task, **renumbered, id2label=tuple(id2label))


def named(id2label: Sequence[str]) -> bool:
    """Whether labels have names: not those that HF gives to labels without."""
    return tuple(id2label) != tuple(f"LABEL_{i}" for i in range(len(id2label)))


def refuse_other_order(logits: np.ndarray, labels: np.ndarray, both: str) -> None:
    """ValueError where a model is right on far more rows if its labels stand in another order than the data's.

    For labels that could not be matched by name. Far more: by four deviations of a count.

    Args:
        logits: (row, label), the model's.
        labels: (row,).
        both: whose they are, for the message.
    """
    from scipy.optimize import linear_sum_assignment

    finite = np.isfinite(logits).all(-1)
    counts = np.zeros((logits.shape[-1],) * 2, int)
    np.add.at(counts, (logits[finite].argmax(-1), np.asarray(labels)[finite]), 1)
    best = int(counts[linear_sum_assignment(counts, maximize=True)].sum())
    right = int(np.trace(counts))
    if best - right > 4 * np.sqrt(best):
        raise ValueError(
            f"{both}: by the ids of the labels the model is right on {right} of {len(labels)} rows, in another "
            f"order of them on {best}. Name the labels, in id2label of its config.json and in the data"
        )
