"""Fine-tuning MiniLM-L6 on movie sentences: sentences a second of `fit`, against PyTorch with transformers.

    python benchmarks/train_speed.py [--json] [--show] [--quick]

The same weights, batches and lengths, AdamW with the same trained parameters, clipping and dropout, float32, the same
threads or the same accelerator, in one process: blocks of the same steps in turn, and the median of the blocks' ratios.
Ours is the loop of `fit`: batches prepared ahead, metrics read a step late, the loss watched. A third side, `products`,
is the profile: the step's matrix products alone, forward and backward, without anything between them.
PyTorch is in no lock file: pip install 'flaxmpc[bench-torch]'. About 5 minutes on 2 idle cores. XLA_FLAGS and
GLIBC_TUNABLES are recorded: train/movie.py names those that train faster.
"""

import functools
import importlib
import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from harness import Benchmark, Options, Record, held

from flaxmpc.convert.finetune import classification_loss
from flaxmpc.convert.recipe import minilm_l6
from flaxmpc.data import tasks
from flaxmpc.data.batches import Batch, batches
from flaxmpc.models import folder as folders
from flaxmpc.models.params import flatten
from flaxmpc.secure.cost import provenance
from flaxmpc.training.fit import Objective, Schedule, Trainer

OURS, THEIRS = "flaxmpc", "torch"
SCHEDULE = Schedule(epochs=3, learning_rate=5e-5)
REPETITIONS, STEPS = 7, 12


class Ours:
    """The loop of `fit`."""

    def __init__(self):
        base = folders.load_pretrained(minilm_l6(), id2label=("negative", "positive"))
        objective = Objective(classification_loss(base.model), frozen="bert/embeddings/")
        self.trainer = Trainer(objective, base.params, SCHEDULE, Path("train_speed"), num_steps=1000, seed=0)
        self.trained = sum(leaf.size for leaf in self.trainer.state["params"].values())

    def steps(self, found: list[Batch]) -> list[float]:
        done = []
        for number, batch, rows in self.trainer.ahead(iter(enumerate(found))):
            done += self.trainer.step(number, batch, rows)
        return [values["loss"] for _, values in done + self.trainer.finish()]


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise SystemExit("train_speed needs PyTorch: pip install 'flaxmpc[bench-torch]'") from None


class Theirs:
    """A step as transformers' Trainer takes it: default attention, fused AdamW."""

    def __init__(self):
        self.torch = torch = _torch()
        from transformers import BertForSequenceClassification

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.manual_seed(0)
        self.device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        self.model: Any = BertForSequenceClassification.from_pretrained(minilm_l6(), num_labels=2)
        self.model.to(self.device)
        self.model.train()
        self.model.bert.embeddings.requires_grad_(False)
        self.params = [leaf for leaf in self.model.parameters() if leaf.requires_grad]
        self.trained = sum(leaf.numel() for leaf in self.params)
        matrices = [leaf for leaf in self.params if leaf.ndim > 1]
        vectors = [leaf for leaf in self.params if leaf.ndim == 1]
        groups = [{"params": matrices, "weight_decay": SCHEDULE.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=SCHEDULE.learning_rate, fused=True)

    def steps(self, found: list[Batch]) -> list[float]:
        return [loss.item() for loss in [self._step(batch) for batch in found]]  # read once all have been started

    def _step(self, batch: Batch) -> Any:
        rows = {name: self.torch.from_numpy(getattr(batch, name)).long().to(self.device)
                for name in ("input_ids", "attention_mask", "token_type_ids")}  # fmt: skip
        loss = self.model(**rows, labels=self.torch.from_numpy(batch.label).long().to(self.device)).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.params, SCHEDULE.clip_norm)
        self.optimizer.step()
        return loss.detach()


class Products:
    """The step's matrix products alone: the model without activations, softmax, LayerNorms, biases and dropout."""

    def __init__(self):
        base = folders.load_pretrained(minilm_l6())
        config = base.model.config
        flat = flatten(base.params)
        self.kernels = {path: leaf for path, leaf in flat.items() if "/layer_" in path and path.endswith("kernel")}
        self.trained = sum(leaf.size for leaf in self.kernels.values())

        def layer(matrices: dict[str, Any], x: jax.Array) -> jax.Array:
            query, key, value = (
                (x @ matrices[f"attention/{name}"])
                .reshape(*x.shape[:2], config.num_attention_heads, config.head_size)
                .swapaxes(1, 2)
                for name in ("query", "key", "value")
            )
            context = (query @ key.swapaxes(-1, -2)) @ value
            output = context.swapaxes(1, 2).reshape(x.shape) @ matrices["attention/output"]
            return output @ matrices["intermediate"] @ matrices["output"]

        # Every layer is given the same x: without LayerNorms a chain of them would leave float32's range.
        @jax.jit
        @partial(jax.grad, argnums=(0, 1))
        def gradients(kernels: dict[str, Any], x: jax.Array) -> jax.Array:
            total = jnp.zeros(())
            for i in range(config.num_hidden_layers):
                start = f"bert/layer_{i}/"
                matrices = {path[len(start) : -len("/kernel")]: leaf for path, leaf in kernels.items() if start in path}
                # Frozen embeddings ask the first layer for no gradient of its input.
                total += jnp.square(layer(matrices, x if i else jax.lax.stop_gradient(x))).sum()
            return total

        self.gradients = gradients
        self.width = config.hidden_size

    def steps(self, found: list[Batch]) -> list[float]:
        for batch in found:
            x = np.ones((*batch.input_ids.shape, self.width), np.float32)
            jax.block_until_ready(self.gradients(self.kernels, x))
        return [0.0]


PROFILE = "products"
SIDES: dict[str, Callable[[], Any]] = {OURS: Ours, THEIRS: Theirs, PROFILE: Products}


@functools.cache
def full_batches() -> list[Batch]:
    """The batches of an epoch that need no filling, for the loss over their rows is the mean in both."""
    task = tasks.load("movie", folders.load_tokenizer(minilm_l6()), 64)
    found = batches(task.train, batch_size=SCHEDULE.batch_size, lengths=SCHEDULE.padded_lengths, seed=0)
    return [batch for batch in found if batch.row_mask.all()]


@functools.cache
def warm(variant: str) -> Any:
    """A side that has seen a batch of every length."""
    side = SIDES[variant]()
    side.steps(list({batch.input_ids.shape: batch for batch in full_batches()}.values()))
    return side


def measure(variant: str, block: int, steps: int) -> Record:
    """A block of steps."""
    side, found = warm(variant), full_batches()[block * steps : (block + 1) * steps]
    started = time.perf_counter()
    losses = side.steps(found)
    seconds = time.perf_counter() - started
    made = provenance()
    made["versions"] |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "variant": variant,
        "seconds": seconds,
        "sentences_per_second": steps * SCHEDULE.batch_size / seconds,
        "steps": steps,
        "loss": statistics.mean(losses),
        "trained_parameters": side.trained,
        "environment": {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "GLIBC_TUNABLES")},
        **made,
    }


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    _torch()
    for block in range(1 if quick else REPETITIONS):
        for variant in SIDES:
            yield f"{variant}, block {block + 1}", partial(measure, variant, block, 2 if quick else STEPS)


def finish(records: list[Record]) -> list[Record]:
    """A record a side, with its median block, and how many times less than PyTorch it takes: the median over blocks."""
    runs = {variant: [record for record in records if record["variant"] == variant] for variant in SIDES}
    found = []
    for own in runs.values():
        ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in zip(runs[THEIRS], own, strict=True)]
        medians = {field: statistics.median(run[field] for run in own) for field in ("seconds", "sentences_per_second")}
        loss = statistics.mean(run["loss"] for run in own)
        found.append(
            own[0] | medians | {"time_ratio": statistics.median(ratios), "loss": loss, "repetitions": len(own)}
        )
    return found


def notes(records: list[Record]) -> list[str]:
    by = {record["variant"]: record for record in records}
    limit = by[PROFILE]["time_ratio"]
    return [
        held("against PyTorch, at least 1.3x the sentences a second", by[OURS]["time_ratio"], least=1.3),
        f"the profile: a step of matrix products alone takes {by[OURS]['time_ratio'] / limit:.0%} of our time and "
        f"{1 / limit:.0%} of PyTorch's, so on this machine no step could be more than {limit:.2f}x PyTorch's",
    ]


def benchmark(quick: bool) -> Benchmark:
    columns = ("variant", "sentences_per_second", "time_ratio", "seconds", "steps", "repetitions", "loss")
    return Benchmark("train_speed", partial(jobs, quick), (columns,), finish, notes, libraries=("jax", "torch"))


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
