"""The commands that train: `finetune` and `convert`. What they do stands in `flaxmpc.convert`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from flaxmpc.convert import card
from flaxmpc.convert.conversion import Conversion, FineTuning, finetune_encoder
from flaxmpc.convert.conversion import convert as convert_teacher


def finetune(config: Annotated[FineTuning, tyro.conf.arg(name="")]) -> None:
    """Fine-tunes a pre-trained BERT on labelled sentences: the teacher of a conversion.

    A run that was killed goes on from its last checkpoint when the same command is given again.
    """
    results = finetune_encoder(config)
    card.write(config.out)
    _show(config.out, results)


def convert(config: Annotated[Conversion, tyro.conf.arg(name="")]) -> None:
    """Converts a fine-tuned BERT into one that is cheap under MPC: replaces parts, distils, evaluates, writes a card.

    A run that was killed goes on from its last checkpoint when the same command is given again.
    """
    from flaxmpc.evaluation import evaluate

    convert_teacher(config)
    if config.notes:
        (config.out / "notes.md").write_text(config.notes.strip() + "\n", "utf-8")
    results = evaluate(config.out, ref2k_sentences=config.ref2k_sentences, aby3_sentences=config.aby3_sentences)
    _show(config.out, results)


def _show(folder: Path, results: Mapping[str, Any]) -> None:
    table = Table("figure", "value")
    for name, value in results.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.4f}")
        elif isinstance(value, int):
            table.add_row(name, f"{value:,}")
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(table)
    console.print(f"written: {folder}")
