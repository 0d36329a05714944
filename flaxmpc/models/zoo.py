"""Finds the folder of a model: by its path, by its name in the zoo, or by its name on the hub."""

import os
from pathlib import Path
from typing import Any

from flaxmpc import files
from flaxmpc.errors import brief, unknown

_ON_HUB = "a name on the hub (OWNER/NAME, OWNER/NAME@REVISION)"

DEFAULT = "movie-minilm-l6-2quad-freediv"


def zoo_folder() -> Path:
    """The zoo: $FLAXMPC_ZOO, or the one that flaxmpc is installed with (in a checkout, models/)."""
    own = os.environ.get("FLAXMPC_ZOO")
    return Path(own) if own else Path(__file__).parents[1] / "zoo"


def entries() -> dict[str, Path]:
    """The zoo's models by name; each folder has a config.json."""
    return {path.parent.name: path.parent for path in sorted(zoo_folder().glob("*/config.json"))}


def find(model: str | Path, *, weights: bool = False) -> Path:
    """The folder of a model.

    A folder goes before a name of the zoo, and both before a name on the hub: OWNER/NAME, or OWNER/NAME@REVISION of a
    branch, a tag or a commit. That model is fetched into the cache of Hugging Face's client (HF_HOME); the hub learns
    which one it is, and no text.

    Args:
        model: a path or a name; a `Path` is never a name on the hub.
        weights: whether a model of the hub is fetched with its weights.

    Raises:
        FileNotFoundError, ConnectionError: no folder, nor to be had from the hub, see `hub.fetch`.
        ValueError: an unknown name, the message lists the known ones and the closest; or see `hub.fetch`.
    """
    name = str(model)
    if name and os.path.isdir(model):  # Path("") is the current folder
        return Path(model)
    known = entries()
    if name in known:
        return known[name]
    if os.path.isfile(model):
        raise FileNotFoundError(f"{name} is a file, not the folder of a model")
    if "/" in name:
        from flaxmpc.models import hub

        if isinstance(model, str) and (on_hub := hub.parse(model)):
            return hub.fetch(on_hub, weights=weights)
        path = isinstance(model, Path) or name.startswith(("/", ".", "~"))
        shown = name if len(name) < 300 else brief(name)
        raise FileNotFoundError(f"{shown} is no folder{'' if path else f', nor {_ON_HUB}'}")
    if not known:
        raise FileNotFoundError(f"there is no folder {name}, and no model in the zoo {zoo_folder()} (FLAXMPC_ZOO)")
    raise ValueError(f"{unknown('model', name, known)}; or a folder, or {_ON_HUB}")


def with_weights(model: str | Path) -> Path:
    """The same, of a model that can run.

    Raises:
        FileNotFoundError: its weights are not there; says what makes those of an entry that is kept as a recipe.
    """
    folder = find(model, weights=True)
    recipe = folder / "recipe.json"
    kept = any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json"))
    if not kept and recipe.is_file():
        by = results(folder).get("made_by", recipe)
        raise FileNotFoundError(f"{folder} has no weights here: {by} makes them, in the repository")
    return folder


def name_of(folder: Path) -> str:
    """What a model is called: as its folder; a copy from the hub as its repository, without the owner."""
    from flaxmpc.models import hub

    folder = folder.resolve()  # "." has no name
    on_hub = hub.origin(folder)
    return folder.name if on_hub is None else on_hub.repository.partition("/")[2]


# What the names of figures end with, which are numbers.
_FIGURES = ("accuracy", "f1", "correlation", "pearson", "spearman", "agreement", "difference", "ci_low", "ci_high")
_FIGURES += ("sentences", "pieces", "margin_bits", "linear_head_error")


def results(folder: Path) -> dict[str, Any]:
    """The measured results of an entry, empty where it has none; what is null was not measured.

    ValueError: a damaged file, or other than figures.
    """
    path = folder / "results.json"
    if not path.is_file():
        return {}
    found = {key: value for key, value in files.read_object(path).items() if value is not None}
    for key, value in found.items():
        if key.endswith(_FIGURES) and not isinstance(value, (int, float)):
            raise ValueError(f"{path} has {key} {brief(value)}, not a number")
        if key == "made_by" and not isinstance(value, str):
            raise ValueError(f"{path} has {key} {brief(value)}, not text")
    return found
