"""Replace and distil: a student with other parts learns from the teacher, first its hidden states, then its logits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flaxmpc.convert import losses
from flaxmpc.convert.data import Batch, Split
from flaxmpc.convert.finetune import epoch_batches, predict
from flaxmpc.convert.fit import Schedule, fit
from flaxmpc.convert.metrics import accuracy
from flaxmpc.models.bert import BertForSequenceClassification, init_params
from flaxmpc.models.params import flatten, unflatten
from flaxmpc.nn.attention import Keys


def start_student(student: BertForSequenceClassification, teacher: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's parameters for all that the student has too; its own per-head scalars start fresh.

    Raises:
        ValueError: a parameter of another shape; a student has the teacher's shape and other parts.
    """
    own = flatten(init_params(student))
    given = flatten(teacher)
    for path, leaf in own.items():
        if path in given and given[path].shape != leaf.shape:
            raise ValueError(f"{path} is {given[path].shape} in the teacher and {leaf.shape} in the student")
    return unflatten({path: given.get(path, leaf) for path, leaf in own.items()})


def calibrate(student: BertForSequenceClassification, params: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """Sets every constant normaliser r_h from a batch, layer after layer, since each changes what the next one sees."""
    flat = flatten(jax.tree.map(jnp.asarray, dict(params)))
    rows = batch.row_mask > 0
    inputs = [jnp.asarray(array[rows]) for array in (batch.input_ids, batch.attention_mask, batch.token_type_ids)]
    keys = Keys.from_mask(inputs[1])

    @jax.jit
    def scores_of(params: Mapping[str, Any]) -> tuple[jax.Array, ...]:
        output: Any = student.apply({"params": params}, *inputs, return_intermediates=True)
        return output[1].scores

    for layer in range(student.config.num_hidden_layers):
        path = f"bert/layer_{layer}/attention"
        if f"{path}/scale" not in flat:
            continue
        scores = scores_of(unflatten(flat))[layer]
        part = student.config.attention_of(layer)
        scale = part.calibrated_scale(scores, keys, flat.get(f"{path}/shift"))
        if scale is not None:
            flat[f"{path}/scale"] = scale
    return unflatten(jax.device_get(flat))


def distill(
    student: BertForSequenceClassification,
    params: Mapping[str, Any],
    teacher: BertForSequenceClassification,
    teacher_params: Mapping[str, Any],
    train: Split,
    validation: Split,
    schedule: Schedule,
    folder: Path,
    *,
    hidden_weight: float,
    logit_weight: float,
    seed: int = 0,
) -> dict[str, Any]:
    """One stage of distillation; resumable, see `fit`. The teacher runs without dropout, and so does the student.

    loss = hidden_weight x `hidden_loss` + logit_weight x `soft_cross_entropy`.

    Args:
        student, params: what is trained, all but the embeddings.
        teacher, teacher_params: the fine-tuned exact model.
        hidden_weight, logit_weight: stage 1 is (1, 0), stage 2 mostly logits.
    """

    def loss(params: Mapping[str, Any], teacher_params: Mapping[str, Any], batch: Batch, key: jax.Array):
        inputs = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
        ours, our_states = student.apply({"params": params}, *inputs, return_intermediates=True)
        theirs, their_states = teacher.apply({"params": teacher_params}, *inputs, return_intermediates=True)
        hidden = losses.hidden_loss(our_states, their_states, batch.attention_mask * batch.row_mask[:, None])  # pyright: ignore[reportArgumentType]
        logit = losses.soft_cross_entropy(ours, theirs, batch.row_mask)  # pyright: ignore[reportArgumentType]
        return hidden_weight * hidden + logit_weight * logit, {"hidden_loss": hidden, "logit_loss": logit}

    def evaluate(params: Mapping[str, Any]) -> dict[str, float]:
        return {"validation_accuracy": accuracy(predict(student, params, validation), validation.labels)}

    return fit(
        loss,
        params,
        epoch_batches(train, schedule, seed),
        schedule,
        folder,
        name=folder.name,
        seed=seed,
        teacher_params=teacher_params,
        evaluate=evaluate,
    )
