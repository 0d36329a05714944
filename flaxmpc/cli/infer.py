"""The commands that ask a model, or look at one: infer, cost, check. What they do stands in `flaxmpc.serve.private`."""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.progress import track
from rich.table import Column, Table

from flaxmpc.cli import deploy, results, texts
from flaxmpc.cli.results import console
from flaxmpc.data.batches import Text
from flaxmpc.models import zoo
from flaxmpc.models.zoo import name_of
from flaxmpc.secure import SecureError
from flaxmpc.serve.classify import TextError, limit


def _or(default: str, metavar: str) -> Any:
    """An option that may be left out; `default`, for the help, is what then stands in its place."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else "")


PositionalModel = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME|FOLDER]")]
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint=""), tyro.conf.FlagCreatePairsOff]
Json = Annotated[bool, tyro.conf.arg(name="json", help_behavior_hint=""), tyro.conf.FlagCreatePairsOff]
OptionalPath = Annotated[Path | None, _or("", "PATH")]


@dataclasses.dataclass(frozen=True)
class FixedPoint:
    """The fixed point that secrets are computed in.

    Attributes:
        ring: the shares' ring: integers modulo 2^32, 2^64 or 2^128.
        fraction_bits: bits after the binary point.
    """

    ring: Annotated[str | None, _or("FM64", "FM32|FM64|FM128")] = None
    fraction_bits: Annotated[int | None, _or("18", "INT")] = None

    def given(self) -> dict[str, Any]:
        """The options that were given, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Runtime(FixedPoint):
    """How the secret computation runs.

    Attributes:
        network: the line between parties that the program is for: on a fast one it takes less work, in more rounds.
        protocol: ABY3: three parties, at most one corrupt. CHEETAH: two parties, no helper, slow. SEMI2K: two parties,
            hides nothing from the first: for measurement only. REF2K: one party, no secrecy: the arithmetic alone.
    """

    protocol: Annotated[str | None, _or("ABY3", "ABY3|SEMI2K|CHEETAH|REF2K")] = None
    network: Annotated[str | None, _or("wan", "wan|lan")] = None

    def start(self, folder: Path) -> Any:
        """The parties for a model. Where it has a plan of bits, their fraction bits are by default those of plans."""
        from flaxmpc.serve import plans

        return plans.parties(folder, **self.given())


def _parties(count: int) -> str:
    return "1 party" if count == 1 else f"{count} parties"


@contextlib.contextmanager
def _errors_as_json(json_: bool) -> Iterator[None]:
    """With --json an error is a JSON object on standard output, beside its line on standard error."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, SecureError) as error:
        if json_:
            print(json.dumps({"error": " ".join(str(error).split())}))
        raise


@contextlib.contextmanager
def _says_where(given: texts.Given) -> Iterator[None]:
    """The error of a text names its line, or its place on the command line."""
    try:
        yield
    except TextError as error:
        raise ValueError(f"{given.places[error.place]} {error.reason}") from error


def _bar(items: Sequence[Any]) -> Iterable[Any]:
    """The items, with a bar on standard error if that is a terminal."""
    err = console(stderr=True)
    return track(items, "computing on secret shares", console=err, transient=True, disable=not err.is_terminal)


def infer(
    texts_: Annotated[tuple[str, ...], tyro.conf.Positional, _or("", "[TEXT ...]")] = (),
    /,
    pair: Annotated[tuple[tuple[str, str], ...], tyro.conf.UseAppendAction, _or("", "TEXT TEXT")] = (),
    file: OptionalPath = None,
    format_: Annotated[str | None, tyro.conf.arg(name="format"), _or("", "|".join(texts.FORMATS))] = None,
    text_columns: Annotated[tuple[str, ...], _or("", "NAME [NAME]")] = (),
    out: OptionalPath = None,
    model: Annotated[str | None, _or(zoo.DEFAULT, "NAME|FOLDER")] = None,
    cluster: OptionalPath = None,
    runtime: tyro.conf.OmitArgPrefixes[Runtime] = Runtime(),
    public_weights: Flag = False,
    json_: Json = False,
) -> None:
    """Answers texts on secret shares, and compares with the clear.

    The model's head says what: a label, entities, an answer, words at [MASK].

    Without --cluster the parties are threads of this process: it sees all.

    The exit code is 2 if a text has no answer, as where a model diverges.

    Args:
        texts_: texts, for a model of single texts.
        pair: two texts, such as premise and hypothesis, or a question and a text, for a model of pairs; may be given
            again.
        file: more texts, UTF-8: one a line, or the rows of a table, by its suffix; "-" is standard input.
        format_: the format of the file, where its suffix does not say it.
        text_columns: the columns of a table: one, or two for pairs; by default the first usual names that it has.
        out: a file for the answers, .csv or .jsonl, in place of the table on the screen.
        model: a name of the zoo (`flaxmpc zoo list`), a model folder, or a model on the hub, OWNER/NAME or
            OWNER/NAME@REVISION: the hub learns which model is fetched, and no text; a copy is kept in its cache. On a
            cluster the name that it was put under, by default the only one there.
        cluster: ask the parties of this cluster.toml (or its folder), in place of own ones.
        public_weights: the parties know the weights, as of a model that is published anyway: only texts and answers are
            secret, and a run costs less. On a cluster the owner's `put` says it.
        json_: print one JSON object: results, cost, model, versions; or an error.
    """
    with _errors_as_json(json_):
        given = texts.of_arguments(texts_, pair)
        if file is not None:
            given += texts.of_file(file, format_, text_columns)
        elif format_ is not None or text_columns:
            raise ValueError("--format and --text-columns are of a --file, and there is none")
        if not given.texts:
            raise ValueError("there is no text: give some, or --file")
        if out is not None:
            results.check_out(out, file)
        with _says_where(given):
            if cluster is None:
                asked = _ask_here(model or zoo.DEFAULT, runtime, given.texts, public_weights)
            elif public_weights:
                raise ValueError("--public-weights: on a cluster the owner's `put` says it; leave it out, or --cluster")
            elif said := runtime.given():
                options = " and ".join(f"--{name.replace('_', '-')}" for name in said)
                raise ValueError(f"{options}: on a cluster its cluster.toml says it; leave it out, or --cluster")
            else:
                asked = deploy.ask(cluster, model, given.texts, _bar)
        predictions = asked.inference.predictions
        error = results.unanswered(predictions, given.places)
        if out is not None:
            results.write(out, asked)
    results.say_cut(console(stderr=True), predictions, limit(asked.client.config))
    if json_:
        print(results.as_json(asked, error))
    else:
        if out is not None:
            print(f"written: {out}")
        else:
            console().print(results.table(asked))
        console().print(asked.summary)
    if error is not None:
        raise ValueError(error)


def _ask_here(name: str, runtime: Runtime, given: Sequence[Text], public_weights: bool) -> results.Asked:
    """Asks a model in this process, whose threads are the parties."""
    folder = zoo.with_weights(name)
    from flaxmpc.serve.private import SecureClassifier

    with console(stderr=True).status("starting the parties and sharing the weights"):
        parties = runtime.start(folder)
        classifier = SecureClassifier.from_folder(folder, parties, public_weights=public_weights)
    found = classifier.classify(given, _bar)
    cost = found.cost
    summary = (
        f"{name_of(folder)}, {'public weights, ' if public_weights else ''}{cost.protocol}, {_parties(cost.parties)}: "
        f"{cost.seconds:.1f} s, {cost.bytes_sent / 1e6:.1f} MB in all, {cost.rounds:.0f} rounds"
    )
    return results.Asked(name_of(folder), classifier, found, summary, {"public_weights": public_weights})


def cost(
    model: PositionalModel = zoo.DEFAULT,
    /,
    tokens: int = 32,
    sentences: int = 1,
    runtime: tyro.conf.OmitArgPrefixes[Runtime] = Runtime(),
    public_weights: Flag = False,
    json_: Json = False,
) -> None:
    """What a run would cost, without secrets: zeros cost as much.

    Args:
        model: a name of the zoo, a model folder, or a name on the hub, see `infer`.
        tokens: length of the sentences, [CLS] and [SEP] included.
        sentences: how many in one run.
        public_weights: the parties know the weights, see `infer`.
        json_: print one JSON object: the record, or an error.
    """
    with _errors_as_json(json_):
        folder = zoo.with_weights(model)
        from flaxmpc import secure
        from flaxmpc.serve.private import SecureClassifier

        with console(stderr=True).status("measuring"):
            parties = runtime.start(folder)
            model_ = SecureClassifier.from_folder(folder, parties, public_weights=public_weights)
            record = model_.estimate(tokens, sentences)
    modelled = {f"{network.name.lower()}_seconds": network.seconds(record) for network in (secure.LAN, secure.WAN)}
    exact = secure.PROTOCOLS[record.protocol].rounds_exact
    if json_:
        shape = {"model": name_of(folder), "tokens": tokens, "sentences": sentences}
        rest = {**modelled, "indicative": not exact, "public_weights": public_weights}
        print(json.dumps({**shape, **record.as_dict(), **rest}, allow_nan=False))
        return
    out = console()
    held = ", public weights" if public_weights else ""
    out.print(f"{name_of(folder)}, {sentences} x {tokens} tokens, {record.protocol}, {_parties(record.parties)}{held}")
    table = Table("operation", "count", "seconds", "MB in all", "rounds")
    for name, op in record.per_op.items():
        if op.bytes_sent:
            table.add_row(name, str(op.count), f"{op.seconds:.2f}", f"{op.bytes_sent / 1e6:.2f}", f"{op.rounds:.0f}")
    table.add_section()
    table.add_row("whole run", "", f"{record.seconds:.2f}", f"{record.bytes_sent / 1e6:.2f}", f"{record.rounds:.0f}")
    out.print(table)
    out.print(
        f"modelled{'' if exact else ', indicative'}: LAN (3 Gbit/s, 1 ms) {modelled['lan_seconds']:.1f} s, "
        f"WAN (100 Mbit/s, 80 ms) {modelled['wan_seconds']:.1f} s"
    )
    if not exact:
        out.print(f"indicative: in {record.protocol} not every counted round is one of the network's")


def check(
    model: PositionalModel = zoo.DEFAULT,
    /,
    file: OptionalPath = None,
    sentences: int = 200,
    arithmetic: tyro.conf.OmitArgPrefixes[FixedPoint] = FixedPoint(),
    json_: Json = False,
) -> None:
    """How far a model stays from fixed-point overflow, on sentences in the clear.

    SPU overflows silently. The exit code is 2 if fewer than 2 bits are left.

    Args:
        model: a name of the zoo, a model folder, or a name on the hub, see `infer`.
        file: texts, as for `infer`; by default the validation sentences of the movie reviews.
        sentences: how many of them.
        json_: print one JSON object: the record, or an error.
    """
    with _errors_as_json(json_):
        if sentences < 1:
            raise ValueError(f"--sentences must be at least 1, not {sentences}")
        folder = zoo.with_weights(model)
        from flaxmpc.models import folder as folders
        from flaxmpc.serve import private

        given = texts.of_file(file) if file is not None else _movie_sentences()
        some = given.texts[:sentences]
        with console(stderr=True).status(f"computing {len(some)} text(s) in the clear"), _says_where(given):
            margins = private.check(folders.load(folder), some, **arithmetic.given())
    risk = None
    try:
        margins.require()
    except ValueError as error:
        risk = error
    if json_:
        record = {"model": name_of(folder), "sentences": len(some), **margins.as_dict()}
        print(json.dumps(record | ({"error": str(risk)} if risk else {}), allow_nan=False))
    else:
        table = Table(Column("operation", overflow="fold"), "quantity", "largest", "limit", "bits left")
        for op in margins.table(10):
            name = f"{op.where}: {op.primitive} ({op.source})"
            table.add_row(name, op.quantity, f"{op.magnitude:.3g}", f"{op.limit:.3g}", f"{op.margin_bits:.1f}")
        console().print(table)
        console().print(
            f"{name_of(folder)}, {margins.ring} with {margins.fraction_bits} fraction bits, {len(some)} sentences: "
            f"{margins.margin_bits:.1f} bits of margin"
        )
    if risk is not None:
        raise risk


def plan(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME|FOLDER")],
    /,
    file: OptionalPath = None,
    sentences: int = 100,
    error: float = 0.02,
    json_: Json = False,
) -> None:
    """Plans how many bits every number of a model has, so that fewer products are truncated.

    The plan is made from texts in the clear, and kept in the model's folder as bits.json. `infer` and `cost` follow it.
    It is for models without a division or an exponential on shares, such as 2quad_freediv with quad.

    Args:
        model: a name of the zoo, a model folder, or a name on the hub, see `infer`.
        file: texts, as for `infer`; by default the validation sentences of the movie reviews.
        sentences: how many of them.
        error: the standard deviation of a logit that all roundings together may make.
        json_: print one JSON object: the plan, or an error.
    """
    with _errors_as_json(json_):
        if sentences < 1:
            raise ValueError(f"--sentences must be at least 1, not {sentences}")
        if not 0 < error < 1e6:
            raise ValueError(f"--error must be a positive number, not {error:g}")
        folder = zoo.with_weights(model)
        from flaxmpc.models import folder as folders
        from flaxmpc.serve import plans, private

        given = texts.of_file(file) if file is not None else _movie_sentences()
        some = given.texts[:sentences]
        with console(stderr=True).status(f"planning from {len(some)} text(s)") as status, _says_where(given):
            loaded = folders.load(folder)
            tried = private.plan_bits(loaded, some, error=error, progress=status.update)
    if json_:
        print(json.dumps({"model": name_of(folder), **tried._asdict(), "plan": tried.plan.as_dict()}, allow_nan=False))
        return
    encoder = f"{type(loaded.model).__name__}/{loaded.model.base_model_prefix}/"
    table = Table(Column("truncated", overflow="fold"), "numbers", "largest", "bits", "kept", "to spare")
    for step in tried.plan.steps:
        if step.kept is not None:
            sizes = f"{step.magnitude:.3g}", str(step.bits), str(step.kept), f"{step.spare_bits:.1f}"
            table.add_row(step.where.removeprefix(encoder), str(step.elements), *sizes)
    out = console()
    out.print(table)
    out.print(f"{name_of(folder)}: {tried.plan}")
    out.print(
        f"in the clear: logits within {tried.difference:.3f} of the model's, "
        f"{tried.same_labels} of {tried.texts} labels the same"
    )
    out.print(f"written: {folder / plans.FILE}")


def _movie_sentences() -> texts.Given:
    from flaxmpc.data.batches import movie_sentences

    found = list(movie_sentences()["validation"]["sentence"])
    return texts.Given(found, [f"movie validation, row {row} (from 0)" for row in range(len(found))])
