"""A model one layer at a time: each layer is a model of one, whose parameters stand apart."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxmpc.models.base import WithHead
from flaxmpc.models.outputs import EncoderOutput
from flaxmpc.models.params import flatten, unflatten


class Layers(NamedTuple):
    """The parameters of a model, apart.

    Attributes:
        own: of each layer by their paths in it, such as "attention/query/kernel".
        rest: of what stands beside the layers, by their paths in the model, such as a bias of positions; not the
            embeddings'.
    """

    own: list[dict[str, Any]]
    rest: dict[str, Any]


def apart(model: WithHead, params: Mapping[str, Any]) -> Layers:
    """A model's parameters by layers."""
    flat, prefix = flatten(jax.tree.map(jnp.asarray, dict(params))), model.base_model_prefix
    places = [f"{prefix}/layer_{layer}/" for layer in range(model.config.num_hidden_layers)]
    own = [{path.removeprefix(at): leaf for path, leaf in flat.items() if path.startswith(at)} for at in places]
    inside = tuple(f"{prefix}/{name}" for name in ("layer_", "embeddings/"))
    return Layers(own, {path: leaf for path, leaf in flat.items() if not path.startswith(inside)})


def together(model: WithHead, params: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A model's parameters with other ones of its layers, as `apart` gives them."""
    prefix = model.base_model_prefix
    changed = {f"{prefix}/layer_{i}/{path}": leaf for i, layer in enumerate(own) for path, leaf in layer.items()}
    return unflatten(jax.device_get({**flatten(params), **changed}))


def alone(model: WithHead, layer: int, **parts: Any) -> WithHead:
    """A model of one layer of another, with other parts."""
    own = model.config
    kept = {
        "attention": own.attention_of(layer),
        "hidden_act": own.hidden_act_of(layer),
        "layer_norm": own.layer_norms_of(layer),
    }
    fields = {name: (part,) for name, part in {**kept, **parts}.items()}
    return model.clone(config=dataclasses.replace(own, **fields, num_hidden_layers=1))


def through(
    model: WithHead, layer: Mapping[str, Any], rest: Mapping[str, Any], hidden: Any, attention_mask: Any
) -> EncoderOutput:
    """A state (batch, token, hidden) through the layer of a model of one."""
    params = unflatten({**rest, **{f"{model.base_model_prefix}/layer_0/{path}": leaf for path, leaf in layer.items()}})
    mask = model.config.mask(attention_mask)
    return model.apply({"params": params}, hidden, mask, method=lambda module, *args: module.encoder.encode(*args))  # pyright: ignore[reportReturnType]


forward: Callable[[Any], Callable[..., Any]] = functools.lru_cache(maxsize=16)(
    lambda model: jax.jit(functools.partial(through, model))
)
"""(model of one layer) -> (layer, rest, hidden, attention mask) -> `through`, compiled once for a model."""
