"""A run of fine-tuning or conversion: its folders, which are its own, its config, and what it learns from."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from flaxmpc import files
from flaxmpc.convert.contents import Digests

Config = TypeVar("Config")
Made = TypeVar("Made")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder is this run's, until the context or the process ends. A file FOLDER.lock beside it says whose it is.

    Raises:
        ValueError: another run has it; says which process, on which host.
        OSError: the file cannot be written, or the file system has no locks.
    """
    folder = folder.resolve()
    path = folder.with_name(f"{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("a+", encoding="utf-8", errors="replace"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                whose = file.read().strip() or "another process"
                raise ValueError(f"{whose} writes to {folder}: wait until it ends, or name another folder") from error
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break  # else it was removed meanwhile, by the run that had it
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        stack.callback(path.unlink, missing_ok=True)
        yield


def alone(make: Callable[[Config], Made]) -> Callable[[Config], Made]:
    """Makes what a config says with the folders of the config claimed, see `claimed`."""

    @functools.wraps(make)
    def made(config: Any) -> Any:
        runs = _folder(config)
        if runs.resolve() == config.out.resolve():
            raise ValueError(f"{runs} is both --out and --runs: checkpoints need a folder of their own")
        with claimed(config.out), claimed(runs):
            return make(config)

    return made


def _folder(config: Any) -> Path:
    return config.runs or config.out.with_name(config.out.name + ".run")


def run_folder(config: Any, inputs: Digests) -> Path:
    """Where checkpoints go. The resolved config and what the run learns from are written there, and known again.

    Raises:
        ValueError: the folder holds a run of another config, or from other data or weights, and names what differs;
            or something else.
    """
    folder = _folder(config)
    resolved = recipe(config, inputs)
    path = folder / "config.json"
    mend = "remove the folder, or name another with --runs"
    if path.is_file():
        before = files.read_object(path, mend=mend)
        other = [field for field in resolved if field != "inputs" and before.get(field) != resolved[field]]
        if other:
            raise ValueError(f"{folder} holds a run with another {', '.join(other)}: {mend}")
        known = before.get("inputs") or {}
        changed = [name for name in inputs if known.get(name) != inputs[name]]
        if changed:
            raise ValueError(f"the {' and the '.join(changed)} changed since the run in {folder} began: {mend}")
        return folder
    if folder.is_dir() and any(entry.name != "config.json.new" for entry in folder.iterdir()):
        raise ValueError(f"{folder} has no config.json, which says what run it holds: {mend}")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, resolved)
    return folder


def recipe(config: Any, inputs: Digests) -> dict[str, Any]:
    """recipe.json: the resolved config, and what was learnt from."""
    return {**resolve(config), "inputs": dict(inputs)}


def done(config: Any, inputs: Digests) -> bool:
    """Whether the folder holds the model that this config makes of these inputs; older recipes do not name them.

    Raises:
        ValueError: recipe.json is damaged.
    """
    path = config.out / "recipe.json"
    if not path.is_file() or not (config.out / "results.json").is_file():
        return False
    found = files.read_object(path, mend="remove it, and the model is finished again from its checkpoints")
    return {"inputs": dict(inputs), **found} == recipe(config, inputs)


def unfinished(config: Any) -> None:
    """To be said before a model is written: recipe.json comes last, so that it is never that of another model."""
    (config.out / "recipe.json").unlink(missing_ok=True)


def resolve(config: Any) -> dict[str, Any]:
    """The config as JSON holds it, without what changes no figure: where things are written, and notes."""
    # Of a path, what says which folder it is on any machine.
    fields = json.loads(json.dumps(dataclasses.asdict(config), default=lambda path: "/".join(path.parts[-2:])))
    return {name: value for name, value in fields.items() if name not in ("out", "runs", "notes")}
