"""Trains a classifier: the teacher of a conversion on labels, a student on any loss; and computes what it gives."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxmpc.data.batches import Batch, Split, batches
from flaxmpc.models.base import WithHead, embeddings_path
from flaxmpc.models.params import flatten
from flaxmpc.serve.classify import buckets
from flaxmpc.training import losses, metrics
from flaxmpc.training.fit import Loss, Objective, Schedule, fit

_POSITIONS = 512  # of a model, where nothing else is said


def computing(model: WithHead, schedule: Schedule) -> WithHead:
    """The model as a schedule's steps compute it, see `Schedule.dtype`."""
    return model if schedule.dtype == "float32" else model.clone(dtype=jnp.dtype(schedule.dtype))


def training_lengths(schedule: Schedule, most: int) -> tuple[int, ...]:
    """The lengths that a schedule's sentences are padded to, for a model of `most` positions."""
    return (*(length for length in schedule.padded_lengths if length < most), most)


def epoch_batches(
    split: Split, schedule: Schedule, seed: int, most: int = _POSITIONS
) -> Callable[[int], Iterator[Batch]]:
    """What `fit` asks for its batches: shuffled anew in every epoch, the same for the same seed.

    `most` is the model's number of positions, here and in what follows.
    """
    padded = training_lengths(schedule, most)
    return lambda epoch: batches(split, batch_size=schedule.batch_size, lengths=padded, seed=(seed, epoch))


def in_order(split: Split, batch_size: int = 64, most: int = _POSITIONS) -> Iterator[Batch]:
    """Batches of every sentence once, unshuffled."""
    return batches(split, batch_size=batch_size, lengths=buckets(most))


def looking_up(model: WithHead) -> WithHead:
    """The model, as it takes ids: a secret table takes one-hot rows, which training has no use for."""
    return model.clone(config=dataclasses.replace(model.config, embedding="public"))


# Compiled once for a model, however often it is evaluated.
_apply: Callable[[Any], Callable[..., Any]] = functools.lru_cache(maxsize=8)(lambda model: jax.jit(model.apply))


def predict(model: WithHead, params: Mapping[str, Any], split: Split, batch_size: int = 64) -> np.ndarray:
    """Logits (answer, label) of all answers of the split, see `Split.answers`."""
    model = looking_up(model)
    logits: dict[int, np.ndarray] = {}
    for batch in in_order(split, batch_size, model.config.num_positions):
        output = np.asarray(_apply(model)({"params": params}, *batch.inputs))
        for row in np.flatnonzero(batch.row_mask):
            logits[batch.place[row]] = split.logits_of(batch.place[row], output[row])
    return np.concatenate([logits[row] for row in range(len(split))])


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluate:
    """Computes the figures of a model on the validation split, by the names of their metrics after "validation_".

    Attributes:
        model, split: the model, and the rows that it is measured on.
        metrics: `flaxmpc.training.metrics.NAMES`; the first chooses the best epoch.
    """

    model: WithHead
    split: Split
    metrics: tuple[str, ...]

    @property
    def chooses(self) -> str:
        return f"validation_{self.metrics[0]}"

    def __call__(self, params: Mapping[str, Any]) -> dict[str, float]:
        logits = predict(self.model, params, self.split)
        figures = metrics.evaluate(self.metrics, logits, self.split, self.model.config.id2label)
        return {f"validation_{name}": value for name, value in figures.items()}


def first_bad_layer(model: WithHead) -> Callable[[Mapping[str, Any], Batch], str]:
    """Makes what says for `fit` where the first number is that is not finite, or else in which layer the largest."""

    def locate(params: Mapping[str, Any], batch: Batch) -> str:
        for path, leaf in flatten(params).items():
            if not np.isfinite(leaf).all():
                return f"the parameter {path}"
        logits, states = apply_with_states(model)(params, batch)
        prefix = model.base_model_prefix
        outputs = {f"{prefix}/embeddings": states.embeddings}
        outputs |= {f"{prefix}/layer_{i}": hidden for i, hidden in enumerate(states.hidden_states)}
        outputs["classifier"] = logits
        rows = batch.row_mask > 0
        for path, output in outputs.items():
            if not np.isfinite(np.asarray(output)[rows]).all():
                return f"the output of {path}"
        scores = [float(np.abs(np.asarray(layer)[rows]).max()) for layer in states.scores]
        if not scores:  # all layers are public
            return "the gradient: all outputs are finite"
        largest = int(np.argmax(scores))
        return f"the gradient: all outputs are finite, the largest score, {scores[largest]:.3g}, in layer_{largest}"

    return locate


def outputs(model: WithHead, params: Any, batch: Batch) -> Any:
    """Computes a model's logits and `Intermediates` for a batch, without dropout."""
    return model.apply({"params": params}, *batch.inputs, method="outputs")


apply_with_states: Callable[[Any], Callable[..., Any]] = functools.lru_cache(maxsize=8)(
    lambda model: jax.jit(functools.partial(outputs, model))
)
"""(model) -> (params, batch) -> `outputs`, compiled once for a model."""


def classification_loss(model: WithHead) -> Loss:
    """Makes the loss for `fit` against the true labels, with dropout; it tells the accuracy of a classifier, too."""

    def loss(params: Mapping[str, Any], batch: Batch, key: jax.Array):
        logits: Any = model.apply({"params": params}, *batch.inputs, deterministic=False, rngs={"dropout": key})
        value = losses.label_loss(logits, batch.label, batch.row_mask)  # pyright: ignore[reportArgumentType]
        if model.config.num_labels == 1:
            return value, {}
        counts = losses.labelled(batch.label, batch.row_mask)  # pyright: ignore[reportArgumentType]
        hits = (jnp.argmax(logits, -1) == batch.label) * counts
        return value, {"train_accuracy": hits.sum() / jnp.maximum(counts.sum(), 1.0)}

    return loss


def learn(
    model: WithHead,
    params: Mapping[str, Any],
    split: Split,
    evaluate: Evaluate,
    schedule: Schedule,
    folder: Path,
    loss: Loss,
    *,
    prepare: Callable[[Batch], Any] = lambda batch: batch,
    train_embeddings: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Trains a model on the rows of a split; resumable, see `fit`. Returns the parameters of the best epoch.

    Args:
        model, params: what is trained.
        split: the rows to learn from.
        evaluate: the figures of the validation split; the first chooses the epoch.
        schedule: how long and how fast.
        folder: the folder of checkpoints and metrics.
        loss: the loss, such as `classification_loss`.
        prepare: makes of a batch what the loss gets, see `Objective`.
        train_embeddings: whether the embeddings are trained, too; else they stay as they are.
        seed: the seed of the order of the rows, and of dropout.
    """
    frozen = "" if train_embeddings else embeddings_path(model)
    objective = Objective(loss, prepare, frozen, evaluate, evaluate.chooses, first_bad_layer(model))
    batches_of = epoch_batches(split, schedule, seed, model.config.num_positions)
    return fit(objective, params, batches_of, schedule, folder, seed=seed)
