"""Solves for the matrices of a student's layer, so that it gives what its teacher's gives.

A student starts from its teacher's matrices, but these were trained for other parts: a square gives other numbers than
a GELU. Of every dense layer it is known what it gets, from the layers before it, and what it should give, from the
teacher. So its best matrix is that of a least-squares problem, and training goes on from there. It is how pruned and
quantized layers are mended without training, one after the other (Optimal Brain Compression, arXiv 2208.11580, eq. 1).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from flaxmpc.convert.calibrate import Attended, calibrated_layer
from flaxmpc.convert.layerwise import forward, through
from flaxmpc.models.base import WithHead
from flaxmpc.nn.attention import Calibrated
from flaxmpc.nn.layers import Dense, Norm

_RIDGE = 1e-3  # of the mean square of what a dense layer gets

# The dense layers of a block, those that can be solved for at once together. Each is to give what the teacher's gives;
# or, where a LayerNorm is named, what its output and the residual make is to be what the teacher's LayerNorm gets.
_ORDER: tuple[Mapping[str, str | None], ...] = (
    {"attention/query": None, "attention/key": None, "attention/value": None},
    {"attention/output": "attention_layer_norm"},
    {"intermediate": None},
    {"output": "output_layer_norm"},
)


def solved(
    model: WithHead,
    start: Mapping[str, Any],
    rest: Mapping[str, Any],
    states: Sequence[Any],
    goals: Callable[[int], Any],
    masks: Sequence[Any],
    counts: Sequence[Any],
    name: str,
) -> dict[str, Any]:
    """The parameters of a student's layer, with its matrices solved for, and its attention calibrated again.

    Args:
        model, start, rest: a model of this layer, its parameters, and those beside, see `flaxmpc.convert.layerwise`.
        states: what it gets in each batch, (batch, token, hidden): of many more tokens than a matrix has rows.
        goals: computes what its dense layers are to give in batch number i, see `goals_of`: for all batches it would be
            ten times what the states are.
        masks: which tokens each text of a batch has, (batch, token).
        counts: which of them count, (batch, token).
        name: the layer's, for the progress and for messages.

    Raises:
        FloatingPointError: what a dense layer gets is not finite.
    """
    own = dict(start)
    parts = [(group, batch) for group in range(len(_ORDER)) for batch in range(len(states))]
    totals: Any = None
    for group, batch in track(parts, description=f"{name}, least squares"):
        given = states[batch], goals(batch), masks[batch], counts[batch]
        found = jax.tree.map(np.float64, _sums(model, group)(own, rest, *given))
        totals = jax.tree.map(np.add, totals, found) if batch else found
        if batch + 1 < len(states):
            continue
        for path, sums in totals.items():
            if not all(np.isfinite(each).all() for each in sums):
                raise FloatingPointError(f"{name} can't be solved for: what {path} gets is not finite on some text")
            own |= _nearest(path, own, *sums)
        if "attention/query" in _ORDER[group]:
            own |= _calibrated(model, own, rest, states[0], masks[0], counts[0])
    return own


def _nearest(name: str, own: Mapping[str, Any], gram: np.ndarray, product: np.ndarray) -> dict[str, Any]:
    """A dense layer's parameters by least squares, with a ridge: what the rows do not tell stays as it was."""
    start = np.concatenate([own[f"{name}/kernel"], own[f"{name}/bias"][None]]).astype(np.float64)
    ridge = _RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    found = (start + np.linalg.solve(gram + ridge, product - gram @ start)).astype(np.float32)
    return {f"{name}/kernel": found[:-1], f"{name}/bias": found[-1]}


def _met(
    model: WithHead, own: Mapping[str, Any], rest: Mapping[str, Any], hidden: Any, mask: Any
) -> dict[str, tuple[Any, Any]]:
    """What every dense layer and every LayerNorm of a layer gets and gives, by their paths in it."""
    found: dict[str, tuple[Any, Any]] = {}

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        gives = call(*args, **kwargs)
        if isinstance(context.module, (Dense, Norm)) and context.method_name == "__call__":
            _, _, *path = context.module.path
            found["/".join(path)] = args[0], gives
        return gives

    with nn.intercept_methods(watch):
        through(model, own, rest, hidden, mask)
    return found


def _new_goals(teacher: WithHead) -> Callable[..., Any]:
    """Makes what computes a teacher's layer: the goals of `_ORDER`, by the dense layers' names."""

    @jax.jit
    def goals(own: Any, rest: Any, hidden: Any, mask: Any):
        met = _met(teacher, own, rest, hidden, mask)
        every = [pair for names in _ORDER for pair in names.items()]
        return {name: met[name][1] if norm is None else met[norm][0] for name, norm in every}

    return goals


goals_of: Callable[[Any], Callable[..., Any]] = functools.lru_cache(maxsize=16)(_new_goals)
"""(model of one of a teacher's layers) -> (layer, rest, hidden, attention mask) -> what a student's dense layers are to
give in its place, by their names; compiled once for a model."""


def _new_sums(model: WithHead, group: int) -> Callable[..., Any]:
    """Makes what sums, over the tokens of a batch, the products that the least squares of `_ORDER[group]` need.

    It gives by the dense layer's name: the products of what it gets, and a 1 for its bias, with itself (n, n); and with
    what it should give (n, features). Sums are compared as a LayerNorm sees them, in the teacher's deviations.
    """

    @jax.jit
    def sums(own: Any, rest: Any, hidden: Any, goals: Any, mask: Any, counts: Any):
        met = _met(model, own, rest, hidden, mask)
        residual = {"attention/output": hidden, "output": met["attention_layer_norm"][1]}
        found = {}
        for name in _ORDER[group]:
            goal = goals[name]
            if met[name][1].shape != goal.shape:
                continue  # a student's feed-forward may have fewer features
            weight: Any = counts[..., None]
            if name in residual:
                weight = weight / jnp.maximum(goal.var(-1, keepdims=True), 1e-6)
                goal = goal - residual[name]
            given = jnp.concatenate([met[name][0], jnp.ones_like(weight)], -1)
            given, goal = given.reshape(-1, given.shape[-1]), goal.reshape(-1, goal.shape[-1])
            weighted = (given * weight.reshape(-1, 1)).T
            # On an accelerator products are rounded more by default, and of these small differences are taken.
            found[name] = tuple(jnp.matmul(weighted, each, precision="highest") for each in (given, goal))
        return found

    return sums


_sums: Callable[..., Callable[..., Any]] = functools.lru_cache(maxsize=16)(_new_sums)


def _calibrated(model: WithHead, own: Mapping[str, Any], rest: Any, hidden: Any, mask: Any, counts: Any) -> Any:
    """The parameters of an attention, whose scores have changed, with its part's scalars set again."""
    part = model.config.attention_of(0)
    if not isinstance(part, Calibrated):
        return {}
    used = np.asarray(counts)[:, 0] > 0
    hidden, mask = hidden[used], mask[used]

    def scores_of(changed: Mapping[str, Any]) -> Any:
        layer = {**own, **{f"attention/{name}": leaf for name, leaf in changed.items()}}
        return forward(model)(layer, rest, hidden, mask).intermediates.scores[0]

    attention = {path.removeprefix("attention/"): leaf for path, leaf in own.items() if path.startswith("attention/")}
    attended = Attended(hidden, scores_of(attention), scores_of, model.config.mask(mask))
    found = calibrated_layer(part, attention, attended, model.config)
    return {f"attention/{name}": leaf for name, leaf in found.items()}
