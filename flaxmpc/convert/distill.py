"""Replace and distil: a student with other parts learns from the teacher, first its hidden states, then its logits."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from flaxmpc.convert.calibrate import Ranges, variances_in
from flaxmpc.convert.finetune import in_order, outputs
from flaxmpc.data.batches import Batch, Split
from flaxmpc.models.base import WithHead, init_params
from flaxmpc.models.outputs import Intermediates
from flaxmpc.models.params import flatten, unflatten
from flaxmpc.training import losses
from flaxmpc.training.fit import Loss, Schedule


@dataclasses.dataclass(frozen=True)
class Stage(Schedule):
    """One stage of training a student: its schedule, and the weights of the losses that it sums.

    Attributes:
        hidden_weight: `hidden_loss`, the hidden states of all layers and the embeddings.
        score_weight: `score_loss`, the attention scores.
        logit_weight: `losses.logit_loss`, the teacher's logits.
        label_weight: `losses.label_loss`, the true labels, which distillation does without.
        range_weight: `range_loss`, LayerNorms' variances that leave their range.
    """

    hidden_weight: float = 0.0
    score_weight: float = 0.0
    logit_weight: float = 0.0
    label_weight: float = 0.0
    range_weight: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_weight") and not 0 <= value < math.inf:
                raise ValueError(f"{field.name} of a stage is {value:g}, not a finite number from 0")


class Targets(NamedTuple):
    """What a batch is to be matched with, cut to its rows. The scores are None where no loss asks for them."""

    batch: Batch
    logits: Any
    states: Intermediates | None


def start_student(student: WithHead, teacher: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's parameters for all that the student has too; its own per-head scalars start fresh.

    Raises:
        ValueError: a parameter of another shape; see `flaxmpc.convert.smaller`.
    """
    own = flatten(init_params(student))
    given = flatten(teacher)
    for path, leaf in own.items():
        if path in given and given[path].shape != leaf.shape:
            raise ValueError(f"{path} is {given[path].shape} in the teacher and {leaf.shape} in the student")
    return unflatten({path: given.get(path, leaf) for path, leaf in own.items()})


class Teacher:
    """The teacher's logits and hidden states, without dropout: computed once and kept, if they fit in a CPU's memory.

    States are kept as float16, whose rounding, 0.05 % at most, is far below what a student differs by.
    """

    def __init__(
        self,
        model: WithHead,
        params: Mapping[str, Any],
        split: Split,
        *,
        with_states: bool,
        with_scores: bool,
        memory: float,
        layers: Sequence[int] | None = None,
    ):
        """Computes what fits.

        Args:
            model, params: the fine-tuned exact model.
            split: the rows that batches will be made of.
            with_states, with_scores: whether any loss asks for hidden states or scores.
            memory: bytes that what is kept may take; if it takes more, each batch is computed when it is asked for.
            layers: the layers whose states and scores are given; None: all.
        """
        self._with_states, self._with_scores = with_states, with_scores
        layers = range(model.config.num_hidden_layers) if layers is None else layers
        self._params = jax.tree.map(jnp.asarray, dict(params))

        @jax.jit
        def apply(params: Any, batch: Batch) -> tuple[jax.Array, Any]:
            output = outputs(model, params, batch)
            if not (with_states or with_scores):
                return output.logits, None
            found = output.intermediates
            states = found._replace(
                hidden_states=tuple(found.hidden_states[layer] for layer in layers),
                scores=tuple(found.scores[layer] for layer in layers),
                variances=(),
            )
            return output.logits, states if with_scores else states._replace(scores=())

        self._apply = apply
        config = model.config
        lengths = np.array([len(row) for row in split.input_ids], np.float64)
        numbers = lengths.sum() * config.hidden_size * (len(layers) + 1)
        numbers += with_scores * np.square(lengths).sum() * config.num_attention_heads * len(layers)
        # On an accelerator they are computed for each batch, and never leave it.
        self.kept = 2 * numbers <= memory and jax.default_backend() == "cpu"
        self._logits: list[Any] = [None] * len(lengths)
        self._states: list[Any] = [None] * len(lengths)
        if not self.kept:
            return
        for batch in track(list(in_order(split, most=config.num_positions)), description="teacher"):
            logits, states = jax.device_get(apply(self._params, batch))
            for row in np.flatnonzero(batch.row_mask):
                index, n = batch.place[row], int(batch.attention_mask[row].sum())
                self._logits[index] = _cut(logits[row], n)
                self._states[index] = jax.tree.map(
                    lambda leaf, row=row, n=n: _cut(leaf[row], n).astype(np.float16), states
                )

    def __call__(self, batch: Batch) -> Targets:
        """Padded places are 0 where the teacher's outputs were kept; no loss looks at them."""
        if not self.kept:
            return Targets(batch, *self._apply(self._params, batch))
        tokens = batch.input_ids.shape[1]
        logits = padded_states([self._logits[index] for index in batch.place], batch.row_mask, tokens)
        if not (self._with_states or self._with_scores):
            return Targets(batch, logits, None)
        rows = [self._states[index] for index in batch.place]
        return Targets(
            batch, logits, jax.tree.map(lambda *leaves: padded_states(leaves, batch.row_mask, tokens), *rows)
        )


def _cut(leaf: np.ndarray, n: int) -> np.ndarray:
    """One sentence's logits (label,), hidden state (token, hidden) or scores (head, token, token), without padding."""
    return leaf if leaf.ndim == 1 else leaf[:n] if leaf.ndim == 2 else leaf[:, :n, :n]


def padded_states(leaves: Sequence[np.ndarray], row_mask: np.ndarray, tokens: int) -> np.ndarray:
    """The logits, states or scores of the rows of a batch, one array; 0 on padding, and for rows that only fill up."""
    first = leaves[0]
    shape = {1: first.shape, 2: (tokens, first.shape[-1]), 3: (first.shape[0], tokens, tokens)}[first.ndim]
    out = np.zeros((len(leaves), *shape), np.float32)
    for row in np.flatnonzero(row_mask):
        own = leaves[row]
        _cut(out[row], own.shape[-1] if own.ndim == 3 else len(own))[...] = own
    return out


def distillation_loss(student: WithHead, stage: Stage, ranges: Ranges | None = None, *, name: str) -> Loss:
    """Makes the loss of a stage for `learn`, whose batches a `Teacher` prepares. The student has no dropout.

    Args:
        student: the model that is trained.
        stage: the weights of the losses.
        ranges: the ranges of the LayerNorms' variances, for the range loss.
        name: the stage's, for the message.

    Raises:
        ValueError: a stage without a loss.
    """
    if stage.epochs and not any((stage.hidden_weight, stage.score_weight, stage.logit_weight, stage.label_weight)):
        raise ValueError(f"{name} has no loss: all of its weights are 0")

    def loss(params: Mapping[str, Any], targets: Targets, _: jax.Array):
        batch, theirs, their_states = targets
        ours, states = outputs(student, params, batch)
        rows: Any = batch.row_mask
        tokens: Any = batch.attention_mask * batch.row_mask[:, None]
        terms = {}
        if stage.hidden_weight:
            terms["hidden_loss"] = stage.hidden_weight, losses.hidden_loss(states, their_states, tokens)  # pyright: ignore[reportArgumentType]
        if stage.score_weight:
            terms["score_loss"] = stage.score_weight, losses.score_loss(states, their_states, tokens)  # pyright: ignore[reportArgumentType]
        if stage.logit_weight:
            answers = rows if ours.ndim == 2 else tokens
            terms["logit_loss"] = stage.logit_weight, losses.logit_loss(ours, theirs, answers)
        if stage.label_weight:
            terms["label_loss"] = stage.label_weight, losses.label_loss(ours, jnp.asarray(batch.label), rows)
        if stage.range_weight and ranges:
            found = variances_in(states)
            terms["range_loss"] = stage.range_weight, losses.range_loss(found, ranges, tokens)
        total = sum((weight * value for weight, value in terms.values()), jnp.zeros(()))
        return total, {name: value for name, (_, value) in terms.items()}

    return loss
