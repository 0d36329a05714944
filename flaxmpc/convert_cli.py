"""The commands that train: `finetune` and `convert`. What they do stands in `flaxmpc.recipes`."""

from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from flaxmpc.convert.conversion import Conversion, FineTuning


def finetune(config: Annotated[FineTuning, tyro.conf.arg(name="")]) -> None:
    """Fine-tunes a pre-trained BERT on labelled sentences: the teacher of a conversion.

    A run that was killed goes on from its last checkpoint when the same command is given again.
    """
    _make(config)


def convert(config: Annotated[Conversion, tyro.conf.arg(name="")]) -> None:
    """Converts a fine-tuned BERT into one that is cheap under MPC: replaces parts, distils, evaluates, writes a card.

    A run that was killed goes on from its last checkpoint when the same command is given again.
    """
    _make(config)


def _make(config: FineTuning | Conversion) -> None:
    from flaxmpc.recipes import make

    table = Table("figure", "value")
    for name, value in make(config).items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.4f}")
        elif isinstance(value, int):
            table.add_row(name, f"{value:,}")
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(table)
    console.print(f"written: {config.out}")
