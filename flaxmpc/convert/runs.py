"""The identity of a run of fine-tuning or conversion: its config, and the content of what it learns from."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flaxmpc.convert.contents import Digests


def run_folder(config: Any, inputs: Digests) -> Path:
    """Where checkpoints go. The resolved config and what the run learns from are written there, and known again.

    Raises:
        ValueError: the folder holds a run of another config, or from other data or weights; names what differs.
    """
    folder = config.runs or config.out.with_name(config.out.name + ".run")
    resolved = recipe(config, inputs)
    path = folder / "config.json"
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))
        mend = "remove the folder, or name another with --runs"
        other = [field for field in resolved if field != "inputs" and before.get(field) != resolved[field]]
        if other:
            raise ValueError(f"{folder} holds a run with another {', '.join(other)}: {mend}")
        changed = [name for name in inputs if before.get("inputs", {}).get(name) != inputs[name]]
        if changed:
            raise ValueError(f"the {' and the '.join(changed)} changed since the run in {folder} began: {mend}")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(resolved, indent=2) + "\n", "utf-8")
    return folder


def recipe(config: Any, inputs: Digests) -> dict[str, Any]:
    """recipe.json: the resolved config, and what was learnt from."""
    return {**resolve(config), "inputs": dict(inputs)}


def done(config: Any, inputs: Digests) -> bool:
    """Whether the folder holds the model that this config makes of these inputs; older recipes do not name them."""
    path = config.out / "recipe.json"
    if not path.is_file():
        return False
    found = json.loads(path.read_text("utf-8"))
    return {"inputs": dict(inputs), **found} == recipe(config, inputs)


def resolve(config: Any) -> dict[str, Any]:
    """The config as JSON holds it, without what changes no figure: where things are written, and notes."""
    # Of a path, what says which folder it is on any machine.
    fields = json.loads(json.dumps(dataclasses.asdict(config), default=lambda path: "/".join(path.parts[-2:])))
    return {name: value for name, value in fields.items() if name not in ("out", "runs", "notes")}
