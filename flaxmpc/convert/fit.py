"""The training loop of fine-tuning and distillation: AdamW, progress, metrics as JSONL, resumable checkpoints."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flaxmpc.convert.data import Batch
from flaxmpc.models.params import flatten, unflatten

Params = Mapping[str, Any]
Loss = Callable[[Params, Params, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and how fast: AdamW, linear warm-up, then a cosine to zero.

    Attributes:
        epochs: passes over the data.
        learning_rate: at the end of the warm-up.
        warmup: the share of all steps that warms up.
        weight_decay: of AdamW, on matrices only.
        clip_norm: the largest norm of the gradient of one step.
        batch_size: sentences a step.
        checkpoint_every: steps between checkpoints; a killed run goes on from the last.
    """

    epochs: int
    learning_rate: float
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    batch_size: int = 32
    checkpoint_every: int = 200

    def optimizer(self, num_steps: int) -> optax.GradientTransformation:
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, max(1, int(self.warmup * num_steps)), max(2, num_steps)
        )
        matrices = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)  # noqa: E731
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm), optax.adamw(rate, weight_decay=self.weight_decay, mask=matrices)
        )


def partition(params: Params, frozen: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits into what is trained and what is frozen: everything whose path starts with `frozen`. Flat dicts."""
    flat = flatten(params)
    return (
        {path: leaf for path, leaf in flat.items() if not path.startswith(frozen)},
        {path: leaf for path, leaf in flat.items() if path.startswith(frozen)},
    )


def merge(trainable: Params, frozen: Params) -> dict[str, Any]:
    """The nested parameters of the two parts that `partition` returned."""
    return unflatten({**trainable, **frozen})


def fit(
    loss: Loss,
    params: Params,
    epoch_batches: Callable[[int], Iterator[Batch]],
    schedule: Schedule,
    folder: Path,
    *,
    name: str,
    seed: int,
    teacher_params: Params | None = None,
    frozen: str = "bert/embeddings/",
    evaluate: Callable[[Params], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Trains, and returns the parameters after the last step.

    A run that was killed goes on from its last checkpoint in `folder`, to the same parameters as without the kill.

    Args:
        loss: (params, teacher_params, batch, key) -> (loss, metrics).
        params: where to start.
        epoch_batches: the batches of an epoch; the same number for every epoch, and the same batches when asked again.
        schedule: see `Schedule`.
        folder: of this run: checkpoints, and metrics.jsonl with one object a line.
        name: shown with the progress.
        seed: of dropout.
        teacher_params: handed to the loss; empty where there is no teacher.
        frozen: the start of the paths that are not trained.
        evaluate: called with the parameters after every epoch; what it returns is logged.

    Raises:
        FloatingPointError: the loss is not finite; says at which step.
    """
    import orbax.checkpoint as ocp

    folder.mkdir(parents=True, exist_ok=True)
    steps_per_epoch = sum(1 for _ in epoch_batches(0))
    num_steps = schedule.epochs * steps_per_epoch
    optimizer = schedule.optimizer(num_steps)
    trainable, fixed = partition(jax.tree.map(jnp.asarray, dict(params)), frozen)
    state = {"params": trainable, "optimizer": optimizer.init(trainable)}
    teacher = jax.tree.map(jnp.asarray, dict(teacher_params or {}))
    key = jax.random.key(seed)

    @jax.jit
    def step(
        state: dict[str, Any], fixed: Params, teacher: Params, batch: Batch, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        def of_trainable(trainable: Params):
            return loss(merge(trainable, fixed), teacher, batch, key)

        (value, metrics), grads = jax.value_and_grad(of_trainable, has_aux=True)(state["params"])
        updates, moments = optimizer.update(grads, state["optimizer"], state["params"])
        new = {"params": optax.apply_updates(state["params"], updates), "optimizer": moments}
        return new, {"loss": value, **metrics}

    manager = ocp.CheckpointManager(
        folder.absolute() / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    done = manager.latest_step() or 0
    if done:
        state = manager.restore(done, args=ocp.args.StandardRestore(state))  # pyright: ignore[reportCallIssue]
    metrics_file = folder / "metrics.jsonl"
    # Epochs that a killed run logged after its last checkpoint are run, and logged, again.
    lines = metrics_file.read_text().splitlines(keepends=True) if metrics_file.is_file() else []
    metrics_file.write_text("".join(line for line in lines if json.loads(line)["epoch"] <= done // steps_per_epoch))

    with (
        manager,
        metrics_file.open("a") as log,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
        ) as progress,
    ):
        bar = progress.add_task(name, total=num_steps, completed=done, loss=float("nan"))
        for epoch in range(done // steps_per_epoch, schedule.epochs):
            totals: dict[str, float] = {}
            started, count = time.perf_counter(), 0
            for i, batch in enumerate(epoch_batches(epoch)):
                number = epoch * steps_per_epoch + i
                if number < done:
                    continue
                state, metrics = step(state, fixed, teacher, batch, jax.random.fold_in(key, number))
                values = {metric: float(value) for metric, value in metrics.items()}
                if not jnp.isfinite(values["loss"]):
                    raise FloatingPointError(
                        f"{name}: the loss is {values['loss']} at step {number}; a lower learning rate than "
                        f"{schedule.learning_rate:g} may do. The last checkpoint is in {folder}"
                    )
                count += 1
                totals = {metric: totals.get(metric, 0.0) + value for metric, value in values.items()}
                progress.update(bar, completed=number + 1, loss=values["loss"])
                if (number + 1) % schedule.checkpoint_every == 0 or number + 1 == num_steps:
                    manager.save(number + 1, args=ocp.args.StandardSave(state))  # pyright: ignore[reportCallIssue]
            seconds = time.perf_counter() - started
            record = {"name": name, "epoch": epoch + 1, "seconds": round(seconds, 1)}
            record |= {metric: total / max(count, 1) for metric, total in totals.items()}
            if evaluate is not None:
                record |= evaluate(merge(state["params"], fixed))
            log.write(json.dumps(record) + "\n")
            log.flush()
            progress.console.print(record)
    return jax.device_get(merge(state["params"], fixed))
