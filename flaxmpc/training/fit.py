"""Trains by AdamW on all devices, with progress, metrics and checkpoints from which a killed run goes on.

Of several hosts (`jax.distributed`) the first keeps checkpoints and metrics, and hands the others what it reads, so
they need no common folder.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxmpc.data.batches import Batch
from flaxmpc.errors import brief, unknown
from flaxmpc.files import claimed
from flaxmpc.models.params import flatten, unflatten
from flaxmpc.training.checkpoint import Checkpoints
from flaxmpc.training.log import TrainingLog

Params = Mapping[str, Any]
Loss = Callable[[Params, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Says how long and how fast a model is trained: by AdamW, with a linear warm-up, then a cosine to zero.

    Attributes:
        epochs: passes over the data; 0 leaves the stage out.
        learning_rate: the rate at the end of the warm-up.
        warmup: the share of all steps that warms up.
        weight_decay: AdamW's, on matrices only.
        clip_norm: the largest norm of the gradient of one step.
        batch_size: sentences in a step, over all devices.
        checkpoint_every: steps between checkpoints within an epoch, after which there is one too; a killed run goes on
            from the last.
        padded_lengths: the numbers of tokens, ascending, that sentences are padded to, and beyond them the model's
            positions. Each has its own program: on an accelerator, where a program takes long to compile and padding
            costs little, few are faster.
        dtype: what a step computes in, float32 or bfloat16; parameters, moments and losses stay float32.
    """

    epochs: int
    learning_rate: float
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    batch_size: int = 32
    checkpoint_every: int = 200
    padded_lengths: tuple[int, ...] = (16, 24, 32, 48, 64, 128, 256, 512)
    dtype: str = "float32"

    def __post_init__(self):
        wanted = {
            "epochs": (self.epochs >= 0, "0 or more"),
            "learning_rate": (0 < self.learning_rate < math.inf, "a finite number above 0"),
            "warmup": (0 <= self.warmup < 1, "a share of the steps, from 0 to below 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "a finite number from 0"),
            "clip_norm": (self.clip_norm > 0, "above 0"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "checkpoint_every": (self.checkpoint_every >= 1, "1 or more"),
        }
        for name, (right, allowed) in wanted.items():
            if not right:
                raise ValueError(f"{name} of a schedule is {getattr(self, name):g}, not {allowed}")
        lengths = self.padded_lengths
        if not lengths or lengths[0] < 1 or list(lengths) != sorted(set(lengths)):
            raise ValueError(f"padded_lengths of a schedule is {brief(lengths)}, not numbers from 1, ascending")
        if self.dtype not in _DTYPES:
            raise unknown("dtype of a schedule", self.dtype, _DTYPES)

    def optimizer(self, num_steps: int) -> optax.GradientTransformation:
        """The optimizer of a run of so many steps."""
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, max(1, int(self.warmup * num_steps)), max(2, num_steps)
        )
        matrices = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)  # noqa: E731
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm), optax.adamw(rate, weight_decay=self.weight_decay, mask=matrices)
        )


def partition(params: Params, frozen: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits parameters into flat dicts: what is trained, and what is frozen, as its path starts with `frozen`."""
    flat = flatten(params)
    return (
        {path: leaf for path, leaf in flat.items() if not (frozen and path.startswith(frozen))},
        {path: leaf for path, leaf in flat.items() if frozen and path.startswith(frozen)},
    )


def merge(trainable: Params, frozen: Params) -> dict[str, Any]:
    """The nested parameters of the two parts that `partition` returned."""
    return unflatten({**trainable, **frozen})


def train_step(loss: Loss, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """Makes one compiled step: (params, moments, frozen, batch, key) -> (state, metrics).

    `params` is what is trained, `moments` the optimizer's and `frozen` the other part of `partition`; the state that
    comes of them is {"params", "optimizer"}. The memory of the given moments goes to the new ones: faster than asking
    for more. The given parameters stay, to see where a loss that is not finite comes from.
    """

    @functools.partial(jax.jit, donate_argnames="moments")
    def step(
        params: Params, moments: Any, frozen: Params, batch: Any, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        (value, metrics), grads = jax.value_and_grad(
            lambda trainable: loss(merge(trainable, frozen), batch, key), has_aux=True
        )(params)
        updates, moments = optimizer.update(grads, moments, params)
        return {"params": optax.apply_updates(params, updates), "optimizer": moments}, {"loss": value, **metrics}

    return step


# A run whose loss has grown this much over its own lowest, both as running means, does not come back.
_DIVERGED = 20.0


class _Divergence:
    """Watches the loss from step to step, for `bad` to say when it will not come back."""

    def __init__(self):
        self._mean: float | None = None
        self._lowest = float("inf")

    def bad(self, loss: float) -> str | None:
        """What is wrong with the loss of the next step; None: nothing."""
        if not np.isfinite(loss):
            return f"the loss is {loss}"
        self._mean = loss if self._mean is None else 0.98 * self._mean + 0.02 * loss
        self._lowest = min(self._lowest, self._mean)
        if self._mean > _DIVERGED * self._lowest + 1.0:
            return f"the loss has grown from {self._lowest:.3g} to {self._mean:.3g}"
        return None


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a run trains for: its loss, what of the parameters may change, and which epoch is the best.

    Attributes:
        loss: (params, prepared batch, key) -> (loss, metrics).
        prepare: makes of a batch what the loss gets: any pytree of arrays whose first axis is the batch's.
        frozen: the start of the paths that are not trained; empty: everything is trained.
        evaluate: called with the parameters after every epoch; the figures that it returns are logged.
        choose_by: the name of the figure, the larger the better, that decides about the epoch whose parameters are
            returned (the last of equals); None takes the last epoch.
        locate: says where in the model a loss that is not finite comes from.
    """

    loss: Loss
    prepare: Callable[[Batch], Any] = lambda batch: batch
    frozen: str = ""
    evaluate: Callable[[Params], dict[str, float]] | None = None
    choose_by: str | None = None
    locate: Callable[[Params, Batch], str] | None = None


class _Started(NamedTuple):
    """A step that devices may still compute: what it was started with, and its metrics."""

    number: int
    batch: Batch
    before: Params
    metrics: dict[str, jax.Array]


Stepped = tuple[int, dict[str, float]]
"""The number of a step, its loss and metrics."""

_AHEAD = 2  # batches that are prepared before they are asked for


class Trainer:
    """The state of a run on all devices of all hosts, and one step after the other.

    Each batch is split over the devices, parameters are on every one.

    Attributes:
        state: {"params": what is trained, "optimizer": its moments}, see `train_step`.
    """

    def __init__(
        self, objective: Objective, params: Params, schedule: Schedule, folder: Path, *, num_steps: int, seed: int
    ):
        """Puts the parameters on the devices, see `fit`. `num_steps` is the number of steps of the whole run."""
        self._objective, self._schedule, self._folder = objective, schedule, folder
        count = jax.device_count()
        if schedule.batch_size % count:
            raise ValueError(
                f"batch_size {schedule.batch_size} is not a multiple of the {count} devices that share a batch"
            )
        mesh = Mesh(np.array(jax.devices()), ("batch",))
        self._split = NamedSharding(mesh, PartitionSpec("batch"))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        optimizer = schedule.optimizer(num_steps)
        trainable, fixed = partition(jax.tree.map(jnp.asarray, dict(params)), objective.frozen)
        self.state = jax.device_put({"params": trainable, "optimizer": optimizer.init(trainable)}, self._everywhere)
        self._fixed = jax.device_put(fixed, self._everywhere)
        self._step = train_step(objective.loss, optimizer)
        self._key = jax.random.key(seed)
        self._divergence = _Divergence()
        self._started: _Started | None = None

    def restore(self, state: Any) -> None:
        """Goes on from a state that was kept."""
        self.state = jax.device_put(state, self._everywhere)

    def whole(self, trained: Params) -> dict[str, Any]:
        """What is trained and what is frozen, as one tree in the memory of this host."""
        return jax.device_get(merge(trained, self._fixed))

    def _rows(self, batch: Batch) -> Any:
        """Every host's rows of a batch, prepared, as one global array. What is on a device already stays there."""
        count = len(batch.row_mask) // jax.process_count()
        start = jax.process_index() * count
        own = self._objective.prepare(Batch(*(array[start : start + count] for array in batch)))

        def placed(leaf: Any) -> jax.Array:
            if isinstance(leaf, jax.Array) and jax.process_count() == 1:
                return jax.device_put(leaf, self._split)
            return jax.make_array_from_process_local_data(self._split, np.asarray(leaf))

        return jax.tree.map(placed, own)

    def ahead(self, numbered: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch, Any]]:
        """Batches with their numbers and their rows, made by a thread of its own while devices compute."""

        def following() -> tuple[int, Batch, Any] | None:
            found = next(numbered, None)
            return None if found is None else (*found, self._rows(found[1]))

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = collections.deque(pool.submit(following) for _ in range(_AHEAD))
            while (found := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(following))
                yield found

    def step(self, number: int, batch: Batch, rows: Any) -> list[Stepped]:
        """Starts step `number`, from 0, over all epochs, and returns the one before, see `finish`.

        So devices have the next step while the host reads what came of the last.
        """
        before = self.state["params"]
        key = jax.random.fold_in(self._key, number)
        self.state, metrics = self._step(before, self.state["optimizer"], self._fixed, rows, key)
        done = self.finish()
        self._started = _Started(number, batch, before, metrics)
        return done

    def finish(self) -> list[Stepped]:
        """Waits for the step that was started last; returns it, or nothing where it was returned before.

        Raises:
            FloatingPointError: the loss is not finite or has diverged; says at which step and in which layer.
        """
        if self._started is None:
            return []
        number, batch, before, metrics = self._started
        self._started = None
        values = {metric: float(value) for metric, value in jax.device_get(metrics).items()}
        if (what := self._divergence.bad(values["loss"])) is not None:
            locate = self._objective.locate
            where = "" if locate is None else f", first in {locate(self.whole(before), batch)}"
            raise FloatingPointError(
                f"{self._folder.name}: {what} at step {number}{where}; a lower learning rate than "
                f"{self._schedule.learning_rate:g} or a longer warm-up than {self._schedule.warmup:g} may do. The last "
                f"checkpoint is in {self._folder}"
            )
        return [(number, values)]


def fit(
    objective: Objective,
    params: Params,
    epoch_batches: Callable[[int], Iterator[Batch]],
    schedule: Schedule,
    folder: Path,
    *,
    seed: int,
) -> dict[str, Any]:
    """Trains, and returns the parameters: after the last step, or of the best epoch.

    A run that was killed goes on from its last checkpoint in `folder`, to the same parameters as without the kill.
    Every batch is split over all of `jax.devices()`, those of all hosts.

    Args:
        objective: what is trained for.
        params: the parameters to start from.
        epoch_batches: the batches of an epoch; the same number for every epoch, and the same batches when asked again.
        schedule: how long and how fast. With 0 epochs the parameters are returned as they are.
        folder: the folder of this run, and of this host: checkpoints (the first host's), metrics.jsonl with one object
            an epoch, and TensorBoard events. Its name is shown with the progress.
        seed: the seed of dropout.

    Raises:
        ValueError: a batch size that the devices do not divide; another run in the folder, see `files.claimed`;
            checkpoints or metrics that are damaged, see `Checkpoints`.
        FloatingPointError: the loss is not finite or has diverged; says at which step and in which layer.
    """
    if schedule.epochs == 0:
        return jax.device_get(dict(params))
    folder.mkdir(parents=True, exist_ok=True)
    steps_per_epoch = sum(1 for _ in epoch_batches(0))
    num_steps = schedule.epochs * steps_per_epoch
    trainer = Trainer(objective, params, schedule, folder, num_steps=num_steps, seed=seed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(claimed(folder))
        latest = stack.enter_context(Checkpoints(folder / "checkpoints"))
        best = None
        if objective.choose_by is not None:
            best = stack.enter_context(Checkpoints(folder / "best", best=objective.choose_by))
        done = max(0, latest.step())
        if done:
            trainer.restore(latest.restore(done, trainer.state))
        if best is not None and done >= steps_per_epoch and best.step() < 0:
            raise ValueError(
                f"{folder / 'best'} lacks the parameters of the best epoch, which was trained: remove {folder}, and it "
                "is trained anew"
            )
        log = TrainingLog(
            folder,
            epochs=schedule.epochs,
            steps_per_epoch=steps_per_epoch,
            batch_size=schedule.batch_size,
            done=done,
        )
        stack.enter_context(log)

        def noted(steps: list[Stepped]) -> None:
            for number, values in steps:
                log.step(number, values)

        for epoch in range(done // steps_per_epoch, schedule.epochs):
            numbered = enumerate(epoch_batches(epoch), epoch * steps_per_epoch)
            left = ((number, batch) for number, batch in numbered if number >= done)
            for number, batch, rows in trainer.ahead(left):
                noted(trainer.step(number, batch, rows))
                if (number + 1) % schedule.checkpoint_every == 0 and (number + 1) % steps_per_epoch:
                    noted(trainer.finish())  # no state of a step that went wrong is kept
                    latest.save(number + 1, trainer.state)
            noted(trainer.finish())
            figures = {} if objective.evaluate is None else objective.evaluate(trainer.whole(trainer.state["params"]))
            if best is not None:
                best.save(epoch, trainer.state["params"], {**figures, "epoch": epoch}, wait=True)
            log.epoch(epoch + 1, figures)
            # Not before: what goes on from the end of an epoch goes on with the next.
            latest.save((epoch + 1) * steps_per_epoch, trainer.state)
        trained = trainer.state["params"]
        return trainer.whole(trained if best is None else best.restore(best.step(), trained))
