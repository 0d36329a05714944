"""What a student takes from data before, and between, the stages: r_h, the keys' bias, and LayerNorms' ranges."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxmpc.convert.finetune import apply_with_states
from flaxmpc.data.batches import Batch
from flaxmpc.models.bert import BertForSequenceClassification
from flaxmpc.models.config import BertConfig
from flaxmpc.models.params import flatten, unflatten
from flaxmpc.nn.attention import Keys
from flaxmpc.nn.normalization import EXACT, Clipped, Ranged

Ranges = Mapping[str, tuple[float, float]]
"""The lowest and the highest variance that a LayerNorm is to meet, by its path."""

LAYER_NORMS = ("attention_layer_norm", "output_layer_norm")


def calibrate_attention(
    student: BertForSequenceClassification, params: Mapping[str, Any], batch: Batch
) -> dict[str, Any]:
    """Sets every constant normaliser r_h from a batch, layer after layer, since each changes what the next one sees.

    Where a variant says which offset a row's scores should have (`Attention.row_offset`: exponentials without a
    maximum), the keys' bias is moved first: q_i . b is added to all scores of row i, which softmax does not see, so
    b is free, and its least-squares fit to the offsets does most of what the row sum did.
    """
    flat = flatten(jax.tree.map(jnp.asarray, dict(params)))
    used = Batch(*(array[batch.row_mask > 0] for array in batch))
    keys = Keys.from_mask(jnp.asarray(used.attention_mask))
    config = student.config

    for layer in range(config.num_hidden_layers):
        path = f"bert/layer_{layer}/attention"
        part = config.attention_of(layer)
        if part.initial_scale(config.num_attention_heads) is None:
            continue
        _, states = apply_with_states(student)(unflatten(flat), used)
        offset = part.row_offset(states.scores[layer], keys)
        if offset is not None:
            hidden = (states.embeddings, *states.hidden_states)[layer]
            query = hidden @ flat[f"{path}/query/kernel"] + flat[f"{path}/query/bias"]
            bias = _key_bias(np.asarray(query), np.asarray(offset), np.asarray(keys.mask), config)
            flat[f"{path}/key/bias"] = flat[f"{path}/key/bias"] + bias
            _, states = apply_with_states(student)(unflatten(flat), used)
        scale = part.calibrated_scale(states.scores[layer], keys, flat.get(f"{path}/shift"))
        if scale is not None:
            flat[f"{path}/scale"] = scale
    return unflatten(jax.device_get(flat))


def _key_bias(query: np.ndarray, offset: np.ndarray, mask: np.ndarray, config: BertConfig) -> np.ndarray:
    """b (hidden,) with q_i . b / sqrt(d) nearest to the offsets (batch, head, query), by head, over the tokens."""
    heads, size = config.num_attention_heads, config.head_size
    valid = mask.reshape(-1) > 0
    query_RxHxD = query.reshape(-1, heads, size)[valid].astype(np.float64) / np.sqrt(size)
    offset_RxH = offset.transpose(0, 2, 1).reshape(-1, heads)[valid].astype(np.float64)
    ridge = 1e-3 * np.eye(size) * len(query_RxHxD)
    bias = [
        np.linalg.solve(q.T @ q + ridge, q.T @ offset_RxH[:, head])
        for head, q in enumerate(query_RxHxD.transpose(1, 0, 2))
    ]
    return np.concatenate(bias).astype(np.float32)


def variances(
    model: BertForSequenceClassification, params: Mapping[str, Any], batches: Iterable[Batch]
) -> dict[str, np.ndarray]:
    """All variances (token,) that every LayerNorm of the layers meets, by its path."""

    @jax.jit
    def collect(params: Any, batch: Batch) -> dict[str, jax.Array]:
        _, collected = model.apply(
            {"params": params}, batch.input_ids, batch.attention_mask, batch.token_type_ids, mutable=["statistics"]
        )
        return variances_in(collected["statistics"])

    found: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        tokens = (batch.attention_mask * batch.row_mask[:, None]) > 0
        for path, values in collect(params, batch).items():
            found.setdefault(path, []).append(np.asarray(values)[tokens][:, 0])
    return {path: np.concatenate(values) for path, values in found.items()}


def variances_in(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """The variances (batch, token, 1) of the layers' LayerNorms by their paths, from what they sowed."""
    return {
        path.removesuffix("/variance"): values[0]
        for path, values in flatten(statistics).items()
        if path.startswith("bert/layer_")
    }


def ranges(seen: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """The range that each LayerNorm's variances are to stay in: those seen, cut to a third and eight times the median.

    The cut is what outlier tokens of a fine-tuned BERT exceed, by up to a thousand times; see `losses.range_loss`.
    """
    found = {}
    for path, values in seen.items():
        middle = float(np.median(values))
        found[path] = max(float(values.min()), middle / 3.0), min(float(values.max()), middle * 8.0)
    return found


def with_newton(
    config: BertConfig, seen: Mapping[str, np.ndarray], held_out: Mapping[str, np.ndarray], part: Ranged
) -> BertConfig:
    """The config with every LayerNorm calibrated on the variances seen.

    An error of 1 % at the ends of the range is what the last stage learns to live with: it trains the steps themselves.
    A LayerNorm that is calibrated already stays as it is where its range holds all variances. It is the exact one where
    they are too wide, or where those of sentences that were not trained on leave the range: there, others will too.

    Args:
        config: the student's.
        seen: the variances (token,) of each LayerNorm by its path, of the training sentences.
        held_out: those of the validation sentences.
        part: whose `calibrated` gives each LayerNorm's.
    """

    def fitted(own: Any, seen: np.ndarray, held_out: np.ndarray) -> Any:
        if own != EXACT and _holds(own, seen) and _holds(own, held_out):
            return own
        try:
            found = part.calibrated(seen, margin=1.25, tolerance=1e-2)
        except ValueError:
            return EXACT
        return found if _holds(found, held_out) else EXACT

    def change(layer: int, place: int, own: Any) -> Any:
        path = f"bert/layer_{layer}/{LAYER_NORMS[place]}"
        return fitted(own, seen[path], held_out[path])

    return _with_layer_norms(config, change)


def _holds(part: Ranged, variances: np.ndarray) -> bool:
    return bool(part.low <= variances.min() and variances.max() <= part.high)


def for_training(config: BertConfig) -> BertConfig:
    """The same with LayerNorms that do not diverge while training moves the variances: see `Clipped`."""
    return _with_layer_norms(config, lambda layer, place, own: own if own == EXACT else Clipped(own))


def _with_layer_norms(config: BertConfig, change: Callable[[int, int, Any], Any]) -> BertConfig:
    """`change` gets the layer, 0 for after attention and 1 for after the feed-forward, and the LayerNorm's part."""
    parts = (config.layer_norms_of(layer) for layer in range(config.num_hidden_layers))
    return dataclasses.replace(
        config,
        layer_norm=tuple(
            tuple(change(layer, place, own) for place, own in enumerate(pair)) for layer, pair in enumerate(parts)
        ),
    )
