"""The command line. It is thin: what it does stands in `flaxmpc.inference`."""

import dataclasses
import json
import platform
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Column, Table

import flaxmpc
from flaxmpc import convert_cli, serving_cli
from flaxmpc.errors import unknown
from flaxmpc.models import zoo

_DESCRIPTION = """Transformers that classify what they cannot see: Flax under secure MPC.

flaxmpc --version names the versions."""

Protocol = Annotated[str, tyro.conf.arg(metavar="ABY3|SEMI2K|CHEETAH|REF2K")]
Ring = Annotated[str, tyro.conf.arg(metavar="FM32|FM64|FM128")]
Model = Annotated[str, tyro.conf.arg(metavar="NAME|FOLDER")]
PositionalModel = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME|FOLDER]")]
Json = Annotated[bool, tyro.conf.arg(name="json", help_behavior_hint=""), tyro.conf.FlagCreatePairsOff]


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How the secret computation runs.

    Attributes:
        protocol: ABY3: three parties, at most one corrupt. CHEETAH: two parties, no helper, slow. SEMI2K: two parties,
            hides nothing from the first: for measurement only. REF2K: one party, no secrecy: the arithmetic alone.
        parties: number of computing parties; by default what the protocol takes.
        ring: of the shares: integers modulo 2^32, 2^64 or 2^128.
        fraction_bits: bits after the binary point.
    """

    protocol: Protocol = "ABY3"
    parties: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    ring: Ring = "FM64"
    fraction_bits: int = 18

    def start(self) -> Any:
        from flaxmpc import secure

        return secure.InProcess(
            self.protocol, ring=self.ring, fraction_bits=self.fraction_bits, num_parties=self.parties
        )


def _console(*, stderr: bool = False) -> Console:
    """Prints sentences and names as they are: no markup, no emoji codes."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def _name(folder: Path) -> str:
    return folder.name or folder.resolve().name  # "." has none


def _parties(count: int) -> str:
    return "1 party" if count == 1 else f"{count} parties"


def _sentences(texts: tuple[str, ...], file: Path | None) -> list[str]:
    """The sentences of the command line and the file (one a line, empty lines passed over)."""
    sentences = list(texts)
    if file is not None:
        try:
            lines = file.read_bytes().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from error
        found = [line for line in lines if line.strip()]
        if not found:
            raise ValueError(f"{file} holds no sentence")
        sentences += found
    return sentences


def infer(
    texts: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[TEXT ...]", help_behavior_hint="")
    ] = (),
    /,
    file: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None,
    model: Model = zoo.DEFAULT,
    cluster: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None,
    runtime: tyro.conf.OmitArgPrefixes[Runtime] = Runtime(),
    json_: Json = False,
) -> None:
    """Classifies sentences on secret shares, and compares with the clear.

    Without --cluster the parties are threads of this process: it sees everything.

    Args:
        texts: sentences, all in one run.
        file: more sentences, UTF-8, one a line.
        model: a name of the zoo (`flaxmpc zoo list`) or a model folder; on a cluster the name that it was put under.
        cluster: ask the parties of this cluster.toml (or its folder), in place of own ones.
        json_: print one JSON object: results, cost, model, versions.
    """
    sentences = _sentences(texts, file)
    if not sentences:
        raise ValueError("there is no sentence to classify: give some, or --file")
    if cluster is not None:
        serving_cli.infer(sentences, cluster, None if model == zoo.DEFAULT else model, as_json=json_)
        return
    folder = zoo.find(model)
    from flaxmpc.inference import SecureClassifier

    err = _console(stderr=True)
    with err.status("starting the parties and sharing the weights"):
        classifier = SecureClassifier.from_folder(folder, runtime.start())
    with err.status(f"classifying {len(sentences)} sentence(s) on secret shares"):
        predictions, cost = classifier.classify(sentences)

    for prediction in predictions:
        if prediction.truncated:
            most = classifier.config.max_position_embeddings
            err.print(f"cut at {most} tokens, the model's positions: {prediction.text[:60]!r}...", soft_wrap=True)
    if json_:
        results = [dataclasses.asdict(prediction) for prediction in predictions]
        record = {"results": results, "cost": cost.as_dict(), "model": _name(folder), "versions": cost.versions}
        print(json.dumps(record))
        return
    table = Table("text", "label", "probability", "|secure - plaintext|")
    for prediction in predictions:
        text = textwrap.shorten(prediction.text, 200, placeholder=" ...")
        table.add_row(text, prediction.label, f"{prediction.score:.3f}", f"{prediction.difference:.4f}")
    console = _console()
    console.print(table)
    console.print(
        f"{_name(folder)}, {cost.protocol}, {_parties(cost.parties)}: {cost.seconds:.1f} s, "
        f"{_megabytes(cost.bytes_sent)} in all, {cost.rounds:.0f} rounds"
    )


def cost(
    model: PositionalModel = zoo.DEFAULT,
    /,
    tokens: int = 32,
    sentences: int = 1,
    runtime: tyro.conf.OmitArgPrefixes[Runtime] = Runtime(),
    json_: Json = False,
) -> None:
    """What a run would cost, without secrets: zeros cost as much.

    Args:
        model: a name of the zoo or a model folder.
        tokens: length of the sentences, [CLS] and [SEP] included.
        sentences: how many in one run.
        json_: print the record as one JSON object.
    """
    folder = zoo.find(model)
    from flaxmpc import secure
    from flaxmpc.inference import SecureClassifier

    with _console(stderr=True).status("measuring"):
        record = SecureClassifier.from_folder(folder, runtime.start()).estimate(tokens, sentences)
    modelled = {f"{network.name.lower()}_seconds": network.seconds(record) for network in (secure.LAN, secure.WAN)}
    if json_:
        shape = {"model": _name(folder), "tokens": tokens, "sentences": sentences}
        print(json.dumps({**shape, **record.as_dict(), **modelled}))
        return
    console = _console()
    console.print(f"{_name(folder)}, {sentences} x {tokens} tokens, {record.protocol}, {_parties(record.parties)}")
    table = Table("operation", "count", "seconds", "MB in all", "rounds")
    for name, op in record.per_op.items():
        if op.bytes_sent:
            table.add_row(name, str(op.count), f"{op.seconds:.2f}", f"{op.bytes_sent / 1e6:.2f}", f"{op.rounds:.0f}")
    table.add_section()
    table.add_row("whole run", "", f"{record.seconds:.2f}", f"{record.bytes_sent / 1e6:.2f}", f"{record.rounds:.0f}")
    console.print(table)
    console.print(
        f"modelled: LAN (3 Gbit/s, 1 ms) {modelled['lan_seconds']:.1f} s, "
        f"WAN (100 Mbit/s, 80 ms) {modelled['wan_seconds']:.1f} s"
    )


def check(
    model: PositionalModel = zoo.DEFAULT,
    /,
    file: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None,
    sentences: int = 200,
    ring: Ring = "FM64",
    fraction_bits: int = 18,
    json_: Json = False,
) -> None:
    """How far a model stays from fixed-point overflow, on sentences in the clear.

    SPU overflows silently. The exit code is 2 if fewer than 2 bits are left.

    Args:
        model: a name of the zoo or a model folder.
        file: sentences, UTF-8, one a line; by default the validation sentences of the movie reviews.
        sentences: how many of them.
        ring: of the shares: integers modulo 2^32, 2^64 or 2^128.
        fraction_bits: bits after the binary point.
        json_: print the record as one JSON object.
    """
    if sentences < 1:
        raise ValueError(f"--sentences must be at least 1, not {sentences}")
    folder = zoo.find(model)
    from flaxmpc import inference
    from flaxmpc.convert.data import movie_sentences
    from flaxmpc.models import folder as folders

    texts = _sentences((), file) if file else movie_sentences()["validation"]["sentence"]
    texts = list(texts)[:sentences]
    with _console(stderr=True).status(f"computing {len(texts)} sentence(s) in the clear"):
        margins = inference.check(folders.load(folder), texts, ring=ring, fraction_bits=fraction_bits)
    if json_:
        print(json.dumps({"model": _name(folder), "sentences": len(texts), **margins.as_dict()}))
    else:
        table = Table(Column("operation", overflow="fold"), "quantity", "largest", "limit", "bits left")
        for op in margins.table(10):
            name = f"{op.where}: {op.primitive} ({op.source})"
            table.add_row(name, op.quantity, f"{op.magnitude:.3g}", f"{op.limit:.3g}", f"{op.margin_bits:.1f}")
        console = _console()
        console.print(table)
        console.print(
            f"{_name(folder)}, {ring} with {fraction_bits} fraction bits, {len(texts)} sentences: "
            f"{margins.margin_bits:.1f} bits of margin"
        )
    margins.require()


def _zoo_entry(name: str, folder: Path) -> dict[str, Any]:
    """What `zoo list --json` says of a model. Accuracy is that in the clear, REF2K's that of the fixed point."""
    from flaxmpc.models.config import BertConfig

    config = BertConfig.from_folder(folder)
    layers = range(config.num_hidden_layers)
    weights = folder / "model.safetensors"
    measured = zoo.results(folder)
    return {
        "name": name,
        "folder": str(folder),
        "attention": list(dict.fromkeys(config.attention_of(layer).name for layer in layers)),
        "hidden_act": list(dict.fromkeys(config.hidden_act_of(layer).name for layer in layers)),
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "weights_bytes": weights.stat().st_size if weights.is_file() else None,
        **{key: measured.get(key) for key in ("accuracy", "ref2k_accuracy", "made_by")},
    }


def _zoo_table(entries: list[dict[str, Any]]) -> Table:
    """Folds what does not fit, and cuts nothing."""
    columns = [Column(head, overflow="fold") for head in ("name", "parts", "size", "accuracy", "REF2K")]
    table = Table(*columns, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for entry in entries:
        size = entry["weights_bytes"]
        table.add_row(
            f"{entry['name']}\n  {(entry['made_by'] or 'no weights') if size is None else _megabytes(size)}",
            "\n".join(entry["attention"] + entry["hidden_act"]),
            f"{entry['num_hidden_layers']} x {entry['hidden_size']}",
            *("" if entry[key] is None else f"{entry[key]:.1%}" for key in ("accuracy", "ref2k_accuracy")),
        )
    return table


def zoo_(
    action: Annotated[Literal["list", "show"], tyro.conf.Positional],
    model: Annotated[
        str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME|FOLDER]", help_behavior_hint="")
    ] = None,
    /,
    json_: Json = False,
) -> None:
    """The trained models: `zoo list` is a table, `zoo show NAME` a card.

    Args:
        action: list or show.
        model: whose card to show; by default that of the model that `infer` uses.
        json_: list: print an array with an object for every model.
    """
    if action == "show":
        if json_:
            raise ValueError("--json is for zoo list: a card is Markdown, README.md in the model's folder")
        card = zoo.find(model or zoo.DEFAULT) / "README.md"
        if not card.is_file():
            raise ValueError(f"{card.parent} has no card (README.md)")
        Console().print(Markdown(card.read_text("utf-8")))
        return
    if model is not None:
        raise ValueError(f"zoo list takes no model: zoo show {model} shows its card")
    entries = [_zoo_entry(name, folder) for name, folder in zoo.entries().items()]
    if not entries:
        raise FileNotFoundError(f"there is no model in the zoo {zoo.zoo_folder()} (FLAXMPC_ZOO)")
    if json_:
        print(json.dumps(entries))
        return
    console = _console()
    console.print(_zoo_table(entries))
    if any(entry["weights_bytes"] is None for entry in entries):
        console.print("A script in place of a size: the weights are not here; it makes them, in the repository.")


def _versions() -> str:
    found = {"flaxmpc": flaxmpc.__version__, **{name: metadata.version(name) for name in ("spu", "jax")}}
    return ", ".join(f"{name} {version}" for name, version in {**found, "Python": platform.python_version()}.items())


_COMMANDS = {
    "infer": infer,
    "cost": cost,
    "check": check,
    "zoo": zoo_,
    "finetune": convert_cli.finetune,
    "convert": convert_cli.convert,
    "cluster": serving_cli.cluster,
    "party": serving_cli.party,
    "put": serving_cli.put,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. What the user can mend is one line on standard error, and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    app = tyro.extras.SubcommandApp()
    for name, command in _COMMANDS.items():
        app.command(command, name=name)
    from flaxmpc.secure import SecureError

    try:
        if arguments == ["--version"]:
            print(_versions())
            return
        if arguments and not arguments[0].startswith("-") and arguments[0] not in _COMMANDS:
            raise unknown("command", arguments[0], _COMMANDS)
        app.cli(prog="flaxmpc", description=_DESCRIPTION, args=arguments)
    except BrokenPipeError:  # the reader of the output has seen enough
        raise
    except (ValueError, OSError, FloatingPointError, SecureError) as error:
        message = " ".join(str(error).split())
        print(f"flaxmpc: {message}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
