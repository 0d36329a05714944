"""The commands that train: `finetune`, `convert` and `evaluate`. What they do stands in `flaxmpc.convert`."""

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
    from flaxmpc.evaluation import evaluate as evaluate_folder

    convert_teacher(config)
    if config.notes:
        (config.out / "notes.md").write_text(config.notes.strip() + "\n", "utf-8")
    results = evaluate_folder(config.out, ref2k_sentences=config.ref2k_sentences, aby3_sentences=config.aby3_sentences)
    _show(config.out, results)


def evaluate(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    ref2k_sentences: Annotated[int | None, tyro.conf.arg(help_behavior_hint="")] = None,
    aby3_sentences: int = 100,
    batch_size: int = 16,
) -> None:
    """Measures a converted model under MPC on its test set, and writes results.json and the card.

    Args:
        folder: that `convert` wrote.
        ref2k_sentences: of the test set under the secure protocols' arithmetic; by default all.
        aby3_sentences: of the test set on three parties' shares.
        batch_size: sentences in one secure run.
    """
    from flaxmpc.evaluation import evaluate as evaluate_folder

    results = evaluate_folder(
        folder, ref2k_sentences=ref2k_sentences, aby3_sentences=aby3_sentences, batch_size=batch_size
    )
    _show(folder, results)


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
