"""Stage 0: starts a student near its teacher, layer after layer, before all layers are trained together.

A student starts from its teacher's matrices, whose parts were others, so the first layers are wrong by a little and the
last ones by everything. Trained together, the last layers learn from states that change until the first are done. Here
each layer is first brought to give what the teacher's gives, of what the layers before it give by then.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxmpc.convert.calibrate import Ranges, for_training
from flaxmpc.convert.distill import padded_states
from flaxmpc.convert.finetune import computing, epoch_batches, in_order
from flaxmpc.convert.layerwise import Layers, alone, apart, forward, through, together
from flaxmpc.convert.solve import goals_of, solved
from flaxmpc.data.batches import Batch, Split
from flaxmpc.models.base import WithHead
from flaxmpc.models.folder import LoadedModel
from flaxmpc.models.params import flatten
from flaxmpc.training.checkpoint import Checkpoints
from flaxmpc.training.fit import Loss, Objective, Schedule, fit
from flaxmpc.training.losses import masked_mean, range_loss

_RANGE_WEIGHT = 0.1  # so that what is an e-fold out of its range, everywhere, weighs as a tenth of the variance does


def layer_by_layer(
    student: WithHead,
    params: Mapping[str, Any],
    teacher: LoadedModel,
    layers: Sequence[int],
    rows: Split,
    ranges: Ranges | None,
    schedule: Schedule,
    folder: Path,
    *,
    seed: int,
) -> dict[str, Any]:
    """A student's parameters with each layer solved for, see `solved`, and then trained alone.

    A layer gets what the layers before it give as they are by then, so it mends their errors as far as it can. A run
    that was killed goes on after the last layer that was done.

    Args:
        student, params: the student as it starts.
        teacher: whose layers are to be matched.
        layers: those that the student's are matched with, in their order.
        rows: the texts that it is done on: many more tokens than a matrix has rows.
        ranges: that its LayerNorms' variances are to stay in: what a LayerNorm gives does not tell how large what it
            gets is, so that training alone leaves them. None: any.
        schedule: how long and how fast each layer is trained; with 0 epochs it is solved for alone.
        folder: the folder of this stage: checkpoints, and of each layer's training a folder.
        seed: of the order of the rows.

    Raises:
        FloatingPointError: see `solved` and `fit`.
        ValueError: checkpoints are damaged, see `Checkpoints`.
    """
    finite, most = student.clone(config=for_training(student.config)), student.config.num_positions
    ours, theirs = apart(student, params), apart(teacher.model, teacher.params)
    with Checkpoints(folder / "checkpoints") as kept:
        if (done := max(0, kept.step())) > 0:
            ours = ours._replace(own=jax.tree.map(jnp.asarray, kept.restore(done, ours.own)))
        if done == len(layers):
            return together(student, params, ours.own)
        batches = list(in_order(rows, most=most))
        masks = [jnp.asarray(batch.attention_mask) for batch in batches]
        counts = [mask * jnp.asarray(batch.row_mask)[:, None] for mask, batch in zip(masks, batches, strict=True)]
        states = [_embedded(finite, params, batch) for batch in batches]
        wanted = [_embedded(teacher.model, teacher.params, batch) for batch in batches]
        passed = 0
        for i, layer in enumerate(layers):
            for between in range(passed, layer):
                wanted = _through(teacher.model, between, theirs, wanted, masks)
            passed = layer + 1
            given, wanted = wanted, _through(teacher.model, layer, theirs, wanted, masks)
            if i >= done:
                model, name = alone(finite, i), f"layer_{i}"
                goals = functools.partial(_goals, alone(teacher.model, layer), theirs, layer, given, masks)
                start = solved(model, ours.own[i], ours.rest, states, goals, masks, counts, name)
                towards = _Towards(batches, states, wanted)
                own_ranges = {place: ranges[i, place] for place in (0, 1)} if ranges else {}
                loss = _loss(computing(model, schedule), ours.rest, towards.variance, own_ranges)
                shuffled = epoch_batches(rows, schedule, seed, most)
                trained = fit(Objective(loss, towards), start, shuffled, schedule, folder / name, seed=seed)
                ours.own[i] = flatten(trained)
                del towards  # it holds the states
                kept.save(i + 1, ours.own, wait=True)
            states = _through(finite, i, ours, states, masks)
    return together(student, params, ours.own)


class _Targets(NamedTuple):
    """What a layer gets and is to give, (batch, token, hidden), and which tokens count, (batch, token)."""

    hidden: Any
    wanted: Any
    attention_mask: Any
    counts: Any


class _Towards:
    """What a layer gets and is to give on all rows.

    Attributes:
        variance: the mean variance of what it is to give, of a feature.
    """

    def __init__(self, batches: Sequence[Batch], states: Sequence[Any], wanted: Sequence[Any]):
        self._rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for batch, *both in zip(batches, map(np.asarray, states), map(np.asarray, wanted), strict=True):
            for row in np.flatnonzero(batch.row_mask):
                n = int(batch.attention_mask[row].sum())
                given, goal = (of[row, :n] for of in both)
                self._rows[int(batch.place[row])] = given, goal
        every = np.concatenate([goal for _, goal in self._rows.values()])
        self.variance = max(float(every.var(0).mean()), 1e-12)

    def __call__(self, batch: Batch) -> _Targets:
        """Of the rows of a batch; 0 on padding."""
        rows = [self._rows[place] for place in batch.place.tolist()]
        tokens = batch.input_ids.shape[1]
        hidden, wanted = (padded_states([row[part] for row in rows], batch.row_mask, tokens) for part in (0, 1))
        return _Targets(hidden, wanted, batch.attention_mask, batch.attention_mask * batch.row_mask[:, None])


def _loss(model: WithHead, rest: Mapping[str, Any], variance: float, ranges: Mapping[int, tuple[float, float]]) -> Loss:
    """Makes the loss of a layer that is trained alone: the mean squared error of what it gives, in the variance of what
    it is to give; and the range loss of its two LayerNorms.
    """

    def loss(params: Mapping[str, Any], targets: _Targets, _: jax.Array):
        found = through(model, flatten(params), rest, targets.hidden, targets.attention_mask)
        error = masked_mean(jnp.square(found.hidden - targets.wanted), targets.counts[..., None]) / variance
        (variances,) = found.intermediates.variances
        outside = range_loss(dict(enumerate(variances)), ranges, targets.counts)
        return error + _RANGE_WEIGHT * outside, {"error": error, "range_loss": outside}

    return loss


def _embedded(model: WithHead, params: Mapping[str, Any], batch: Batch) -> Any:
    """The embeddings that the layers get, (batch, token, hidden)."""
    ids, mask, types = batch.inputs
    return _embed(model)({"params": params}, ids, types, mask)


_embed: Callable[[Any], Callable[..., Any]] = functools.lru_cache(maxsize=4)(
    lambda model: jax.jit(functools.partial(model.apply, method="embed"))
)


def _goals(model: WithHead, teacher: Layers, layer: int, given: Sequence[Any], masks: Sequence[Any], batch: int) -> Any:
    """What a student's dense layers are to give in a batch, see `goals_of`."""
    return goals_of(model)(teacher.own[layer], teacher.rest, given[batch], masks[batch])


def _through(model: WithHead, layer: int, layers: Layers, states: Sequence[Any], masks: Sequence[Any]) -> list[Any]:
    """States through a layer of a model."""
    step = forward(alone(model, layer))
    pairs = zip(states, masks, strict=True)
    return [step(layers.own[layer], layers.rest, state, mask).hidden for state, mask in pairs]
