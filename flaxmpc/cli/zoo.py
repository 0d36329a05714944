"""The command `zoo`: shows the trained models, and publishes one."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Column, Table

from flaxmpc import files
from flaxmpc.cli.infer import Flag, Json
from flaxmpc.cli.results import console
from flaxmpc.models import zoo as models


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def _entry(name: str, folder: Path) -> dict[str, Any]:
    """What `zoo list --json` says of a model. `value` is in the clear, `ref2k_value` in fixed point."""
    from flaxmpc.models.folder import read_config
    from flaxmpc.training.metrics import headline

    config = read_config(folder)
    layers = range(config.num_hidden_layers)
    weights = folder / "model.safetensors"
    measured = models.results(folder)
    metric = headline(measured)
    return {
        "name": name,
        "folder": str(folder),
        "attention": list(dict.fromkeys(config.attention_of(layer).name for layer in layers)),
        "hidden_act": list(dict.fromkeys(config.hidden_act_of(layer).name for layer in layers)),
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "weights_bytes": weights.stat().st_size if weights.is_file() else None,
        "metric": metric,
        **{place + "value": measured.get(f"{place}{metric}") for place in ("", "ref2k_")},
        "made_by": measured.get("made_by"),
    }


def _table(entries: list[dict[str, Any]]) -> Table:
    """The table of the zoo's models; what does not fit is folded, and nothing is cut."""
    columns = [Column(head, overflow="fold") for head in ("name", "parts", "size", "result", "REF2K")]
    table = Table(*columns, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for entry in entries:
        size = entry["weights_bytes"]
        table.add_row(
            f"{entry['name']}\n  {(entry['made_by'] or 'no weights') if size is None else _megabytes(size)}",
            "\n".join(entry["attention"] + entry["hidden_act"]),
            f"{entry['num_hidden_layers']} x {entry['hidden_size']}",
            "" if entry["value"] is None else f"{entry['value']:.1%}\n{entry['metric'].replace('_', ' ')}",
            "" if entry["ref2k_value"] is None else f"{entry['ref2k_value']:.1%}",
        )
    return table


def zoo(
    action: Annotated[Literal["list", "show", "push"], tyro.conf.Positional],
    model: Annotated[
        str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME|FOLDER]", help_behavior_hint="")
    ] = None,
    /,
    json_: Json = False,
    to: Annotated[str | None, tyro.conf.arg(metavar="OWNER/NAME", help_behavior_hint="")] = None,
    private: Flag = False,
    dry_run: Flag = False,
) -> None:
    """The trained models: a table of them, the card of one; or publishes one.

    Args:
        action: list, show or push: `zoo show NAME`, `zoo push FOLDER --to OWNER/NAME`.
        model: show: the model whose card is shown; by default the one that `infer` uses. push: the model to publish. It
            must load; then config, weights, tokenizer, plan of bits, recipe, results and card are uploaded, and no
            other file of its folder. A card is written where there is none.
        json_: list: print an array with an object for every model.
        to: push: the repository on the hub, made where it is not there. First log in: `hf auth login`, or HF_TOKEN.
        private: push: only its owner is to see it.
        dry_run: push: say which files would be uploaded, and upload none.
    """
    if action != "push" and (to is not None or private or dry_run):
        raise ValueError(f"--to, --private and --dry-run are of zoo push, not of zoo {action}")
    if action == "push":
        if json_:
            raise ValueError("--json is for zoo list")
        if model is None or to is None:
            raise ValueError("which model, and to where? zoo push FOLDER --to OWNER/NAME")
        _push(model, to, private=private, dry_run=dry_run)
        return
    if action == "show":
        if json_:
            raise ValueError("--json is for zoo list: a card is Markdown, README.md in the model's folder")
        card = models.find(model or models.DEFAULT) / "README.md"
        if not card.is_file():
            raise ValueError(f"{card.parent} has no card (README.md)")
        text = _METADATA.sub("", files.read(card, files.JSON_BYTES).decode("utf-8", "replace"))
        # What a terminal would obey is left out.
        Console().print(Markdown("".join(c for c in text if c.isprintable() or c in "\n\t")))
        return
    if model is not None:
        raise ValueError(f"zoo list takes no model: zoo show {model} shows its card")
    entries = [_entry(name, folder) for name, folder in models.entries().items()]
    if not entries:
        raise FileNotFoundError(f"there is no model in the zoo {models.zoo_folder()} (FLAXMPC_ZOO)")
    if json_:
        print(json.dumps(entries))
        return
    out = console()
    out.print(_table(entries))
    if any(entry["weights_bytes"] is None for entry in entries):
        out.print("A script in place of a size: the weights are not here; it makes them, in the repository.")


# What a card begins with, for the hub.
_METADATA = re.compile(r"\A---\r?\n.*?^---\s*$", re.DOTALL | re.MULTILINE)


def _push(model: str, repository: str, *, private: bool, dry_run: bool) -> None:
    """Uploads a model and prints its address; of a dry run the files, with their sizes."""
    from flaxmpc.convert import publish
    from flaxmpc.models import hub

    hub.require_repository(repository)
    folder = models.with_weights(model)
    if not dry_run:
        print(publish.push(folder, repository, private=private))
        return
    table = Table("file", Column("bytes", justify="right"), box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name, size in publish.check(folder).items():
        table.add_row(name, f"{size:,}")
    out = console()
    out.print(table)
    out.print(f"a dry run, nothing was uploaded to {repository}{', private' * private}", soft_wrap=True)
