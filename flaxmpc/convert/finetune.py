"""Fine-tuning a classifier: the teacher of a conversion."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxmpc.convert import losses
from flaxmpc.convert.data import Batch, batches
from flaxmpc.convert.fit import Schedule, fit
from flaxmpc.models.bert import BertForSequenceClassification

# Lengths that sentences are padded to while training: one program each.
LENGTHS = (16, 24, 32, 48, 64, 128, 256, 512)

Split = tuple[Sequence[Sequence[int]], Sequence[int]]
"""Token ids of every sentence, and their labels."""


def epoch_batches(split: Split, schedule: Schedule, seed: int) -> Callable[[int], Iterator[Batch]]:
    """What `fit` asks for its batches: shuffled anew in every epoch, the same for the same seed."""
    ids, labels = split
    return lambda epoch: batches(ids, labels, batch_size=schedule.batch_size, lengths=LENGTHS, seed=(seed, epoch))


def predict(
    model: BertForSequenceClassification, params: Mapping[str, Any], split: Split, batch_size: int = 64
) -> np.ndarray:
    """Logits (sentence, label), in the order of the split."""
    ids, _ = split
    apply = jax.jit(model.apply)
    logits = np.zeros((len(ids), model.config.num_labels), np.float32)
    # The labels carry each sentence's place through the batches.
    for batch in batches(ids, range(len(ids)), batch_size=batch_size, lengths=LENGTHS):
        rows = batch.row_mask > 0
        output = apply({"params": params}, batch.input_ids, batch.attention_mask)
        logits[batch.label[rows]] = np.asarray(output)[rows]
    return logits


def accuracy(logits: np.ndarray, labels: Sequence[int]) -> float:
    """The share of right labels, in [0, 1]."""
    return float((logits.argmax(-1) == np.asarray(labels)).mean())


def finetune(
    model: BertForSequenceClassification,
    params: Mapping[str, Any],
    train: Split,
    validation: Split,
    schedule: Schedule,
    folder: Path,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Trains all but the embeddings on labelled sentences; resumable, see `fit`. Returns the parameters."""

    def loss(params: Mapping[str, Any], _: Mapping[str, Any], batch: Batch, key: jax.Array):
        logits = model.apply(
            {"params": params},
            batch.input_ids,
            batch.attention_mask,
            deterministic=False,
            rngs={"dropout": key},
        )
        hits = (jnp.argmax(logits, -1) == batch.label) * batch.row_mask  # pyright: ignore[reportArgumentType]
        return (
            losses.cross_entropy(logits, batch.label, batch.row_mask),  # pyright: ignore[reportArgumentType]
            {"train_accuracy": hits.sum() / batch.row_mask.sum()},
        )

    def evaluate(params: Mapping[str, Any]) -> dict[str, float]:
        return {"validation_accuracy": accuracy(predict(model, params, validation), validation[1])}

    return fit(
        loss,
        params,
        epoch_batches(train, schedule, seed),
        schedule,
        folder,
        name="fine-tuning",
        seed=seed,
        evaluate=evaluate,
    )
