"""The command line. It is thin: what it does stands elsewhere."""

import sys
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Column, Table

from flaxmpc import convert_cli, infer_cli, serving_cli
from flaxmpc.models import zoo
from flaxmpc.results import console as _console

_DESCRIPTION = "Transformers that classify what they cannot see: Flax under secure MPC."

PositionalModel = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME|FOLDER]")]


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def _zoo_table() -> Table:
    """80 columns wide with the longest name; accuracy is that in the clear, REF2K that of the fixed point."""
    from flaxmpc.models.config import BertConfig

    table = Table(Column("name", no_wrap=True), "parts", "size", "accuracy", "REF2K")
    for name, folder in zoo.entries().items():
        config = BertConfig.from_folder(folder)
        layers = range(config.num_hidden_layers)
        parts = [config.attention_of(i).name for i in layers] + [config.hidden_act_of(i).name for i in layers]
        weights = folder / "model.safetensors"
        measured = zoo.results(folder)
        table.add_row(
            name,
            "\n".join(dict.fromkeys(parts)),
            f"{config.num_hidden_layers} x {config.hidden_size}\n"
            + (_megabytes(weights.stat().st_size) if weights.is_file() else "by recipe"),
            *(f"{measured[key]:.1%}" if key in measured else "" for key in ("accuracy", "ref2k_accuracy")),
        )
    return table


def zoo_(
    action: Annotated[Literal["list", "show"], tyro.conf.Positional],
    model: PositionalModel = zoo.DEFAULT,
    /,
) -> None:
    """The trained models: `zoo list` is a table, `zoo show NAME` a card.

    Args:
        action: list or show.
        model: whose card to show.
    """
    if action == "list":
        _console().print(_zoo_table())
        return
    card = zoo.find(model) / "README.md"
    if not card.is_file():
        raise ValueError(f"{card.parent} has no card (README.md)")
    Console().print(Markdown(card.read_text("utf-8")))


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. What the user can mend is one line on standard error, and exit code 2."""
    app = tyro.extras.SubcommandApp()
    app.command(infer_cli.infer)
    app.command(infer_cli.cost)
    app.command(infer_cli.check)
    app.command(name="zoo")(zoo_)
    app.command(convert_cli.finetune)
    app.command(convert_cli.convert)
    app.command(serving_cli.cluster)
    app.command(serving_cli.party)
    app.command(serving_cli.put)
    from flaxmpc.secure import SecureError

    try:
        app.cli(prog="flaxmpc", description=_DESCRIPTION, args=arguments)
    except (ValueError, OSError, FloatingPointError, SecureError) as error:
        message = " ".join(str(error).split())
        print(f"flaxmpc: {message}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
