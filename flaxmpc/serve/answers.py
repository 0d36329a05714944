"""What a classifier's logits say about a text: one label of several, a set of labels, or a value."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxmpc import secure
from flaxmpc.data.batches import Text
from flaxmpc.models.config import BertConfig


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One text's answer: the fields of its kind of head (see `Head`), or an error. All others are None or empty.

    Attributes:
        text: as it was given; a pair is a tuple of two.
        truncated: whether it was longer than `BertConfig.longest`, and is cut.
        cost: of the secure run that the text was in.
        label: of one label of several: that of the largest logit.
        score: its probability, in [0, 1].
        labels: of a set of labels: those with a probability above 0.5.
        probabilities: of each label of a set, by name.
        value: of a regression.
        logits: opened from the shares.
        logits_plaintext: of the model as it was trained, in the clear; on a cluster nobody has it.
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
        """What there is, as a JSON value: a pair as text1 and text2, and no cost, which a text shares with others."""
        text = {"text": self.text} if isinstance(self.text, str) else {"text1": self.text[0], "text2": self.text[1]}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        left_out = ("text", "cost")
        return text | {
            name: value for name, value in fields.items() if value not in (None, []) and name not in left_out
        }


class Inference(NamedTuple):
    """Predictions in the order of the texts, and what their secure runs cost in all."""

    predictions: list[Prediction]
    cost: secure.Cost


class Head(NamedTuple):
    """A kind of head.

    Attributes:
        fields: of `Prediction`, that it gives.
        read: (logits (label,), names of the labels) -> those.
        columns: of a table of its answers.
        cells: a prediction's, as text.
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


def head(config: BertConfig) -> Head:
    """What the logits of a sequence classifier mean, by its problem_type; one logit is a value unless that says else.

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
    text: Text, logits: np.ndarray, plain: np.ndarray | None, config: BertConfig, truncated: bool, cost: secure.Cost
) -> Prediction:
    """The prediction that a row of logits (label,) gives, those in the clear beside it where there are any.

    There is no answer, but an error, where the logits cannot be right: they are not finite, or on shares far from those
    in the clear.
    """
    error = _wrong(logits, plain)
    if error is not None:
        return Prediction(text, truncated, cost, error=error)
    answer = head(config).read(logits.astype(np.float64), config.id2label)
    in_clear = [] if plain is None else plain.tolist()
    return Prediction(text, truncated, cost, **answer, logits=logits.tolist(), logits_plaintext=in_clear)


def _wrong(logits: np.ndarray, plain: np.ndarray | None) -> str | None:
    """Why logits on shares cannot be right, or None."""
    if plain is not None and not np.isfinite(plain).all():
        return "the model diverges on this text: its logits in the clear are not finite"
    if not np.isfinite(logits).all():
        return "the model diverges on this text"
    # Fixed point is off by some 0.01; by a quarter only where it has overflowed, or has far too few bits.
    if plain is not None and (off := np.abs(logits - plain).max()) > 0.25 + 0.05 * np.abs(plain).max():
        return f"the logits on shares are off by {off:.3g} from those in the clear: fixed point does not hold this text"
    return None
