"""The commands that train: `finetune` and `convert`. What they do stands in `flaxmpc.convert.recipe`."""

from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from flaxmpc.convert.configs import Conversion, FineTuning
from flaxmpc.training.hosts import Hosts

_ALONE = Hosts()


def finetune(
    config: Annotated[FineTuning, tyro.conf.arg(name="")], hosts: Annotated[Hosts, tyro.conf.arg(name="")] = _ALONE
) -> None:
    """Fine-tunes a pre-trained BERT on labelled sentences: the teacher of a conversion.

    A run that was killed goes on from its last checkpoint when the same command is given again.
    """
    _make(config, hosts)


def convert(
    config: Annotated[Conversion, tyro.conf.arg(name="")], hosts: Annotated[Hosts, tyro.conf.arg(name="")] = _ALONE
) -> None:
    """Converts a fine-tuned BERT into one that is cheap under MPC: replaces parts, distils, evaluates, writes a card.

    A run that was killed goes on from its last checkpoint when the same command is given again.
    """
    _make(config, hosts)


def _make(config: FineTuning | Conversion, hosts: Hosts) -> None:
    from flaxmpc.convert.recipe import make

    hosts.join()
    results = make(config)
    console = Console(markup=False, emoji=False, highlight=False)
    if hosts.process_id:
        console.print(f"done: the first host, {hosts.coordinator}, has written it")
        return
    table = Table("figure", "value")
    for name, value in results.items():
        if isinstance(value, bool):
            table.add_row(name, "yes" if value else "no")
        elif isinstance(value, float):
            table.add_row(name, f"{value:.4f}")
        elif isinstance(value, int):
            table.add_row(name, f"{value:,}")
    console.print(table)
    console.print(f"written: {config.out}")
