"""Reads a classifier's logits: one label of several, a set of labels, or a value."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxmpc import secure
from flaxmpc.data.batches import Text
from flaxmpc.models.config import EncoderConfig


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer to one text: the fields of its kind of head (see `Head`), or an error. All others are None or empty.

    Attributes:
        text: the text as it was given; a pair is a tuple of two.
        truncated: whether the text was longer than `EncoderConfig.longest`, and is cut.
        cost: the cost of the secure run that the text was in.
        label: the label with the largest logit, where a text has one label of several.
        score: the probability of `label`, in [0, 1].
        labels: the labels with a probability above 0.5, where a text has a set of labels.
        probabilities: the probability of each label of a set, by name.
        value: the number that a regression gives.
        logits: the logits (label,) that were opened from the shares.
        logits_plaintext: the logits (label,) of the trained model in the clear; on a cluster nobody has them.
        error: why there is no answer.
    """

    text: Text
    truncated: bool = False
    cost: secure.Cost | None = None
    label: str | None = None
    score: float | None = None
    labels: tuple[str, ...] | None = None
    probabilities: dict[str, float] | None = None
    value: float | None = None
    logits: list[float] = dataclasses.field(default_factory=list)
    logits_plaintext: list[float] = dataclasses.field(default_factory=list)
    error: str | None = None

    @property
    def difference(self) -> float:
        """The largest |secure - plaintext| of the logits; NaN where there are not both."""
        if not self.logits or not self.logits_plaintext:
            return float("nan")
        return float(np.abs(np.subtract(self.logits, self.logits_plaintext)).max())

    def as_dict(self) -> dict[str, Any]:
        """The fields that there are, as JSON has them. A pair is text1 and text2; the run's cost is left out."""
        text = {"text": self.text} if isinstance(self.text, str) else {"text1": self.text[0], "text2": self.text[1]}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        left_out = ("text", "cost")
        return text | {
            name: value for name, value in fields.items() if value not in (None, []) and name not in left_out
        }


class Inference(NamedTuple):
    """The answers to some texts, in their order, and what their secure runs cost in all."""

    predictions: list[Prediction]
    cost: secure.Cost


class Head(NamedTuple):
    """A kind of head: what its logits mean, and how its answers are shown.

    Attributes:
        fields: the fields of `Prediction` that it gives.
        read: (logits (label,), names of the labels) -> these fields.
        columns: the names of the columns in a table of its answers.
        cells: (prediction) -> what stands in these columns.
    """

    fields: tuple[str, ...]
    read: Callable[[np.ndarray, Sequence[str]], dict[str, Any]]
    columns: tuple[str, ...]
    cells: Callable[[Any], tuple[str, ...]]


def _one_label(logits: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    odds = np.exp(logits - logits.max())
    return {"label": names[int(logits.argmax())], "score": float(odds.max() / odds.sum())}


def _labels(logits: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    probabilities = 0.5 * (1 + np.tanh(0.5 * logits))  # the sigmoid; it overflows nowhere
    by_name = dict(zip(names, probabilities.tolist(), strict=True))
    return {"labels": tuple(name for name, each in by_name.items() if each > 0.5), "probabilities": by_name}


def _value(logits: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    return {"value": float(logits[0])}


ONE_LABEL = Head(
    ("label", "score"), _one_label, ("label", "probability"), lambda answer: (answer.label, f"{answer.score:.3f}")
)
LABELS = Head(
    ("labels", "probabilities"),
    _labels,
    ("labels", "probabilities"),
    lambda answer: (
        ", ".join(answer.labels) or "none",
        ", ".join(f"{name} {probability:.3f}" for name, probability in answer.probabilities.items()),
    ),
)
VALUE = Head(("value",), _value, ("value",), lambda answer: (f"{answer.value:.4f}",))

_HEADS = {"regression": VALUE, "single_label_classification": ONE_LABEL, "multi_label_classification": LABELS}


def head(config: EncoderConfig) -> Head:
    """Finds the kind of a classifier's head by its problem_type; a single logit is a value, unless that says else.

    Raises:
        ValueError: a regression of more than one value.
    """
    kind = _HEADS.get(config.problem_type or "single_label_classification", ONE_LABEL)
    if kind is ONE_LABEL and config.num_labels == 1:
        return VALUE  # its softmax is always 1
    if kind is VALUE and config.num_labels != 1:
        raise ValueError(f"a regression has one value, but this model has {config.num_labels} labels")
    return kind


def predict(
    text: Text, logits: np.ndarray, plain: np.ndarray | None, config: EncoderConfig, truncated: bool, cost: secure.Cost
) -> Prediction:
    """Makes the answer to one text of its logits.

    There is an error in its place where the logits cannot be right: they are not finite, or on shares far from those in
    the clear.

    Args:
        text: the text as it was given.
        logits: the logits (label,) that were opened from the shares.
        plain: the logits (label,) in the clear; None: nobody has them.
        config: the model's.
        truncated: whether the text is cut.
        cost: the cost of the secure run that the text was in.
    """
    error = _wrong(logits, plain)
    if error is not None:
        return Prediction(text, truncated, cost, error=error)
    answer = head(config).read(logits.astype(np.float64), config.id2label)
    in_clear = [] if plain is None else plain.tolist()
    return Prediction(text, truncated, cost, **answer, logits=logits.tolist(), logits_plaintext=in_clear)


def _wrong(logits: np.ndarray, plain: np.ndarray | None) -> str | None:
    """Why logits on shares cannot be right; None: they may be."""
    if plain is not None and not np.isfinite(plain).all():
        return "the model diverges on this text: its logits in the clear are not finite"
    if not np.isfinite(logits).all():
        return "the model diverges on this text"
    # Fixed point is off by some 0.01; by a quarter only where it has overflowed, or has far too few bits.
    if plain is not None and (off := np.abs(logits - plain).max()) > 0.25 + 0.05 * np.abs(plain).max():
        return f"the logits on shares are off by {off:.3g} from those in the clear: fixed point does not hold this text"
    return None
