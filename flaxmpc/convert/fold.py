"""Folding: free algebra before compiling. The same function in real numbers, far fewer bytes and rounds in MPC."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxmpc.models.config import BertConfig
from flaxmpc.models.params import flatten, unflatten
from flaxmpc.nn.activation import ACTIVATIONS, SquareForm
from flaxmpc.nn.normalization import power_of_two

Flat = dict[str, np.ndarray]

# What reads the last hidden state: whichever of these a model has.
_FIRST_OF_HEAD = ("bert/pooler", "classifier", "qa_outputs", "transform")


class _Affine:
    """x = scale z + bias, a LayerNorm's last step, and how it goes into what reads x (z as `FoldedLayer` has it)."""

    def __init__(self, scale: np.ndarray, bias: np.ndarray):
        self.scale, self.bias = scale, bias

    def into(self, kernel: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x W + b = z (scale W) + (bias W + b)."""
        return self.scale[:, None] * kernel, self.bias @ kernel + bias

    def residual(self) -> np.ndarray:
        """The matrix that adds x without its bias to a sum: scale on the diagonal."""
        return np.diag(self.scale)


def _size(hidden: int) -> float:
    """How much larger than the hidden state's deviation a folded layer computes it, see `square_mean_by_product`."""
    return math.sqrt(power_of_two(hidden) / hidden)


def _centred(matrix: np.ndarray) -> np.ndarray:
    """The matrix after which the mean over the features is 0, and their size is `_size`."""
    return (matrix - matrix.mean(-1, keepdims=True)) * _size(matrix.shape[-1])


def _after_layer_norm(layer: Flat, name: str) -> _Affine:
    scale = layer[f"{name}/scale"]
    return _Affine(scale / _size(len(scale)), layer[f"{name}/bias"])


def _fold_layer(layer: Flat, before: _Affine, config: BertConfig, index: int) -> tuple[Flat, _Affine]:
    """A layer of `FoldedLayer`, and the step that its last LayerNorm leaves to what follows."""
    part = config.attention_of(index)
    heads, size = config.num_attention_heads, config.head_size
    to_query, to_value = np.full(heads, size**-0.5), np.ones(heads)
    shift = layer.get("attention/shift")
    if "attention/scale" in layer:
        a, rest = (np.asarray(factor, np.float64) for factor in part.split_scale(jnp.asarray(layer["attention/scale"])))
        to_query, to_value = to_query * a, to_value * rest
        shift = None if shift is None else shift * a

    def projection(name: str, factor: np.ndarray) -> np.ndarray:
        """Rows: hidden, then the bias; columns by head."""
        kernel, bias = before.into(layer[f"attention/{name}/kernel"], layer[f"attention/{name}/bias"])
        rows = np.concatenate([kernel, bias[None]])
        return rows.reshape(-1, heads, size) * factor[:, None]

    query, key, value = projection("query", to_query), projection("key", np.ones(heads)), projection("value", to_value)
    folded: Flat = {}
    if shift is not None:
        if config.score_degree is None:
            folded["shift"] = shift
        else:  # one more feature of queries and keys, whose product is a^2 c
            extra = np.zeros((2, config.hidden_size + 1, heads, 1))
            extra[0, -1, :, 0], extra[1, -1, :, 0] = shift, 1.0
            query, key = np.concatenate([query, extra[0]], -1), np.concatenate([key, extra[1]], -1)
    folded["qkv/kernel"] = np.concatenate([m.reshape(config.hidden_size + 1, -1) for m in (query, key, value)], -1)
    bias = layer["attention/output/bias"] + before.bias
    folded["attention_output/kernel"] = _centred(
        np.concatenate([layer["attention/output/kernel"], before.residual(), bias[None]])
    )

    between = _after_layer_norm(layer, "attention_layer_norm")
    form = config.hidden_act_of(index).square_form or SquareForm(1.0, 0.0, 0.0)
    kernel, bias = between.into(layer["intermediate/kernel"], layer["intermediate/bias"])
    folded["intermediate/kernel"], folded["intermediate/bias"] = form.scale * kernel, form.scale * bias + form.shift
    kernel = layer["output/kernel"]
    folded["output/kernel"] = _centred(np.concatenate([kernel, between.residual()]))
    folded["output/bias"] = _centred(layer["output/bias"] + form.offset * kernel.sum(0) + between.bias)
    return folded, _after_layer_norm(layer, "output_layer_norm")


def fold(params: Mapping[str, Any], config: BertConfig) -> tuple[dict[str, Any], BertConfig]:
    """Parameters and a config of the same function that cost less in MPC; see `flaxmpc.models.folded` for its form.

    - 1/sqrt(d), r_h and c go into the matrix of Q, K and V, which is one;
    - mask and 1/n go into the state, where the attention's numerators allow it;
    - an activation that is a square (`quad`) becomes x^2, its scale, shift and offset go into the matrices around it;
    - a LayerNorm's mean, scale and bias, and the residual, go into the matrices around it;
    - token type 0 is added to the positions.

    Args:
        params: of any of the BERT models with a head; left as they are.
        config: theirs.

    Raises:
        ValueError: the config is of a folded model already.
    """
    if config.folded:
        raise ValueError("the model is folded already")
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    step = _Affine(np.ones(config.hidden_size), np.zeros(config.hidden_size))
    for index in range(config.num_hidden_layers):
        prefix = f"bert/layer_{index}/"
        layer = {path.removeprefix(prefix): flat.pop(path) for path in list(flat) if path.startswith(prefix)}
        folded, step = _fold_layer(layer, step, config, index)
        flat |= {prefix + path: leaf for path, leaf in folded.items()}
    for head in _FIRST_OF_HEAD:
        if f"{head}/kernel" in flat:
            flat[f"{head}/kernel"], flat[f"{head}/bias"] = step.into(flat[f"{head}/kernel"], flat[f"{head}/bias"])
            break
    form = config.hidden_act_of(-1).square_form
    if "transform/kernel" in flat and form is not None:  # its LayerNorm takes the offset away
        flat["transform/kernel"] *= form.scale
        flat["transform/bias"] = form.scale * flat["transform/bias"] + form.shift
    types = flat["bert/embeddings/token_type_embeddings"]
    flat["bert/embeddings/position_embeddings"] += types[0]
    flat["bert/embeddings/token_type_embeddings"] = types - types[0]
    return unflatten({path: leaf.astype(np.float32) for path, leaf in flat.items()}), fold_config(config)


def fold_config(config: BertConfig) -> BertConfig:
    """The config of what `fold` makes: with it a model's parameters have the shapes of the folded ones."""
    activations = [config.hidden_act_of(index) for index in range(config.num_hidden_layers)]
    activations = [act if act.square_form is None else ACTIVATIONS["square"] for act in activations]
    uniform = activations[0] if len(set(activations)) == 1 else tuple(activations)
    return dataclasses.replace(config, hidden_act=uniform, folded=True)
