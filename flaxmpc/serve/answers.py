"""Reads a model's logits: a label, a set of labels or a value of a text; its entities; an answer in it; its words."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit, softmax

from flaxmpc import secure
from flaxmpc.data.batches import Text
from flaxmpc.data.entities import spans
from flaxmpc.models.base import ANSWERS, TEXTS, TOKENS, WORDS, WithHead


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
        entities: the named entities, as HF's pipeline gives them: `entity_group`, the mean `score` of its words, `word`
            (the text of the entity), and its `start` and `end` among the characters of the text.
        answer: the answer to the first text, a question, in the second; `score` is its probability, `start` and `end`
            its place among the characters of the second.
        masked: for each masked token the words that are most probable there: `token_str` and `score`.
        difference: the largest |secure - plaintext| of the logits; NaN where there are not both.
        logits: the logits (label,) that were opened from the shares, where the text has a label or a value.
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
    entities: tuple[dict[str, Any], ...] | None = None
    answer: str | None = None
    start: int | None = None
    end: int | None = None
    masked: tuple[tuple[dict[str, Any], ...], ...] | None = None
    difference: float = math.nan
    logits: list[float] = dataclasses.field(default_factory=list)
    logits_plaintext: list[float] = dataclasses.field(default_factory=list)
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields that there are, as JSON has them. A pair is text1 and text2; the run's cost is left out."""
        text = {"text": self.text} if isinstance(self.text, str) else {"text1": self.text[0], "text2": self.text[1]}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        left_out = ("text", "cost")
        return text | {
            name: value
            for name, value in fields.items()
            if value not in (None, []) and value == value and name not in left_out  # NaN is no value
        }


class Inference(NamedTuple):
    """The answers to some texts, in their order, and what their secure runs cost in all."""

    predictions: list[Prediction]
    cost: secure.Cost


class Head(NamedTuple):
    """A kind of head: what its logits mean, and how its answers are shown.

    Attributes:
        fields: the fields of `Prediction` that it gives.
        read: (logits, the model's labels, what was read) -> these fields. The logits are (label,), or those of all
            tokens (token, output).
        columns: the names of the columns in a table of its answers.
        cells: (prediction) -> what stands in these columns.
        pairs: whether it takes pairs of texts; None: the config says it, or the first text does.
        masks: whether a text needs a masked token.
    """

    fields: tuple[str, ...]
    read: Callable[[np.ndarray, Sequence[str], "Read"], dict[str, Any]]
    columns: tuple[str, ...]
    cells: Callable[[Any], tuple[str, ...]]
    pairs: bool | None = None
    masks: bool = False


class Read(NamedTuple):
    """What a tokenizer read.

    Attributes:
        text: the text, or the pair.
        tokenizer: the tokenizer.
        encoding: a `tokenizers.Encoding`: the tokens, cut as the model's are, and where they stand in the text.
    """

    text: Text
    tokenizer: Any
    encoding: Any


def _one_label(logits: np.ndarray, names: Sequence[str], read: Read) -> dict[str, Any]:
    return {"label": names[int(logits.argmax())], "score": float(softmax(logits).max())}


def _labels(logits: np.ndarray, names: Sequence[str], read: Read) -> dict[str, Any]:
    by_name = dict(zip(names, expit(logits).tolist(), strict=True))
    return {"labels": tuple(name for name, each in by_name.items() if each > 0.5), "probabilities": by_name}


def _value(logits: np.ndarray, names: Sequence[str], read: Read) -> dict[str, Any]:
    return {"value": float(logits[0])}


def _entities(logits: np.ndarray, names: Sequence[str], read: Read) -> dict[str, Any]:
    """A word has the label of its first token, which is how models are trained: HF's strategy "first"."""
    words, offsets = read.encoding.word_ids, read.encoding.offsets
    first = [i for i, word in enumerate(words) if word is not None and word != (words[i - 1] if i else None)]
    last = [max(i for i, word in enumerate(words) if word == words[place]) for place in first]
    probabilities = softmax(logits[first], axis=-1) if first else logits[:0]
    tags = [names[int(place)] for place in probabilities.argmax(-1)]
    found = []
    for kind, begin, end in spans(tags):
        start, stop = offsets[first[begin]][0], offsets[last[end - 1]][1]
        score = float(probabilities[begin:end].max(-1).mean())
        entity = {"entity_group": kind, "score": score, "word": read.text[start:stop], "start": start, "end": stop}
        found.append(entity)
    return {"entities": tuple(found)}


_LONGEST_ANSWER = 15  # tokens, as in HF's pipeline


def _answer(logits: np.ndarray, names: Sequence[str], read: Read) -> dict[str, Any]:
    """The most probable span of the second text, as in BERT (arXiv 1810.04805, section 4.2) and HF's pipeline."""
    own = np.array([side == 1 for side in read.encoding.sequence_ids])
    starts, ends = softmax(np.where(own[:, None], logits, -np.inf).T, axis=-1)
    scores = np.triu(np.outer(starts, ends)) - np.triu(np.outer(starts, ends), _LONGEST_ANSWER)
    first, last = np.unravel_index(scores.argmax(), scores.shape)
    start, end = read.encoding.offsets[first][0], read.encoding.offsets[last][1]
    return {"answer": read.text[1][start:end], "score": float(scores.max()), "start": start, "end": end}


_MOST_WORDS = 5  # shown for a masked token


def _masked(logits: np.ndarray, names: Sequence[str], read: Read) -> dict[str, Any]:
    found = []
    for place in np.flatnonzero(np.array(read.encoding.ids) == read.tokenizer.mask_token_id):
        probabilities = softmax(logits[place])
        best = np.argsort(-probabilities, kind="stable")[:_MOST_WORDS].tolist()
        found.append(tuple({"token_str": read.tokenizer.decode([i]), "score": float(probabilities[i])} for i in best))
    return {"masked": tuple(found)}


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
ENTITIES = Head(
    ("entities",),
    _entities,
    ("entities", "probabilities"),
    lambda answer: (
        ", ".join(f"{each['word']} ({each['entity_group']})" for each in answer.entities) or "none",
        ", ".join(f"{each['score']:.3f}" for each in answer.entities),
    ),
    pairs=False,
)
ANSWER = Head(
    ("answer", "score", "start", "end"),
    _answer,
    ("answer", "probability"),
    lambda answer: (answer.answer, f"{answer.score:.3f}"),
    pairs=True,
)
MASKED = Head(
    ("masked",),
    _masked,
    ("words", "probabilities"),
    lambda answer: (
        " | ".join(", ".join(each["token_str"] for each in words) for words in answer.masked),
        " | ".join(", ".join(f"{each['score']:.3f}" for each in words) for words in answer.masked),
    ),
    pairs=False,
    masks=True,
)

_OF_TEXTS = {"regression": VALUE, "single_label_classification": ONE_LABEL, "multi_label_classification": LABELS}
_OTHERS = {TOKENS: ENTITIES, ANSWERS: ANSWER, WORDS: MASKED}


def head(model: WithHead) -> Head:
    """Finds the kind of a model's head: by its task, and of a label by its problem_type.

    A single logit is a value, unless the problem_type says else.

    Raises:
        ValueError: a regression of more than one value.
    """
    if model.task != TEXTS:
        return _OTHERS[model.task]
    config = model.config
    kind = _OF_TEXTS.get(config.problem_type or "single_label_classification", ONE_LABEL)
    if kind is ONE_LABEL and config.num_labels == 1:
        return VALUE  # its softmax is always 1
    if kind is VALUE and config.num_labels != 1:
        raise ValueError(f"a regression has one value, but this model has {config.num_labels} labels")
    return kind


def predict(
    read: Read,
    logits: np.ndarray,
    plain: np.ndarray | None,
    model: WithHead,
    truncated: bool,
    cost: secure.Cost,
) -> Prediction:
    """Makes the answer to one text of its logits.

    There is an error in its place where the logits cannot be right: they are not finite, or on shares far from those in
    the clear.

    Args:
        read: the text, as the tokenizer read it.
        logits: the logits that were opened from the shares, (label,), or (token, output) without padding.
        plain: the logits in the clear; None: nobody has them.
        model: the model.
        truncated: whether the text is cut.
        cost: the cost of the secure run that the text was in.
    """
    if error := wrong(logits, plain):
        return Prediction(read.text, truncated, cost, error=error)
    answer = head(model).read(logits.astype(np.float64), model.config.id2label, read)
    if model.task == TEXTS:  # of every token they are too many to be looked at
        answer |= {"logits": logits.tolist(), "logits_plaintext": [] if plain is None else plain.tolist()}
    difference = math.nan if plain is None else float(np.abs(logits - plain).max())
    return Prediction(read.text, truncated, cost, **answer, difference=difference)


def wrong(logits: np.ndarray, plain: np.ndarray | None) -> str | None:
    """Why the logits of one text on shares cannot be right, beside those in the clear if anybody has them; None: they
    may be.
    """
    if plain is not None and not np.isfinite(plain).all():
        return "the model diverges on this text: its logits in the clear are not finite"
    if not np.isfinite(logits).all():
        return "the model diverges on this text"
    # Fixed point is off by some 0.01; by a quarter only where it has overflowed, or has far too few bits.
    if plain is not None:
        off, most = (float(np.abs(each).max(initial=0)) for each in (logits - plain, plain))
        if off > 0.25 + 0.05 * most:
            why = "fixed point does not hold this text"
            return f"the logits on shares are off by {off:.3g} from those in the clear: {why}"
    return None
