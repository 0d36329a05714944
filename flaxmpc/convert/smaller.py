"""Makes the start of a student that is smaller than its teacher: with fewer layers, heads or features."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxmpc.data.batches import Batch
from flaxmpc.errors import listed
from flaxmpc.models.base import WithHead, param_shapes
from flaxmpc.models.config import EncoderConfig
from flaxmpc.models.params import flatten, moved, unflatten


def layers_kept(own: int, wanted: int | None, named: Sequence[int] = ()) -> tuple[int, ...]:
    """The teacher's layers that a student starts from, and whose hidden states it matches.

    Args:
        own: how many layers the teacher has.
        wanted: how many the student has; None: as many. They are spread evenly over the teacher's, and its last one is
            among them: of 6 layers, 3 are the second, fourth and sixth.
        named: the layers themselves, from 0, in place of their number.

    Raises:
        ValueError: more layers than the teacher has, fewer than one, or not in ascending order.
    """
    if named:
        if list(named) != sorted({*range(own)} & {*named}):
            raise ValueError(f"kept_layers is {listed(named)}: the teacher's are 0 to {own - 1}, each once, ascending")
        return tuple(named)
    wanted = own if wanted is None else wanted
    _require_at_most("num_hidden_layers", wanted, own)
    return tuple((i + 1) * own // wanted - 1 for i in range(wanted))


def _require_at_most(name: str, size: int, most: int) -> None:
    if not min(1, most) <= size <= most:
        raise ValueError(f"{name} is {size}: the teacher has {most}, and its student has 1 to {most}")


def sizes(
    own: EncoderConfig, layers: Sequence[int], num_attention_heads: int | None, intermediate_size: int | None
) -> dict[str, Any]:
    """The fields of a student's config that say how large it is, and the LayerNorms of the teacher's layers it keeps.

    Args:
        own: the teacher's config.
        layers: the teacher's layers that are kept, see `layers_kept`.
        num_attention_heads, intermediate_size: the student's; None: the teacher's.

    Raises:
        ValueError: more than the teacher has, fewer than one, or heads that the teacher's heads can't be merged into.
    """
    wanted = {"num_attention_heads": num_attention_heads, "intermediate_size": intermediate_size}
    found: dict[str, Any] = {name: getattr(own, name) if size is None else size for name, size in wanted.items()}
    for name, size in found.items():
        _require_at_most(name, size, getattr(own, name))
    heads = own.num_attention_heads
    if heads % found["num_attention_heads"]:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"num_attention_heads is {num_attention_heads}, but the teacher's {heads} heads are merged into the "
            f"student's: a divisor, {divisors}"
        )
    return {
        **found,
        "num_hidden_layers": len(layers),
        "layer_norm": tuple(own.layer_norms_of(layer) for layer in layers),
    }


def smaller_params(
    teacher: WithHead,
    params: Mapping[str, Any],
    config: EncoderConfig,
    layers: Sequence[int],
    batches: Iterable[Batch],
) -> dict[str, Any]:
    """A teacher's parameters in the sizes of a student's config, see `sizes`.

    - Layers: those of `layers`, see `layers_kept`.
    - Heads: neighbours are merged. Their features stay, so the scores of a merged head are the sum of theirs, divided
      by the root of their number. A parameter with a number for every head gets the mean of theirs.
    - The feed-forward's features: those stay that move its output most on the batches, by the variance of the
      activation times the squared norm of the feature's row in the second matrix. The others are replaced by their
      mean, which goes into the bias.
    - Scores: layers that share those of another have no queries and keys.
    """
    own, prefix = teacher.config, teacher.base_model_prefix
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    if config.intermediate_size < own.intermediate_size:
        seen = _activations(teacher, params, batches)
        for layer in layers:
            flat |= _fewer_features(flat, f"{prefix}/layer_{layer}", *seen[layer], config.intermediate_size)
    places = {f"{prefix}/layer_{layer}": f"{prefix}/layer_{i}" for i, layer in enumerate(layers)}
    dropped = tuple(f"{prefix}/layer_{layer}/" for layer in range(own.num_hidden_layers) if layer not in layers)
    kept = moved({path: leaf for path, leaf in flat.items() if not path.startswith(dropped)}, places)
    shapes = flatten(param_shapes(teacher.clone(config=config)))
    return unflatten({path: _merged(leaf, shapes[path].shape) for path, leaf in kept.items() if path in shapes})


def _merged(leaf: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter whose last axis is the heads, for as many as there are after merging; any other as it is."""
    return leaf if leaf.shape == shape else leaf.reshape(*shape, -1).mean(-1)


def _activations(
    teacher: WithHead, params: Mapping[str, Any], batches: Iterable[Batch]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The mean and the variance (feature,) of every layer's activation over the tokens of the batches."""
    config = teacher.config

    @jax.jit
    def sums(params: Any, batch: Batch) -> Any:
        _, state = teacher.apply(
            {"params": params},
            *batch.inputs,
            capture_intermediates=lambda module, _: module.name == "intermediate",
            mutable=["intermediates"],
        )
        captured: Any = state["intermediates"][teacher.base_model_prefix]
        tokens = (jnp.asarray(batch.attention_mask) * jnp.asarray(batch.row_mask)[:, None])[..., None]
        found = []
        for layer in range(config.num_hidden_layers):
            (before,) = captured[f"layer_{layer}"]["intermediate"]["__call__"]
            after = config.hidden_act_of(layer)(before)
            found.append([(after**power * tokens).sum((0, 1)) for power in (1, 2)])
        return found, tokens.sum()

    totals, count = jax.tree.map(lambda *each: sum(map(np.float64, each)), *(sums(params, batch) for batch in batches))
    return [(first / count, second / count - (first / count) ** 2) for first, second in totals]


def _fewer_features(
    flat: Mapping[str, np.ndarray], layer: str, mean: np.ndarray, variance: np.ndarray, wanted: int
) -> dict[str, np.ndarray]:
    """A feed-forward's parameters with the features that count most, see `smaller_params`."""
    first, second = f"{layer}/intermediate", f"{layer}/output"
    kernel = flat[f"{second}/kernel"]
    weight = variance * np.square(kernel).sum(-1)
    order = np.argsort(-weight, kind="stable")
    kept, others = np.sort(order[:wanted]), order[wanted:]
    bias = flat[f"{second}/bias"] + mean[others] @ kernel[others]
    return {
        f"{first}/kernel": flat[f"{first}/kernel"][:, kept],
        f"{first}/bias": flat[f"{first}/bias"][kept],
        f"{second}/kernel": kernel[kept],
        f"{second}/bias": bias.astype(np.float32),
    }
