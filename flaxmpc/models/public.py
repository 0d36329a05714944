"""Makes the first layers of an encoder public: they go to its embeddings, which the client computes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flaxmpc.models.base import WithHead, param_shapes
from flaxmpc.models.config import PublicLayers
from flaxmpc.models.params import flatten, moved, unflatten
from flaxmpc.nn.attention import ATTENTION
from flaxmpc.nn.normalization import EXACT


def with_public_layers(model: WithHead, params: Mapping[str, Any], count: int) -> tuple[WithHead, dict[str, Any]]:
    """The same function, with the first `count` layers among the embeddings: `layer_0` of the encoder is then what
    follows them.

    They are for layers that stay as they were published. What was trained on secret data is no client's to see.

    Raises:
        ValueError: fewer than one or more layers than there are, layers that are public already, parts that are not
            exact, an encoder of somebody's whose embeddings take none, or see `EncoderConfig`.
    """
    own = model.config
    if own.public_layers is not None:
        raise ValueError(f"{own.public_layers.num_hidden_layers} layers are public already: start from the published")
    if not 1 <= count <= own.num_hidden_layers:
        raise ValueError(f"public_layers is {count}: the encoder has {own.num_hidden_layers} layers, so 1 to as many")
    acts = [own.hidden_act_of(layer) for layer in range(count)]
    for layer, act in enumerate(acts):
        exact = own.attention_of(layer) == ATTENTION["softmax"] and own.layer_norms_of(layer) == (EXACT, EXACT)
        if not exact or act != acts[0] or own.layers_sharing_scores > 1:
            raise ValueError(f"layer {layer} has other parts than a published encoder: it can't be public")
    rest = range(count, own.num_hidden_layers)
    config = dataclasses.replace(
        own,
        public_layers=PublicLayers(count, own.num_attention_heads, own.intermediate_size, acts[0]),
        num_hidden_layers=len(rest),
        attention=tuple(own.attention_of(layer) for layer in rest),
        hidden_act=tuple(own.hidden_act_of(layer) for layer in rest),
        layer_norm=tuple(own.layer_norms_of(layer) for layer in rest),
    )
    prefix = model.base_model_prefix
    places = {f"{prefix}/layer_{layer}": f"{prefix}/embeddings/layer_{layer}" for layer in range(count)}
    places |= {f"{prefix}/layer_{layer}": f"{prefix}/layer_{i}" for i, layer in enumerate(rest)}
    made = model.clone(config=config)
    found = moved(flatten(params), places)
    if found.keys() != flatten(param_shapes(made)).keys():
        raise ValueError(f"the embeddings of {type(model).__name__} take no layers: none can be public")
    return made, unflatten(found)
