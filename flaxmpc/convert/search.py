"""Searches the parts of a student for a budget: what each loses in a short training, and what it costs on shares."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

from flaxmpc import secure
from flaxmpc.convert.budget import Budget, Choice, Part, Table, Where, choose, front
from flaxmpc.convert.calibrate import Attended, Place, calibrated_layer, for_training, ranges
from flaxmpc.convert.finetune import apply_with_states
from flaxmpc.convert.layerwise import alone, apart, forward, through, together
from flaxmpc.data.batches import Batch, Split, batches
from flaxmpc.models.base import WithHead, param_shapes
from flaxmpc.models.config import EncoderConfig
from flaxmpc.models.folder import LoadedModel
from flaxmpc.nn.activation import ACTIVATIONS
from flaxmpc.nn.attention import ATTENTION, Calibrated, scalars_of
from flaxmpc.nn.normalization import CHEBYSHEV, CONSTANT, NORMALIZATIONS, Linear
from flaxmpc.serve.private import private
from flaxmpc.training.losses import masked_mean

STEPS = 100
"""Steps of the short training that a part's loss is measured after."""

_BATCH, _RATE, _HELD_OUT = 32, 3e-4, 256

ATTENTIONS = ("softmax_freediv", "2quad_freediv", "scaling")
ACTS = ("quad", "identity")
NORMS = (CHEBYSHEV.name, CONSTANT.name)
"""What a place may have, beside the teacher's own attention and activation. A polynomial for an inverse root loses
nothing that this training could see: it is as exact as its range asks for.
"""

REFERENCE = {
    "attention": "2quad_freediv",
    "activation": "quad",
    "after_attention": CHEBYSHEV.name,
    "after_feed_forward": CHEBYSHEV.name,
}
"""The part of each kind that costs are differences from."""

NORM_PLACES = ("after_attention", "after_feed_forward")

# What a config has a list of, one for every layer, in place of which another number of layers can be given.
_LISTLESS = {"attention": "softmax", "hidden_act": "gelu", "layer_norm": "layer_norm"}

_TRIES = 5

_DIVERGED = 1e9  # the loss of a part whose logits are not finite


class PartNames(NamedTuple):
    """A choice as `Conversion` has it.

    Attributes:
        attention, activation: a name for every layer.
        layer_norm: two names for every layer.
    """

    attention: tuple[str, ...]
    activation: tuple[str, ...]
    layer_norm: tuple[str, ...]

    @classmethod
    def of(cls, parts: Mapping[Where, str]) -> "PartNames":
        layers = range(len({layer for layer, _ in parts}))
        norms = [parts[layer, field] for layer in layers for field in NORM_PLACES]
        attention, activation = ([parts[layer, field] for layer in layers] for field in ("attention", "activation"))
        return cls(tuple(attention), tuple(activation), tuple(norms))

    @classmethod
    def read(cls, found: Mapping[str, Any], num_layers: int, damaged: str) -> "PartNames":
        """From what search.json holds. ValueError: it holds something else; the message is `damaged`."""
        try:
            made = cls(*(tuple(found["chosen"]["parts"][field]) for field in cls._fields))
        except (KeyError, TypeError) as error:
            raise ValueError(damaged) from error
        if [len(names) for names in made] != [num_layers, num_layers, 2 * num_layers]:
            raise ValueError(damaged)
        return made


class Search(NamedTuple):
    """What a search found.

    Attributes:
        base: what a request costs with the parts of `REFERENCE` everywhere.
        chosen: the choice, its cost as it was measured.
        front: of other budgets the choices, with the costs that were expected of them.
        losses, costs: of each part in each place.
    """

    base: float
    chosen: Choice
    front: list[Choice]
    losses: Table
    costs: Table

    def as_dict(self, budget: Budget) -> dict[str, Any]:
        """What search.json holds."""

        def named(table: Mapping[Where, Any]) -> dict[str, Any]:
            return {f"layer {layer}, {field}": value for (layer, field), value in table.items()}

        return {
            "budget": {"what": budget.what, "most": budget.most},
            "base": self.base,
            "chosen": {**self.chosen._asdict(), "parts": PartNames.of(self.chosen.parts)._asdict()},
            "front": [{**choice._asdict(), "parts": PartNames.of(choice.parts)._asdict()} for choice in self.front],
            "losses": named(self.losses),
            "costs": named(self.costs),
        }


def norm_of(name: str, variances: np.ndarray) -> Any:
    """A normalisation for the variances that a teacher's meets, with their few largest left out."""
    part = NORMALIZATIONS[name]
    if isinstance(part, Linear):
        return part.calibrated(variances)
    return part.calibrated(np.array(ranges({(0, 0): variances})[0, 0]), margin=1.25, tolerance=1e-2)


def with_parts(config: EncoderConfig, parts: Mapping[Where, str], seen: Mapping[Place, np.ndarray]) -> EncoderConfig:
    """A config with a part for every place.

    Args:
        config: of a student, in its size.
        parts: their names.
        seen: the variances (token,) that the teacher's LayerNorms meet, by the places of the student's.
    """
    layers = range(config.num_hidden_layers)
    return dataclasses.replace(
        config,
        attention=[parts[layer, "attention"] for layer in layers],
        hidden_act=[parts[layer, "activation"] for layer in layers],
        layer_norm=[
            [norm_of(parts[layer, field], seen[layer, place]) for place, field in enumerate(NORM_PLACES)]
            for layer in layers
        ],
    )


# ------------------------------------------------------------------------------------------------------- what it costs


def request_cost(model: WithHead, num_tokens: int, parties: secure.Parties) -> secure.Cost:
    """What a request of one text costs, without a plan of bits. Weights are zeros, which cost as much as others."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), param_shapes(model))
    found = private(model, zeros, parties.config)
    ids = np.zeros((1, num_tokens), np.int32)
    shared = found.client(None).share(ids, np.ones_like(ids))
    return secure.jit(found.function, parties=parties).estimate(found.weights, *shared)


def part_costs(
    model: WithHead,
    seen: Mapping[Place, np.ndarray],
    options: Mapping[Where, Sequence[str]],
    of: Callable[[Any], float],
) -> Table:
    """What each part costs in its place more than the one of `REFERENCE`.

    Measured on two layers, as the last one may compute the first token alone. All others have the cost of the first.

    Args:
        model: the student, in its size.
        seen: see `with_parts`.
        options: the parts that each place may have.
        of: what a model costs.
    """
    last = model.config.num_hidden_layers - 1
    layers = (0, last) if last else (0,)

    def cost(changed: Mapping[Where, str]) -> float:
        parts = {(i, field): name for i in range(len(layers)) for field, name in REFERENCE.items()}
        of_two = {(i, place): seen[layer, place] for i, layer in enumerate(layers) for place in (0, 1)}
        small = dataclasses.replace(model.config, **_LISTLESS, num_hidden_layers=len(layers))
        return of(model.clone(config=with_parts(small, {**parts, **changed}, of_two)))

    default = cost({})
    kinds = {(layer == last, field, name) for (layer, field), names in options.items() for name in names}
    measured = {}
    for is_last, field, name in track(sorted(kinds), description="what parts cost"):
        where = (len(layers) - 1 if is_last else 0, field)
        measured[is_last, field, name] = 0.0 if name == REFERENCE[field] else cost({where: name}) - default
    return {
        (layer, field): {name: measured[layer == last, field, name] for name in names}
        for (layer, field), names in options.items()
    }


# ------------------------------------------------------------------------------------------------------- what it loses


_optimizer = optax.adam(_RATE)


def _new_step(model: WithHead) -> Callable[..., Any]:
    """A step of training one layer towards the states that another gives."""

    @jax.jit
    def step(layer: Any, moments: Any, rest: Any, hidden: Any, wanted: Any, batch: Batch) -> Any:
        tokens: Any = (jnp.asarray(batch.attention_mask) * jnp.asarray(batch.row_mask)[:, None])[..., None]

        def loss(layer: Any) -> Any:
            found: Any = through(model, layer, rest, hidden, jnp.asarray(batch.attention_mask)).hidden
            return masked_mean(jnp.square(found - wanted), tokens)

        changes, moments = _optimizer.update(jax.grad(loss)(layer), moments)
        return optax.apply_updates(layer, changes), moments

    return step


_step: Callable[[Any], Callable[..., Any]] = functools.lru_cache(maxsize=16)(_new_step)


class _Teacher:
    """A teacher, layer by layer: what each is given and gives, and the logits that follow from a changed state."""

    def __init__(self, loaded: LoadedModel):
        self.model = loaded.model
        self._params = loaded.params
        self.layers, self.rest = apart(loaded.model, loaded.params)
        self._head = jax.jit(functools.partial(self.model.apply, method="head"), static_argnums=2)

    def states(self, batch: Batch) -> tuple[Any, ...]:
        """The embeddings and the output of every layer, (batch, token, hidden) each."""
        found = apply_with_states(self.model)(self._params, batch).intermediates
        return (found.embeddings, *found.hidden_states)

    def logits(self, hidden: Any, after: int, batch: Batch) -> np.ndarray:
        """Logits (row, label) from the state that a layer gives."""
        for layer in range(after + 1, len(self.layers)):
            hidden = forward(alone(self.model, layer))(
                self.layers[layer], self.rest, hidden, jnp.asarray(batch.attention_mask)
            ).hidden
        return np.asarray(self._head({"params": self._params}, hidden, True))[batch.row_mask > 0]


class _Part(NamedTuple):
    """A part in a place of a layer that is trained alone: the model of this layer, and its parameters."""

    model: WithHead
    params: dict[str, Any]


def _start(teacher: _Teacher, layer: int, batch: Batch, states: Sequence[Any], **parts: Any) -> _Part:
    """A teacher's layer with another part, calibrated on a batch."""
    model = alone(teacher.model, layer, **parts)
    config = model.config
    part: Any = config.attention_of(0)
    params = dict(teacher.layers[layer])
    if "attention" in parts:
        start = scalars_of(part, config.num_attention_heads)
        params |= {f"attention/{name}": value for name, value in start.items()}
    if "attention" in parts and isinstance(part, Calibrated):

        def scores_of(own: Mapping[str, Any]) -> Any:
            changed = params | {f"attention/{name}": leaf for name, leaf in own.items()}
            rest = teacher.rest, states[layer], jnp.asarray(batch.attention_mask)
            return forward(model)(changed, *rest).intermediates.scores[0]

        own = {path.removeprefix("attention/"): leaf for path, leaf in params.items() if path.startswith("attention/")}
        mask = config.mask(jnp.asarray(batch.attention_mask))
        found = calibrated_layer(part, own, Attended(states[layer], scores_of(own), scores_of, mask), config)
        params |= {f"attention/{name}": leaf for name, leaf in found.items()}
    return _Part(model, params)


def part_losses(
    loaded: LoadedModel,
    layers: Sequence[int],
    seen: Mapping[Place, np.ndarray],
    options: Mapping[Where, Sequence[str]],
    train: Split,
    held_out: Split,
    *,
    seed: int,
    steps: int,
) -> Table:
    """What each part loses in its place: the mean squared difference of the logits that it makes, in the variance of
    the teacher's, where it stands alone in the teacher and its layer was trained a little to give what it gave.

    Args:
        loaded: the teacher.
        layers: its layers that the student's start from.
        seen: the variances (token,) that its LayerNorms meet, by the places of the student's.
        options: the parts that each place may have; the teacher's own lose nothing.
        train, held_out: the rows that are trained on, and that the loss is measured on.
        seed: of the rows that are taken.
        steps: of the training.
    """
    teacher, own = _Teacher(loaded), loaded.model.config
    rng = np.random.default_rng(seed)
    first, *some = _drawn(train, rng, steps + 1)
    first = Batch(*(array[first.row_mask > 0] for array in first))
    judged = list(_batches(held_out, rng.permutation(len(held_out))[:_HELD_OUT]))
    known = [teacher.states(batch) for batch in judged]
    theirs = [
        teacher.logits(states[-1], len(teacher.layers), batch) for states, batch in zip(known, judged, strict=True)
    ]
    spread = max(float(np.concatenate(theirs).var(0).mean()), 1e-12)

    def measured(part: _Part, layer: int) -> float:
        errors = []
        for states, batch, wanted in zip(known, judged, theirs, strict=True):
            inputs = teacher.rest, states[layer], jnp.asarray(batch.attention_mask)
            hidden = forward(part.model)(part.params, *inputs).hidden
            errors.append(np.square(teacher.logits(hidden, layer, batch) - wanted))
        return float(np.concatenate(errors).mean() / spread)

    losses: dict[Where, dict[str, float]] = {where: {} for where in options}
    wanted = sorted({(field, name) for (_, field), names in options.items() for name in names})
    for field, name in wanted:
        places = [i for (i, at), names in options.items() if at == field and name in names]
        trained: dict[int, _Part] = {}
        for i in places:
            parts = _changed(own, layers[i], field, name, seen, i)
            if parts is None:
                losses[i, field][name] = 0.0
            else:
                trained[i] = _start(teacher, layers[i], first, teacher.states(first), **parts)
        if not trained:
            continue
        moments = {i: _optimizer.init(part.params) for i, part in trained.items()}
        for batch in track(some, description=f"{field} {name}"):
            states = teacher.states(batch)
            for i, part in trained.items():
                layer = layers[i]
                params, moments[i] = _step(part.model)(
                    part.params, moments[i], teacher.rest, states[layer], states[layer + 1], batch
                )
                trained[i] = part._replace(params=params)
        for i, part in trained.items():
            loss = measured(part, layers[i])
            losses[i, field][name] = loss if np.isfinite(loss) else _DIVERGED
    return losses


def _batches(split: Split, rows: np.ndarray) -> Iterator[Batch]:
    longest = max(len(row) for row in split.input_ids)
    return batches(split[rows], batch_size=_BATCH, lengths=sorted({min(32, longest), longest}))


def _drawn(split: Split, rng: np.random.Generator, count: int) -> list[Batch]:
    """So many batches, of rows that are drawn anew for each."""
    size = min(_BATCH, len(split))
    return [next(_batches(split, rng.choice(len(split), size, replace=False))) for _ in range(count)]


def _changed(
    own: EncoderConfig, layer: int, field: str, name: str, seen: Mapping[Place, np.ndarray], i: int
) -> dict[str, Any] | None:
    """What a part changes in a teacher's layer; None: nothing that training could see."""
    if field == "attention":
        part = ATTENTION[name]
        return None if part == own.attention_of(layer) else {"attention": part}
    if field == "activation":
        act = ACTIVATIONS[name]
        return None if act == own.hidden_act_of(layer) else {"hidden_act": act}
    if name == CHEBYSHEV.name:
        return None
    place, norms = NORM_PLACES.index(field), list(own.layer_norms_of(layer))
    norms[place] = norm_of(name, seen[i, place])
    return {"layer_norm": tuple(norms)}


def near_teacher(
    student: WithHead,
    params: Mapping[str, Any],
    loaded: LoadedModel,
    layers: Sequence[int],
    train: Split,
    *,
    seed: int,
    steps: int,
) -> dict[str, Any]:
    """A student's parameters with each layer trained alone to give what its teacher's gives, from what that is given.

    Without it a student of many other parts may diverge before it has learned anything: layers that don't divide by a
    deviation pass on what they get too large.

    Args:
        student, params: the student as it starts.
        loaded, layers, train, seed, steps: see `part_losses`.
    """
    teacher, (trained, rest) = _Teacher(loaded), apart(student, params)
    finite = student.clone(config=for_training(student.config))
    before = (0, *(layer + 1 for layer in layers[:-1]))
    moments = [_optimizer.init(own) for own in trained]
    for batch in track(_drawn(train, np.random.default_rng(seed), steps), description="layers alone"):
        states = teacher.states(batch)
        for i, layer in enumerate(layers):
            step = _step(alone(finite, i))
            trained[i], moments[i] = step(trained[i], moments[i], rest, states[before[i]], states[layer + 1], batch)
    return together(student, params, trained)


# ---------------------------------------------------------------------------------------------------------- the search


def options_for(teacher: EncoderConfig, layers: Sequence[int]) -> dict[Where, tuple[str, ...]]:
    """The parts that each place of a student may have: ours, and its teacher's attention and activation where they are
    registered.
    """
    found: dict[Where, tuple[str, ...]] = {}
    for i, layer in enumerate(layers):
        attention, act = teacher.attention_of(layer).name, teacher.hidden_act_of(layer).name
        found[i, "attention"] = tuple(name for name in dict.fromkeys((attention, *ATTENTIONS)) if name in ATTENTION)
        found[i, "activation"] = tuple(name for name in dict.fromkeys((act, *ACTS)) if name in ACTIVATIONS)
        found |= {(i, field): NORMS for field in NORM_PLACES}
    if layers:  # else nobody would see that a student diverges, see `private`
        found[len(layers) - 1, "after_feed_forward"] = (CHEBYSHEV.name,)
    return found


def neighbours(num_layers: int) -> list[list[Part]]:
    """The constants after the feed-forward that are not chosen together: those of two layers in a row.

    What one loses is seen with the teacher's states around it. In a student of several in a row nothing holds a state
    that grows, and it grows as a polynomial of a degree of three to the number of layers: with five in a row, and
    `scaling` for attention, stage 1 met scores of 10^20 at its fifth step.
    """
    field = "after_feed_forward"
    return [[((layer + place, field), CONSTANT.name) for place in (0, 1)] for layer in range(num_layers - 1)]


def search(
    loaded: LoadedModel,
    student: WithHead,
    layers: Sequence[int],
    seen: Mapping[Place, np.ndarray],
    train: Split,
    held_out: Split,
    budget: Budget,
    *,
    seed: int,
) -> Search:
    """The parts of a student that lose least within a budget for a request of its longest text on ABY3.

    A choice's cost is taken for the sum of what its parts cost. It is not quite, so it is measured, and where it is
    more than the budget a choice is made for as much less.

    Args:
        loaded: the teacher.
        student: the student, in its size; its parts do not matter.
        layers, seen, train, held_out, seed: see `part_losses`.
        budget: what a request may take.

    Raises:
        ValueError: no choice is within the budget, and says what the cheapest takes.
    """
    options = options_for(loaded.model.config, layers)
    parties = secure.InProcess("ABY3", exp_mode=secure.MODEL_EXP_MODE)
    tokens = student.config.longest

    def cost(model: WithHead) -> float:
        return budget.of(request_cost(model, tokens, parties))

    def measured(parts: Mapping[Where, str]) -> float:
        config = dataclasses.replace(student.config, **_LISTLESS)
        return cost(student.clone(config=with_parts(config, parts, seen)))

    costs = part_costs(student, seen, options, cost)
    base = measured({where: REFERENCE[where[1]] for where in options})
    apart = neighbours(len(layers))
    cheapest = choose(costs, costs, math.inf, apart)
    assert cheapest is not None, "every place has a part that is in no group"
    if (least := measured(cheapest.parts)) > budget.most:
        raise ValueError(
            f"the budget is {budget.text(budget.most)}, and the cheapest parts take {budget.text(least)} "
            f"({tokens} tokens, ABY3): a smaller student takes less, see --num-hidden-layers"
        )
    losses = part_losses(loaded, layers, seen, options, train, held_out, seed=seed, steps=STEPS)
    choices = front(losses, costs, base, apart)
    room = budget.most - base
    for _ in range(_TRIES):
        found = choose(losses, costs, room, apart)
        if found is None:
            break
        own = measured(found.parts)
        if own <= budget.most:
            return Search(base, found._replace(cost=own), choices, losses, costs)
        room = min(room, found.cost) - (own - budget.most)
    lost = sum(losses[where][name] for where, name in cheapest.parts.items())
    return Search(base, Choice(cheapest.parts, lost, least), choices, losses, costs)
