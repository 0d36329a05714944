"""What every attention variant costs in accuracy: in the clear, in fixed point, on three parties' shares.

    python benchmarks/accuracy.py [--json]

Nothing is measured here: the figures are those that `train/movie.py` leaves with each model (models/*/results.json, and
models/*/runs/*.json for other seeds and for what was left out). Fractions, not per cent. `difference` is student minus
teacher over the same test rows, with its 95 % paired bootstrap interval; `pieces_agreement` is the share of the
teacher's labels on pieces of 1 to 6 tokens of the test rows.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from harness import Options, Record, collected

ZOO = Path(__file__).parent.parent / "models"

FIGURES = (
    "accuracy",
    "teacher_accuracy",
    "difference",
    "ci_low",
    "ci_high",
    "pieces_agreement",
    "ref2k_accuracy",
    "ref2k_agreement",
    "ref2k_max_logit_difference",
    "aby3_agreement",
    "aby3_max_logit_difference",
    "aby3_sentences",
)


def stages(recipe: dict[str, Any]) -> str:
    """What a recipe trains on, the heavier first: `hidden, then hidden + logit`; `label` for no distillation."""
    names = []
    for stage in (recipe["stage1"], recipe["stage2"]):
        weights = {name: stage[f"{name}_weight"] for name in ("hidden", "score", "logit", "label")}
        if stage["epochs"]:
            used = [name for name, weight in weights.items() if weight]
            names.append(" + ".join(sorted(used, key=weights.__getitem__, reverse=True)))
    return ", then ".join(names) or "none"


def runs() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, recipe and results of every student."""
    for path in sorted(ZOO.glob("*/recipe.json")):
        recipe = json.loads(path.read_text("utf-8"))
        if "attention" in recipe:
            yield path.parent.name, recipe, json.loads((path.parent / "results.json").read_text("utf-8"))
        for other in sorted(path.parent.glob("runs/*.json")):
            found = json.loads(other.read_text("utf-8"))
            recipe = found["recipe"]
            if "attention" in recipe:  # what a search chose stands beside the recipe
                chosen = found["search"]["chosen"]["parts"] if "search" in found else {}
                yield f"{path.parent.name}/{other.stem}", recipe | chosen, found["results"]


def records() -> list[Record]:
    """One for each student; a figure that was not measured is None."""
    return [
        {
            "model": name,
            "attention": recipe["attention"],
            "activation": recipe["activation"],
            "layer_norm": recipe["layer_norm"],
            "stages": stages(recipe),
            "seed": recipe["seed"],
            "train_embeddings": recipe["train_embeddings"],
            **{figure: results.get(figure) for figure in FIGURES},
        }
        for name, recipe, results in runs()
    ]


def short(row: Record) -> str:
    """A student's name without its teacher's."""
    return row["model"].removeprefix("movie-minilm-l6-")


def plot(found: list[Record]) -> Any:
    """Each student's difference from its teacher, with its interval, in points."""
    from matplotlib.figure import Figure

    rows = [record for record in found if record["difference"] is not None]
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for y, row in enumerate(reversed(rows)):
        low, middle, high = (100 * row[name] for name in ("ci_low", "difference", "ci_high"))
        axis.errorbar(middle, y, xerr=[[middle - low], [high - middle]], fmt="o", color="C0", capsize=3)
    axis.axvline(0, color="0.4", linewidth=0.8)
    axis.axvspan(-0.5, 0.5, color="0.92", zorder=0)
    axis.set_yticks(range(len(rows)), [short(row) for row in reversed(rows)])
    axis.set(xlabel="student minus teacher, points of test accuracy\n(95 % interval; grey: within 0.5)")
    return figure


def table(found: list[Record]) -> list[list[str]]:
    """Heading and rows, in per cent; differences in points."""

    def percent(value: float | None, form: str = ".1f") -> str:
        return "" if value is None else format(100 * value, form)

    def points(row: Record) -> str:
        middle, low, high = (percent(row[name], "+.2f") for name in ("difference", "ci_low", "ci_high"))
        return f"{middle} ({low} to {high})" if low else middle

    head = ["model", "test", "teacher", "difference", "pieces", "REF2K", "as in REF2K", "as in ABY3"]
    rows = []
    for row in found:
        names = ("pieces_agreement", "ref2k_accuracy", "ref2k_agreement", "aby3_agreement")
        clear = [percent(row["accuracy"]), percent(row["teacher_accuracy"]), points(row)]
        rows.append([short(row), *clear, *(percent(row[name]) for name in names)])
    return [head, *rows]


def main(options: Options) -> None:
    """Prints the table or the records; without --show and --quick also writes table and plot."""
    found = records()
    rows = table(found)
    # In the clear, then under MPC: together they are wider than 80 columns.
    printed = [[[row[0], *row[columns]] for row in rows] for columns in (slice(1, 4), slice(4, None))]
    collected("accuracy", found, rows, plot, options, printed)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
