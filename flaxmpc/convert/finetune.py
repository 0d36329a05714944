"""Fine-tuning a classifier: the teacher of a conversion."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxmpc.convert import losses
from flaxmpc.convert.data import Batch, Split, batches, collate, plan
from flaxmpc.convert.fit import Schedule, fit
from flaxmpc.convert.metrics import accuracy
from flaxmpc.models.bert import BertForSequenceClassification

# Lengths that sentences are padded to while training: one program each.
LENGTHS = (16, 24, 32, 48, 64, 128, 256, 512)


def epoch_batches(split: Split, schedule: Schedule, seed: int) -> Callable[[int], Iterator[Batch]]:
    """What `fit` asks for its batches: shuffled anew in every epoch, the same for the same seed."""
    return lambda epoch: batches(split, batch_size=schedule.batch_size, lengths=LENGTHS, seed=(seed, epoch))


def predict(
    model: BertForSequenceClassification, params: Mapping[str, Any], split: Split, batch_size: int = 64
) -> np.ndarray:
    """Logits (sentence, label), in the order of the split."""
    apply = jax.jit(model.apply)
    logits = np.zeros((len(split), model.config.num_labels), np.float32)
    for members in plan(split, batch_size=batch_size, lengths=LENGTHS):
        batch = collate(split, members, batch_size=batch_size)
        output = apply({"params": params}, batch.input_ids, batch.attention_mask, batch.token_type_ids)
        logits[members.rows] = np.asarray(output)[: len(members.rows)]
    return logits


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
            batch.token_type_ids,
            deterministic=False,
            rngs={"dropout": key},
        )
        hits = (jnp.argmax(logits, -1) == batch.label) * batch.row_mask  # pyright: ignore[reportArgumentType]
        return (
            losses.cross_entropy(logits, batch.label, batch.row_mask),  # pyright: ignore[reportArgumentType]
            {"train_accuracy": hits.sum() / batch.row_mask.sum()},
        )

    def evaluate(params: Mapping[str, Any]) -> dict[str, float]:
        return {"validation_accuracy": accuracy(predict(model, params, validation), validation.labels)}

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
