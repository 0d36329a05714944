"""The zoo: a folder per trained model, found by name."""

import os
from pathlib import Path
from typing import Any

from flaxmpc import files
from flaxmpc.errors import brief, unknown

DEFAULT = "movie-minilm-l6-2quad-freediv"


def zoo_folder() -> Path:
    """The zoo: $FLAXMPC_ZOO, or the one that flaxmpc is installed with (in a checkout, models/)."""
    own = os.environ.get("FLAXMPC_ZOO")
    return Path(own) if own else Path(__file__).parents[1] / "zoo"


def entries() -> dict[str, Path]:
    """The zoo's models by name; each folder has a config.json."""
    return {path.parent.name: path.parent for path in sorted(zoo_folder().glob("*/config.json"))}


def find(name_or_folder: str | Path) -> Path:
    """The folder of a model given by its name in the zoo or by its path.

    Raises:
        FileNotFoundError: a path to no folder.
        ValueError: an unknown name; the message lists the known ones and the closest.
    """
    folder = Path(name_or_folder)
    if str(name_or_folder) and folder.is_dir():  # Path("") is the current folder
        return folder
    known = entries()
    if str(name_or_folder) in known:
        return known[str(name_or_folder)]
    if len(folder.parts) > 1:
        raise FileNotFoundError(f"{folder} is no folder")
    if not known:
        raise FileNotFoundError(f"there is no folder {folder}, and no model in the zoo {zoo_folder()} (FLAXMPC_ZOO)")
    raise unknown("model", str(name_or_folder), known)


def with_weights(name_or_folder: str | Path) -> Path:
    """The same, of a model that can run.

    Raises:
        FileNotFoundError: its weights are not there; says what makes those of an entry that is kept as a recipe.
    """
    folder = find(name_or_folder)
    recipe = folder / "recipe.json"
    if not (folder / "model.safetensors").is_file() and recipe.is_file():
        by = results(folder).get("made_by", recipe)
        raise FileNotFoundError(f"{folder} has no weights here: {by} makes them, in the repository")
    return folder


def results(folder: Path) -> dict[str, Any]:
    """The measured results of an entry, empty where it has none. ValueError: a damaged file, or other than figures."""
    path = folder / "results.json"
    if not path.is_file():
        return {}
    found = files.read_object(path)
    number, text = (int, float, type(None)), (str, type(None))
    for key, kinds in {"accuracy": number, "ref2k_accuracy": number, "made_by": text}.items():
        if not isinstance(found.get(key), kinds):
            raise ValueError(f"{path} has {key} {brief(found[key])}, not {'a number' if kinds is number else 'text'}")
    return found
