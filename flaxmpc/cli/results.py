"""Shows the answers of `infer`: as a table, one JSON object, or a file of CSV or JSONL."""

import csv
import io
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from flaxmpc.data.batches import Text
from flaxmpc.errors import unknown
from flaxmpc.serve.answers import Inference, Prediction
from flaxmpc.serve.classify import Client


def console(*, stderr: bool = False) -> Console:
    """A console that prints sentences and names as they are: no markup, no emoji codes."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


class Asked(NamedTuple):
    """A model that was asked, and its answers.

    Attributes:
        model: the model's name.
        client: who asked the model.
        inference: the answers, and their cost.
        summary: a line about the cost, for people.
        extra: more fields for the JSON object.
    """

    model: str
    client: Client
    inference: Inference
    summary: str
    extra: dict[str, Any]


def check_out(out: Path, file: Path | None) -> None:
    """Refuses (ValueError) a file that results can't be written to, before anything is computed."""
    if out.suffix.lower() not in _WRITERS:
        raise unknown("suffix of --out", out.suffix, _WRITERS)
    if not out.parent.is_dir():
        raise ValueError(f"{out}: {out.parent} is no folder")
    if out.is_dir():
        raise ValueError(f"{out} is a folder")
    if file is not None and out.exists() and file.exists() and out.samefile(file):
        raise ValueError(f"{out} is the file of the texts: the results would take its place")


def unanswered(predictions: Sequence[Prediction], places: Sequence[str]) -> str | None:
    """Says how many texts have no answer, and why the first of them has none; None: all have one."""
    errors = [f"{place}: {each.error}" for place, each in zip(places, predictions, strict=True) if each.error]
    if not errors:
        return None
    have = "has" if len(errors) == 1 else "have"
    return f"{len(errors)} of {len(predictions)} texts {have} no answer; {errors[0]}"


def as_json(asked: Asked, error: str | None) -> str:
    """The answers as one line of JSON: results, cost, model, versions, an error, and `Asked.extra`."""
    predictions, cost = asked.inference
    record: dict[str, Any] = {"results": [prediction.as_dict() for prediction in predictions], "cost": cost.as_dict()}
    record |= {"model": asked.model, "versions": cost.versions}
    if error is not None:
        record["error"] = error
    return json.dumps(record | asked.extra, allow_nan=False)


def table(asked: Asked) -> Table:
    """The answers as a table, a row for each text."""
    predictions = asked.inference.predictions
    kind = asked.client.kind
    compared = any(not math.isnan(prediction.difference) for prediction in predictions)
    found = Table("text", *kind.columns, *(["|secure - plaintext|"] if compared else []))
    for prediction in predictions:
        if prediction.error is None:
            cells = [shown(cell, 200) for cell in kind.cells(prediction)]
            if compared:
                cells.append(f"{prediction.difference:.4f}")
        else:
            cells = [f"no answer: {prediction.error}"]
        found.add_row(shown(prediction.text, 200), *cells)
    return found


def shown(text: Text, width: int) -> str:
    """A text on a terminal: cut, on one line, and without what a terminal would obey."""
    whole = text if isinstance(text, str) else " | ".join(text)
    short = textwrap.shorten(whole, width, placeholder=" ...")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


def say_cut(console: Console, predictions: Sequence[Prediction], limit: str) -> None:
    """Says which texts were cut: the first few of them."""
    cut = [prediction for prediction in predictions if prediction.truncated]
    for prediction in cut[:_FEW]:
        console.print(f"cut at {limit}: {shown(prediction.text, 60)!r}", soft_wrap=True)
    if len(cut) > _FEW:
        console.print(f"and so are {len(cut) - _FEW} more texts")


_FEW = 5


def write(out: Path, asked: Asked) -> None:
    """Writes the answers to a file whose name `check_out` allows: a row for each text, in their order."""
    out.write_text(_WRITERS[out.suffix.lower()](asked), "utf-8", newline="")


def _csv(asked: Asked) -> str:
    rows = [prediction.as_dict() for prediction in asked.inference.predictions]
    fields = ("text", "text1", "text2", *asked.client.kind.fields, "truncated", "error")
    names = [name for name in fields if name not in ("text", "text1", "text2") or name in rows[0]]
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(row.get(name, "")) for name in names] for row in rows)
    return written.getvalue()


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, allow_nan=False)


def _jsonl(asked: Asked) -> str:
    return "".join(
        json.dumps(prediction.as_dict(), allow_nan=False) + "\n" for prediction in asked.inference.predictions
    )


_WRITERS = {".csv": _csv, ".jsonl": _jsonl}
