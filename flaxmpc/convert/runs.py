"""Keeps a run of fine-tuning or conversion apart: its folders are its own, and it knows its config and its inputs."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flaxmpc import files
from flaxmpc.convert.contents import Digests
from flaxmpc.errors import brief
from flaxmpc.models import hub

_NOWHERE = ("out", "runs", "notes")  # fields that change no figure

_Config = TypeVar("_Config")
Made = TypeVar("Made")


def alone(make: Callable[[_Config], Made]) -> Callable[[_Config], Made]:
    """Wraps what makes something of a config: meanwhile both folders of the config are claimed, see `files.claimed`."""

    @functools.wraps(make)
    def made(config: Any) -> Any:
        runs = _folder(config)
        if runs.resolve() == config.out.resolve():
            raise ValueError(f"{runs} is both --out and --runs: checkpoints need a folder of their own")
        with files.claimed(config.out), files.claimed(runs):
            return make(config)

    return made


def _folder(config: Any) -> Path:
    return config.runs or config.out.with_name(config.out.name + ".run")


def run_folder(config: Any, inputs: Digests) -> Path:
    """Gives the folder of checkpoints. The resolved config and the inputs are written there, and known again.

    A folder with a config and nothing else has nothing to lose, such as after a budget that was refused: it is begun
    anew.

    Raises:
        ValueError: the folder holds a run of another config, or from other data or weights, and names what differs;
            or something else.
    """
    folder = _folder(config)
    resolved = recipe(config, inputs)
    path = folder / "config.json"
    mend = "remove the folder, or name another with --runs"
    begun = folder.is_dir() and any(entry.name not in (path.name, f"{path.name}.new") for entry in folder.iterdir())
    if path.is_file() and begun:
        before = completed(files.read_object(path, mend=mend), config)
        other = [field for field in resolved if field != "inputs" and before.get(field) != resolved[field]]
        other += [brief(field) for field in before if field not in resolved]
        if other:
            raise ValueError(f"{folder} holds a run with another {', '.join(other)}: {mend}")
        known = before.get("inputs") or {}
        changed = [name for name in inputs if known.get(name) != inputs[name]]
        if changed:
            raise ValueError(f"the {' and the '.join(changed)} changed since the run in {folder} began: {mend}")
        return folder
    if begun:
        raise ValueError(f"{folder} has no config.json, which says what run it holds: {mend}")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, resolved)
    return folder


def recipe(config: Any, inputs: Digests) -> dict[str, Any]:
    """The content of recipe.json: the resolved config, and the digests of what was learnt from."""
    return {**resolve(config), "inputs": dict(inputs)}


def done(config: Any, inputs: Digests) -> bool:
    """Whether the folder holds the model that this config makes of these inputs.

    Older recipes do not name the inputs, nor options of today, see `completed`.

    Raises:
        ValueError: recipe.json is damaged.
    """
    path = config.out / "recipe.json"
    if not path.is_file() or not (config.out / "results.json").is_file():
        return False
    found = files.read_object(path, mend="remove it, and the model is finished again from its checkpoints")
    wanted = recipe(config, inputs)
    return {"inputs": wanted["inputs"], **completed(found, config)} == wanted


def completed(found: dict[str, Any], config: Any) -> dict[str, Any]:
    """A recorded config with the options that are newer than it: what they are by default, as all was done so then.

    Args:
        found: what was recorded, see `resolve`.
        config: one of the same kind, of today.
    """
    whole = _defaults(config) | found
    for field in dataclasses.fields(config):
        own = getattr(config, field.name)
        if dataclasses.is_dataclass(own) and isinstance(found.get(field.name), dict):
            whole[field.name] = _defaults(own) | found[field.name]
    return whole


def _defaults(config: Any) -> dict[str, Any]:
    """The fields of a config that are of a plain type, or a schedule, and have a default, as JSON holds them."""
    found = {}
    for field in dataclasses.fields(config):
        own: Any = field.default
        if dataclasses.is_dataclass(own):
            own = dataclasses.asdict(own)  # pyright: ignore[reportArgumentType]
        if isinstance(own, (str, int, float, bool, tuple, dict, type(None))) and field.name not in _NOWHERE:
            found[field.name] = own
    return json.loads(json.dumps(found))


def unfinished(config: Any) -> None:
    """Removes recipe.json before a model is written: it comes last, so that it is never that of another model."""
    (config.out / "recipe.json").unlink(missing_ok=True)


def resolve(config: Any) -> dict[str, Any]:
    """The config as JSON holds it, without what changes no figure: where things are written, and notes."""
    fields = json.loads(json.dumps(dataclasses.asdict(config), default=_place))
    return {name: value for name, value in fields.items() if name not in _NOWHERE}


def _place(path: Path) -> str:
    """What says which folder it is on any machine: of a copy from the hub OWNER/NAME@COMMIT."""
    return str(hub.origin(path) or "/".join(path.parts[-2:]))
