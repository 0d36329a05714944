"""Computes GLUE's metrics by name, as fractions, and the interval of a difference. All take numpy arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxmpc.data.batches import Split
from flaxmpc.data.entities import Span, spans
from flaxmpc.errors import unknown


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of right labels, in [0, 1]. logits (row, label), labels (row,)."""
    return float(correct(logits, labels).mean())


def f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1, or the mean over the classes where there are more than two; 0 for a class never found."""
    from sklearn.metrics import f1_score

    average = "binary" if logits.shape[-1] == 2 else "macro"
    return float(f1_score(labels, _predicted(logits, labels), average=average, zero_division=0))  # pyright: ignore[reportArgumentType]


def matthews_correlation(logits: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of found and true labels, in [-1, 1]; 0 where all rows get, or have, the same label."""
    from sklearn.metrics import matthews_corrcoef

    predicted = _predicted(logits, labels)
    return 0.0 if _constant(predicted, labels) else float(matthews_corrcoef(labels, predicted))


def _predicted(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The label (row,) of the largest logit; where a logit is not finite, a wrong label."""
    wrong = (np.asarray(labels) + 1) % logits.shape[-1]
    return np.where(np.isfinite(logits).all(-1), logits.argmax(-1), wrong)


def _constant(predicted: np.ndarray, labels: np.ndarray) -> bool:
    return bool(np.ptp(predicted) == 0 or np.ptp(labels) == 0)


def _scores(logits: np.ndarray) -> np.ndarray:
    """The one logit of each row, (row,); all 0 where one is not finite: then there is no correlation."""
    if logits.shape[-1] != 1:
        raise ValueError(f"a correlation is of models with one logit, not {logits.shape[-1]}")
    return logits[:, 0] if np.isfinite(logits).all() else np.zeros(len(logits))


def pearson(logits: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation of the one logit (row, 1) with the label; 0 where either is constant or not finite."""
    from scipy import stats

    scores = _scores(logits)
    return 0.0 if _constant(scores, labels) else float(stats.pearsonr(scores, labels)[0])  # pyright: ignore[reportArgumentType]


def spearman(logits: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation of the one logit (row, 1) with the label; 0 where either is constant or not
    finite."""
    from scipy import stats

    scores = _scores(logits)
    return 0.0 if _constant(scores, labels) else float(stats.spearmanr(scores, labels)[0])  # pyright: ignore[reportArgumentType]


def agreement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The share of rows to which two models give the same label; in a regression, numbers within 0.05.

    A row has no label where either has a logit that is not finite.

    Args:
        ours, theirs: the logits of each, (row, label).
    """
    finite = np.isfinite(ours).all(-1) & np.isfinite(theirs).all(-1)
    if ours.shape[-1] == 1:
        with np.errstate(invalid="ignore"):
            return float((finite & (np.abs(ours - theirs)[:, 0] < 0.05)).mean())
    return float((finite & (ours.argmax(-1) == theirs.argmax(-1))).mean())


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    function.__name__: function for function in (accuracy, f1, matthews_correlation, pearson, spearman)
}
"""The metrics by name: (logits (row, label), labels (row,)) -> the metric. Larger is better for all.

A row with a logit that is not finite is wrong."""

ENTITY_F1 = "entity_f1"
"""The metric of named entities, see `entity_f1`."""

NAMES = (*METRICS, ENTITY_F1)

# The first that a model was measured by says most: of entities accuracy counts the words that are none, too.
_BY_WEIGHT = (ENTITY_F1, "matthews_correlation", "accuracy", "pearson", "f1", "spearman")


def headline(figures: Mapping[str, Any]) -> str | None:
    """The metric that a model is told by, among its figures by name; None: there is no metric among them."""
    return next((name for name in _BY_WEIGHT if name in figures), None)


def entity_f1(logits: np.ndarray, split: Split, id2label: Sequence[str]) -> float:
    """F1 of the named entities: one is found where its kind and all of its words are right, as conlleval counts.

    0 where there is none, and none is found.

    Args:
        logits: the model's (answer, label), of all answers of the split.
        split: rows of words with tags.
        id2label: the tags, see `flaxmpc.data.entities`.
    """
    ends = np.cumsum(split.sizes)[:-1]

    tags = (*id2label, "of no finite logits")  # an entity that is none of the true ones

    def entities(ids: np.ndarray) -> set[tuple[int, Span]]:
        rows = enumerate(np.split(ids, ends))
        return {(row, span) for row, own in rows for span in spans([tags[int(i)] for i in own])}

    predicted = np.where(np.isfinite(logits).all(-1), logits.argmax(-1), len(id2label))
    found, true = entities(predicted), entities(split.answers)
    return 2 * len(found & true) / max(len(found) + len(true), 1)


def evaluate(names: Sequence[str], logits: np.ndarray, split: Split, id2label: Sequence[str]) -> dict[str, float]:
    """Computes several metrics, and returns them by name.

    Args:
        names: of `NAMES`.
        logits: a model's (answer, label), of all answers of the split.
        split: the rows, with their labels.
        id2label: the names of the labels.

    Raises:
        ValueError: an unknown metric; the message lists the known ones.
    """
    for name in names:
        if name not in NAMES:
            raise unknown("metric", name, NAMES)
    return {
        name: entity_f1(logits, split, id2label) if name == ENTITY_F1 else METRICS[name](logits, split.answers)
        for name in names
    }


def correct(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the largest logit of each row is its label's, (row,) bool; it is not where a logit is not finite."""
    return (logits.argmax(-1) == np.asarray(labels)) & np.isfinite(logits).all(-1)


class PairedDifference(NamedTuple):
    """Student minus teacher, as fractions, with the interval that holds 95 % of the resamples."""

    difference: float
    ci_low: float
    ci_high: float


def paired_difference(
    student: np.ndarray, teacher: np.ndarray, *, seed: int, resamples: int = 10_000
) -> PairedDifference:
    """The difference of two accuracies over the same rows, with its 95 % percentile bootstrap interval.

    A row is a win (+1), a loss (-1) or a tie (0) of the student's. Drawing rows with replacement and counting the
    three is one draw of a multinomial, so resampling costs little for test sets of any size. The interval: Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.

    Args:
        student, teacher: whether each row is right, (row,) bool, see `correct`.
        seed: the seed of the resampling.
        resamples: how often the rows are drawn.

    Raises:
        ValueError: not the same rows, or none.
    """
    student, teacher = np.asarray(student, bool), np.asarray(teacher, bool)
    if student.shape != teacher.shape or student.ndim != 1 or not student.size:
        raise ValueError(f"both models are to be tested on the same rows, not on {student.shape} and {teacher.shape}")
    size = student.size
    wins, losses = int((student & ~teacher).sum()), int((teacher & ~student).sum())
    shares = np.array([wins, losses, size - wins - losses]) / size
    drawn = np.random.default_rng(seed).multinomial(size, shares, size=resamples)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / size, [0.025, 0.975])
    return PairedDifference((wins - losses) / size, float(low), float(high))
