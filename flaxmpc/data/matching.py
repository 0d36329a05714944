"""Matches the classes of data with the labels of a model, by their names."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from flaxmpc.data.batches import IGNORED, SPLITS, Split, of_tokens
from flaxmpc.data.tasks import Task


def matched(task: Task, id2label: Sequence[str], owner: str) -> Task:
    """Numbers the classes of a task as a model does, by their names: case, spaces, _ and - make no difference.

    Where the model or the data has no names (LABEL_0, LABEL_1, ...) the ids are left as they are, and the task gets
    those names that there are; `refuse_other_order` looks whether the ids are the model's.

    Args:
        task: the data.
        id2label: the names of the model's labels, in order of their ids.
        owner: the model's name, for messages.

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
    renumbered = {name: dataclasses.replace(split, labels=_mapped(split, ids)) for name, split in splits.items()}
    return dataclasses.replace(task, **renumbered, id2label=tuple(id2label))


def _mapped(split: Split, ids: np.ndarray) -> np.ndarray:
    """The labels of a split with other ids."""
    if not split.by_token:
        return ids[split.labels]
    return of_tokens([np.where(row == IGNORED, row, ids[np.maximum(row, 0)]) for row in split.labels])


def named(id2label: Sequence[str]) -> bool:
    """Whether labels have names: not those that HF gives to labels without."""
    return tuple(id2label) != tuple(f"LABEL_{i}" for i in range(len(id2label)))


def refuse_other_order(logits: np.ndarray, labels: np.ndarray, both: str) -> None:
    """Refuses labels that stand in another order in a model than in the data, where no names can tell.

    Args:
        logits: (row, label), the model's.
        labels: (row,), the data's.
        both: the names of the model and of the data, for the message.

    Raises:
        ValueError: in another order the model is right on far more rows: by four deviations of a count.
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
