"""What a student takes from data before, and between, the stages: r_h, the keys' bias, and LayerNorms' ranges."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxmpc.convert.finetune import apply_with_states, outputs
from flaxmpc.data.batches import Batch
from flaxmpc.models.base import WithHead
from flaxmpc.models.config import EncoderConfig
from flaxmpc.models.outputs import Intermediates
from flaxmpc.models.params import flatten, unflatten
from flaxmpc.nn.attention import Calibrated
from flaxmpc.nn.mask import Mask
from flaxmpc.nn.normalization import EXACT, Clipped, Linear, Normalization, Ranged

Place = tuple[int, int]
"""Where a LayerNorm stands: its layer, and 0 for after attention, 1 for after the feed-forward."""

Ranges = Mapping[Place, tuple[float, float]]
"""The lowest and the highest variance that a LayerNorm is to meet, by its place."""


def calibrate_attention(student: WithHead, params: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """Sets the attention parts' scalars from a batch, such as each constant normaliser r_h.

    Layer after layer, since each changes what the next one sees.

    Where a part says which offset a row's scores should have (`Calibrated.row_offset`: exponentials without a maximum),
    the keys' bias is moved first: q_i . b is added to all scores of row i, which softmax does not see, so b is free,
    and its least-squares fit to the offsets does most of what the row sum did.
    """
    flat = flatten(jax.tree.map(jnp.asarray, dict(params)))
    used = Batch(*(array[batch.row_mask > 0] for array in batch))
    config = student.config
    mask = config.mask(jnp.asarray(used.attention_mask))

    for layer in range(config.num_hidden_layers):
        path = f"{student.base_model_prefix}/layer_{layer}/attention"
        part = config.attention_of(layer)
        if not isinstance(part, Calibrated) or config.source_of_scores(layer) != layer:
            continue
        own = {name.removeprefix(f"{path}/"): leaf for name, leaf in flat.items() if name.startswith(f"{path}/")}

        def met(own: Mapping[str, Any], path: str = path, flat: Mapping[str, Any] = flat) -> Intermediates:
            changed = {f"{path}/{name}": leaf for name, leaf in own.items()}
            return apply_with_states(student)(unflatten({**flat, **changed}), used).intermediates

        states = met(own)
        hidden = (states.embeddings, *states.hidden_states)[layer]
        attended = Attended(hidden, states.scores[layer], lambda own, i=layer: met(own).scores[i], mask)
        found = calibrated_layer(part, own, attended, config)
        flat |= {f"{path}/{name}": leaf for name, leaf in found.items()}
    return unflatten(jax.device_get(flat))


class Attended(NamedTuple):
    """What an attention is calibrated on.

    Attributes:
        hidden: the states that it is given, (batch, token, hidden).
        scores: those that it makes of them, (batch, head, query, key).
        scores_of: the scores that other parameters of the attention, by their paths, would make.
        mask: of the states.
    """

    hidden: Any
    scores: Any
    scores_of: Callable[[Mapping[str, Any]], Any]
    mask: Mask


def calibrated_layer(
    part: Calibrated, own: Mapping[str, Any], attended: Attended, config: EncoderConfig
) -> dict[str, Any]:
    """One layer's attention's parameters, by their paths, with its part's scalars set: see `calibrate_attention`."""
    found, scores, mask = dict(own), attended.scores, attended.mask
    offset = part.row_offset(scores, mask)
    if offset is not None:
        query = attended.hidden @ found["query/kernel"] + found["query/bias"]
        bias = _key_bias(np.asarray(query), np.asarray(offset), np.asarray(mask.tokens), config)
        found["key/bias"] = found["key/bias"] + bias
        scores = attended.scores_of(found)
    scalars = {name: found[name] for name in part.scalars(config.num_attention_heads)}
    return found | dict(part.calibrated(scores, mask, scalars))


def _key_bias(query: np.ndarray, offset: np.ndarray, mask: np.ndarray, config: EncoderConfig) -> np.ndarray:
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


def variances(model: WithHead, params: Mapping[str, Any], batches: Iterable[Batch]) -> dict[Place, np.ndarray]:
    """All variances (token,) that every LayerNorm of the layers meets, by its place."""

    @jax.jit
    def collect(params: Any, batch: Batch) -> dict[Place, jax.Array]:
        return variances_in(outputs(model, params, batch).intermediates)

    found: dict[Place, list[np.ndarray]] = {}
    for batch in batches:
        tokens = (batch.attention_mask * batch.row_mask[:, None]) > 0
        for place, values in collect(params, batch).items():
            found.setdefault(place, []).append(np.asarray(values)[tokens][:, 0])
    return {place: np.concatenate(values) for place, values in found.items()}


def variances_in(intermediates: Intermediates) -> dict[Place, Any]:
    """The variances (batch, token, 1) of the layers' LayerNorms by their places."""
    return {
        (layer, place): values
        for layer, of_layer in enumerate(intermediates.variances)
        for place, values in enumerate(of_layer)
    }


def ranges(seen: Mapping[Place, np.ndarray]) -> dict[Place, tuple[float, float]]:
    """The range that each LayerNorm's variances are to stay in: those seen, cut to a third and eight times the median.

    The cut is what outlier tokens of a fine-tuned BERT exceed, by up to a thousand times; see `losses.range_loss`.
    """
    found = {}
    for place, values in seen.items():
        middle = float(np.median(values))
        found[place] = max(float(values.min()), middle / 3.0), min(float(values.max()), middle * 8.0)
    return found


Norms = Mapping[Place, Normalization]
"""The normalisations that a student is to have, by their places."""


def with_norms(config: EncoderConfig, seen: Mapping[Place, np.ndarray], norms: Norms) -> EncoderConfig:
    """The config that a student starts with. What needs a range has the teacher's LayerNorm until `with_calibrated`.

    Args:
        config: the student's, with its teacher's LayerNorms.
        seen: the variances (token,) that each LayerNorm of the teacher meets, by its place.
        norms: the student's.
    """

    def start(place: Place, own: Any) -> Any:
        part = norms[place]
        if isinstance(part, Ranged):
            return own
        return part.calibrated(seen[place]) if isinstance(part, Linear) else part

    return _with_layer_norms(config, start)


def with_calibrated(
    config: EncoderConfig, seen: Mapping[Place, np.ndarray], held_out: Mapping[Place, np.ndarray], norms: Norms
) -> EncoderConfig:
    """The config with every LayerNorm that needs a range calibrated on the variances seen.

    An error of 1 % at the ends of the range is what the last stage learns to live with: it trains the polynomials.
    A LayerNorm that is calibrated already stays as it is where its range holds all variances. It is the exact one where
    they are too wide, or where those of sentences that were not trained on leave the range: there, others will too.
    What is neither exact nor calibrated stays.

    Args:
        config: the student's.
        seen: the variances (token,) of each LayerNorm by its place, of the training sentences.
        held_out: those of the validation sentences.
        norms: the student's; `Ranged.calibrated` gives each LayerNorm its own.
    """

    def fitted(place: Place, own: Any) -> Any:
        part = norms[place]
        if not isinstance(part, Ranged) or not (own == EXACT or isinstance(own, Ranged)):
            return own

        def holds(norm: Ranged, *variances: np.ndarray) -> bool:
            return all(norm.low <= each.min() and each.max() <= norm.high for each in variances)

        if isinstance(own, Ranged) and holds(own, seen[place], held_out[place]):
            return own
        try:
            found = part.calibrated(seen[place], margin=1.25, tolerance=1e-2)
        except ValueError:
            return EXACT
        return found if holds(found, held_out[place]) else EXACT

    return _with_layer_norms(config, fitted)


def for_training(config: EncoderConfig) -> EncoderConfig:
    """The same with LayerNorms that do not diverge while training moves the variances: see `Clipped`."""
    return _with_layer_norms(config, lambda _, own: Clipped(own) if isinstance(own, Ranged) else own)


def _with_layer_norms(config: EncoderConfig, change: Callable[[Place, Any], Any]) -> EncoderConfig:
    """The config with other LayerNorms: `change` gets each one's place and part, and gives a part."""
    layer_norm = tuple(
        tuple(change((layer, place), own) for place, own in enumerate(config.layer_norms_of(layer)))
        for layer in range(config.num_hidden_layers)
    )
    return dataclasses.replace(config, layer_norm=layer_norm)
