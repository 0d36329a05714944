"""Keeps checkpoints of training, by orbax: the last, from which a killed run goes on, and the best epoch's."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np

from flaxmpc import files
from flaxmpc.training import hosts

# Files in the folder of each step: our seal, beside what orbax wrote there; and orbax's note of when it wrote, which it
# changes after the seal, so that nothing vouches for it. Nothing needs it.
_SEAL, _NOTE = "sha256.json", "_CHECKPOINT_METADATA"
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a step's folder, until all is written
_REMOVED = "removed"  # where a step goes before its files are deleted: under its name it is whole


class _Seal(msgspec.Struct, forbid_unknown_fields=True):
    """What makes a step whole: its number, and the SHA-256 of each file, by its path in the step's folder."""

    step: int
    files: dict[str, str]


class Checkpoints:
    """Keeps trees of arrays by their step, in a folder of the first host; every host makes the same calls.

    What is restored is what was saved: each step has the SHA-256 of its files. A step is there whole or not at all,
    whenever the process is killed.
    """

    def __init__(self, folder: Path, *, best: str | None = None):
        """Checks all that is there. A step that is damaged is removed, if an earlier or later one stands in for it.

        Args:
            folder: the folder of the steps; it is made if need be.
            best: the name of a figure: only the step with the largest is kept, the last of equals, and no other stands
                in for it. None: the last two steps are kept.

        Raises:
            ValueError: a step is damaged, and none stands in for it; names the file.
        """
        import orbax.checkpoint as ocp

        folder.mkdir(parents=True, exist_ok=True)
        self._args: Any = ocp.args
        self._folder, self._best = folder.absolute(), best
        self._manager: Any = None
        if not hosts.first():
            return
        self._delete_removed()
        self._remove_damaged()
        keep: dict[str, Any] = {"max_to_keep": 2}
        if best is not None:
            keep = {"max_to_keep": 1, "best_fn": lambda figures: figures[best]}
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                create=False,
                cleanup_tmp_directories=True,
                todelete_subdir=_REMOVED,
                multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}),
                async_options=ocp.AsyncOptions(
                    barrier_sync_fn=lambda **_: None,  # it waits for no other host
                    post_finalization_callback=self._seal,
                ),
                **keep,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        if self._manager is not None:
            self._manager.close()
            self._delete_removed()

    def _delete_removed(self) -> None:
        shutil.rmtree(self._folder / _REMOVED, ignore_errors=True)

    def _seal(self) -> None:
        """Called by orbax while training goes on, when all of a step is written and before its folder gets its name."""
        (folder,) = self._folder.glob(f"*{_UNFINISHED}*")
        step = int(folder.name.partition(_UNFINISHED)[0])
        digests = {str(path.relative_to(folder)): _sha256(path) for path in folder.glob("*/**/*") if path.is_file()}
        for path in folder.rglob("*"):
            files.sync(path)
        files.write(folder / _SEAL, msgspec.json.encode(_Seal(step, digests)))

    def _remove_damaged(self) -> None:
        steps = {int(path.name): _damage(path) for path in self._folder.iterdir() if path.name.isdecimal()}
        whole = [step for step, damage in steps.items() if damage is None]
        damaged = {step: damage for step, damage in steps.items() if damage is not None}
        for step, damage in sorted(damaged.items()):
            if self._best is not None or not whole:
                raise ValueError(
                    f"{damage}, and no other checkpoint stands in for it: remove {self._folder.parent}, and what is "
                    "trained there is trained anew"
                )
            print(f"{damage}: the checkpoint is removed, and training goes on from step {max(whole)}")
            shutil.rmtree(self._folder / str(step))
        for step in whole:
            (self._folder / str(step) / _NOTE).unlink(missing_ok=True)

    def step(self) -> int:
        """The step that stands for the run: that of the best figure, or the last that is kept; -1: none."""
        manager = self._manager
        found = None if manager is None else manager.latest_step() if self._best is None else manager.best_step()
        return int(hosts.from_first(np.int32(-1 if found is None else found)))

    def save(self, step: int, tree: Any, figures: dict[str, float] | None = None, *, wait: bool = False) -> None:
        """Keeps the tree of a step, unless it is there already. It is written while training goes on, unless `wait`."""
        if self._manager is not None and step not in self._manager.all_steps():
            self._manager.wait_until_finished()
            self._delete_removed()
            self._manager.save(step, args=self._args.StandardSave(jax.device_get(tree)), metrics=figures)
            if wait:
                self._manager.wait_until_finished()

    def restore(self, step: int, like: Any) -> Any:
        """The tree of a step, shaped as `like`, in the memory of each host.

        Raises:
            ValueError: it was damaged since it was written, or last looked at; names the file.
        """
        found = jax.device_get(like)
        if self._manager is not None:
            self._manager.wait_until_finished()
            if (damage := _damage(self._folder / str(step))) is not None:
                raise ValueError(f"{damage}: start the run again, to go on from the checkpoint before if there is one")
            found = self._manager.restore(step, args=self._args.StandardRestore(found))
        return hosts.from_first(found)


def _damage(folder: Path) -> str | None:
    """Names a file in a step's folder that is not as it was written, and what is wrong with it; None: all is whole."""
    path = folder / _SEAL
    try:
        seal = msgspec.json.decode(path.read_bytes(), type=_Seal)
        if str(seal.step) != folder.name:
            return f"{folder} holds step {seal.step}"
        for name, digest in seal.files.items():
            path = folder / name
            if _sha256(path) != digest:
                return f"{path} is not as it was written"
    except (OSError, ValueError, msgspec.DecodeError) as error:
        return f"{path} cannot be read ({getattr(error, 'strerror', None) or error})"
    return None


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()
