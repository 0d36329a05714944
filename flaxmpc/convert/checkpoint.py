"""Checkpoints of training, by orbax: the last, that a killed run goes on from, and the best epoch's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxmpc.convert import hosts


class Checkpoints:
    """Trees by their step, in a folder of the first host; every host makes the same calls."""

    def __init__(self, folder: Path, **options: Any):
        import orbax.checkpoint as ocp

        folder.mkdir(parents=True, exist_ok=True)
        self._args: Any = ocp.args
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        self._manager: Any = None
        if hosts.first():
            self._manager = ocp.CheckpointManager(
                folder.absolute(),
                options=ocp.CheckpointManagerOptions(
                    create=False,
                    multiprocessing_options=alone,
                    async_options=ocp.AsyncOptions(barrier_sync_fn=lambda **_: None),  # it waits for no other host
                    **options,
                ),
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        if self._manager is not None:
            self._manager.close()

    def latest_step(self) -> int:
        """The last step that is kept; -1: none."""
        return self._from_first(lambda manager: manager.latest_step())

    def best_step(self) -> int:
        """The step of the best metrics; -1: none."""
        return self._from_first(lambda manager: manager.best_step())

    def _from_first(self, step: Callable[[Any], int | None]) -> int:
        found = None if self._manager is None else step(self._manager)
        return int(hosts.from_first(np.int32(-1 if found is None else found)))

    def save(self, step: int, tree: Any, metrics: dict[str, float] | None = None, *, wait: bool = False) -> None:
        """A step that is there is left. It is written while training goes on, unless it is waited for."""
        if self._manager is not None and step not in self._manager.all_steps():
            self._manager.save(step, args=self._args.StandardSave(jax.device_get(tree)), metrics=metrics)
            if wait:
                self._manager.wait_until_finished()

    def restore(self, step: int, like: Any) -> Any:
        """The tree of a step, shaped as `like`, in the memory of each host."""
        found = jax.device_get(like)
        if self._manager is not None:
            found = self._manager.restore(step, args=self._args.StandardRestore(found))
        return hosts.from_first(found)
