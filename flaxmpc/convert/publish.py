"""Publishes a model folder on the hub: checked, with a card, and nothing but a model's files."""

from pathlib import Path

from flaxmpc import secure
from flaxmpc.convert import card
from flaxmpc.models import folder as folders
from flaxmpc.models import hub
from flaxmpc.serve import plans
from flaxmpc.serve.private import private_classifier


def check(folder: Path) -> dict[str, int]:
    """The bytes of the files that `push` uploads, by name, of a model that can be used.

    Raises:
        FileNotFoundError, ValueError: what the folder lacks, or what is broken, see `folders.load`, `plans.read` and
            `card.text`; or a file is a link.
    """
    loaded = folders.load(folder)
    if plans.has(folder):
        private_classifier(loaded, secure.Config(fraction_bits=secure.FRACTION_BITS))  # its plan is for its weights
    found = hub.contents(folder)
    text = _missing_card(folder)
    return found if text is None else {**found, _CARD: len(text.encode())}


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Uploads a model, with a card, see `check` and `hub.upload`; returns its address. A card that is there stays.

    Raises:
        Exception: see `check` and `hub.upload`.
    """
    check(folder)
    if _missing_card(folder) is not None:
        card.write(folder)
    return hub.upload(folder, repository, private=private)


_CARD = "README.md"


def _missing_card(folder: Path) -> str | None:
    """The card that a folder is to get; None: it has one, or no figures.

    Raises:
        ValueError: its recipe and its figures are not those of a conversion.
    """
    if (folder / _CARD).exists() or not all((folder / f"{part}.json").is_file() for part in ("recipe", "results")):
        return None
    try:
        return card.text(folder)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder}: no card can be made of its recipe.json and results.json ({error!r:.80}): write {_CARD} yourself"
        ) from error
