"""Losses of fine-tuning and distillation, all means over what is no padding."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Shaped

from flaxmpc.data.batches import IGNORED
from flaxmpc.models.outputs import Intermediates


def masked_mean(values: Any, mask: Array) -> Array:
    """The mean of the values where the mask is 1; it is broadcast to their shape."""
    mask = jnp.broadcast_to(mask, values.shape)
    return (values * mask).sum() / jnp.maximum(mask.sum(), 1.0)


def labelled(labels: Array, row_mask: Float[Array, " batch"]) -> Array:
    """1 for each label that counts, of the shape of the labels: (batch,), or (batch, token) where tokens have them."""
    return row_mask if labels.ndim == 1 else (labels != IGNORED) * row_mask[:, None]


def label_loss(
    logits: Float[Array, "*labels label"], labels: Shaped[Array, "*labels"], row_mask: Float[Array, " batch"]
) -> Array:
    """Softmax cross-entropy with the true labels, (batch,) or (batch, token), whose `IGNORED` ones do not count.

    With one output, a regression, the squared difference.
    """
    mask, logits = labelled(labels, row_mask), jnp.asarray(logits, jnp.float32)
    if logits.shape[-1] == 1:
        return masked_mean(jnp.square(logits[..., 0] - labels), mask)
    return masked_mean(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0)), mask)


def logit_loss(
    logits: Float[Array, "*answers label"], teacher: Float[Array, "*answers label"], mask: Float[Array, "*answers"]
) -> Array:
    """Softmax cross-entropy with the teacher's probabilities (TinyBERT, arXiv 1909.10351, eq. 10, temperature 1).

    With one output, a regression, the squared difference.

    Args:
        logits, teacher: of texts (batch, label), or of tokens (batch, token, label).
        mask: 1 for each text, or token, that counts.
    """
    logits = jnp.asarray(logits, jnp.float32)
    if logits.shape[-1] == 1:
        return masked_mean(jnp.square(logits - teacher)[..., 0], mask)
    return masked_mean(optax.softmax_cross_entropy(logits, jax.nn.softmax(teacher)), mask)


def hidden_loss(student: Intermediates, teacher: Intermediates, token_mask: Float[Array, "batch token"]) -> Array:
    """Mean squared difference of the hidden states, summed over the layers and the embeddings (TinyBERT, eq. 8, 9).

    The states are of equal width, and the student has as many layers as states of the teacher's are given.
    """
    mask = token_mask[..., None]
    pairs = zip((student.embeddings, *student.hidden_states), (teacher.embeddings, *teacher.hidden_states), strict=True)
    return sum((masked_mean(jnp.square(ours - theirs), mask) for ours, theirs in pairs), jnp.zeros(()))


def score_loss(student: Intermediates, teacher: Intermediates, token_mask: Float[Array, "batch token"]) -> Array:
    """Mean squared difference of the attention scores over pairs of tokens, summed over the layers (TinyBERT, eq. 7).

    What is added to all scores of a query changes none of its weights in softmax, so each query's scores are compared
    without their mean.
    """
    pair_mask = token_mask[:, None, :, None] * token_mask[:, None, None, :]
    num_tokens = jnp.maximum(token_mask.sum(-1), 1.0)[:, None, None, None]

    def centred(scores: Array) -> Array:
        return scores - (scores * token_mask[:, None, None, :]).sum(-1, keepdims=True) / num_tokens

    pairs = zip(student.scores, teacher.scores, strict=True)
    return sum(
        (masked_mean(jnp.square(centred(ours) - centred(theirs)), pair_mask) for ours, theirs in pairs), jnp.zeros(())
    )


def range_loss(
    variances: Mapping[Any, Array], ranges: Mapping[Any, tuple[float, float]], token_mask: Float[Array, "batch token"]
) -> Array:
    """Penalises LayerNorms whose variances leave their range: the mean squared distance of their logarithms, summed.

    A student whose variances stay within a factor of 30 needs four products for their inverse roots; left alone,
    a few outlier tokens reach a thousand times the median.

    Args:
        variances: those of each LayerNorm by its name, (batch, token, 1).
        ranges: the lowest and the highest variance of each LayerNorm by its name.
        token_mask: 0 on padding.
    """
    total = jnp.zeros(())
    for name, (low, high) in ranges.items():
        log = jnp.log(variances[name])
        outside = jax.nn.relu(log - jnp.log(high)) + jax.nn.relu(jnp.log(low) - log)
        total += masked_mean(jnp.square(outside), token_mask[..., None])
    return total
