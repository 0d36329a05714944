"""Losses of fine-tuning and distillation, all means over what is no padding."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from flaxmpc.models.bert import Intermediates


def _masked_mean(values: Any, mask: Array) -> Array:
    mask = jnp.broadcast_to(mask, values.shape)
    return (values * mask).sum() / jnp.maximum(mask.sum(), 1.0)


def cross_entropy(
    logits: Float[Array, "batch label"], labels: Int[Array, " batch"], row_mask: Float[Array, " batch"]
) -> Array:
    """Softmax cross-entropy with the true labels."""
    return _masked_mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels), row_mask)


def soft_cross_entropy(
    logits: Float[Array, "batch label"], teacher: Float[Array, "batch label"], row_mask: Float[Array, " batch"]
) -> Array:
    """Softmax cross-entropy with the teacher's probabilities (TinyBERT, arXiv 1909.10351, eq. 10, temperature 1)."""
    return _masked_mean(optax.softmax_cross_entropy(logits, jax.nn.softmax(teacher)), row_mask)


def hidden_loss(student: Intermediates, teacher: Intermediates, token_mask: Float[Array, "batch token"]) -> Array:
    """Mean squared difference of the hidden states, summed over the layers and the embeddings (TinyBERT, eq. 8, 9).

    The models have equal width and number of layers.
    """
    mask = token_mask[..., None]
    pairs = zip((student.embeddings, *student.hidden_states), (teacher.embeddings, *teacher.hidden_states), strict=True)
    return sum((_masked_mean(jnp.square(ours - theirs), mask) for ours, theirs in pairs), jnp.zeros(()))
