"""What every student is worth, task by task: in the clear, in fixed point, on three parties' shares.

    python benchmarks/accuracy.py [--json]

Nothing is measured here: the figures are those that the recipes in train/ leave with each model (models/*/results.json,
and models/*/runs/*.json for other seeds and for what was left out). Fractions, not per cent. `size` is the number of
parameters, `value` the task's own metric; `difference` is student minus teacher in accuracy over the same test rows,
with its 95 % paired bootstrap interval; `pieces_agreement` is the share of the teacher's labels on pieces of 1 to 6
tokens of the test rows. Saved are a table for each task, one of GLUE's tasks beside MPCFormer's published figures, and
as CSV a row for each model and protocol.
"""

import csv
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import tyro
from harness import RESULTS, Options, Record, collected, markdown, saved
from style import colour, figure, titled

from flaxmpc.models.base import num_params
from flaxmpc.models.folder import read_model
from flaxmpc.training.metrics import headline

ZOO = Path(__file__).parent.parent / "models"

FIGURES = (
    "difference",
    "ci_low",
    "ci_high",
    "pieces_agreement",
    "ref2k_agreement",
    "ref2k_max_logit_difference",
    "aby3_agreement",
    "aby3_max_logit_difference",
    "aby3_sentences",
)


class Published(NamedTuple):
    """What a paper says of a task: the mean of these metrics, of BERT-Base and of the student of it, in per cent."""

    metrics: tuple[str, ...]
    teacher: float
    student: float


# MPCFormer's student with 2Quad and Quad: arXiv 2211.01452, the same table in its repository's figures/result_glue.PNG.
MPCFORMER = {
    "sst2": Published(("accuracy",), 93.1, 92.0),
    "cola": Published(("matthews_correlation",), 57.8, 52.6),
    "stsb": Published(("pearson", "spearman"), 89.1, 80.3),
    "mrpc": Published(("f1",), 90.3, 88.7),
    "rte": Published(("accuracy",), 69.7, 64.9),
}


def stages(recipe: dict[str, Any]) -> str:
    """What a recipe trains on, the heavier first: `hidden, then hidden + logit`; `label` for no distillation."""
    names = []
    for stage in (recipe["stage1"], recipe["stage2"]):
        weights = {name: stage[f"{name}_weight"] for name in ("hidden", "score", "logit", "label")}
        if stage["epochs"]:
            used = [name for name, weight in weights.items() if weight]
            names.append(" + ".join(sorted(used, key=weights.__getitem__, reverse=True)))
    return ", then ".join(names) or "none"


class Run(NamedTuple):
    """A student: its name, recipe and results, and the folder of the entry that it is a run of."""

    name: str
    recipe: dict[str, Any]
    results: dict[str, Any]
    entry: Path


def runs() -> Iterator[Run]:
    for path in sorted(ZOO.glob("*/recipe.json")):
        recipe = json.loads(path.read_text("utf-8"))
        if "attention" in recipe:
            results = json.loads((path.parent / "results.json").read_text("utf-8"))
            yield Run(path.parent.name, recipe, results, path.parent)
        for other in sorted(path.parent.glob("runs/*.json")):
            found = json.loads(other.read_text("utf-8"))
            recipe = found["recipe"]
            if "attention" in recipe:  # what a search chose stands beside the recipe
                chosen = found["search"]["chosen"]["parts"] if "search" in found else {}
                yield Run(f"{path.parent.name}/{other.stem}", recipe | chosen, found["results"], path.parent)


def shape(run: Run) -> dict[str, int]:
    """How many layers a student has, public ones too, and how many parameters."""
    model = read_model(run.entry)
    own = model.config
    layers = len(run.recipe.get("kept_layers") or ()) or run.recipe["num_hidden_layers"] or own.num_hidden_layers
    parts = {"attention": own.attention_of(0), "hidden_act": own.hidden_act_of(0)}
    norms = (own.layer_norms_of(0),) * layers
    fields = ("num_attention_heads", "intermediate_size", "layers_sharing_scores")
    changed = {field: run.recipe[field] for field in fields if run.recipe.get(field) is not None}
    config = dataclasses.replace(own, **parts, **changed, layer_norm=norms, num_hidden_layers=layers)
    return {"num_layers": layers, "size": num_params(type(model)(config))}


def task_of(recipe: dict[str, Any]) -> str:
    """The name of a recipe's data: a task, or the folder or file."""
    task, _, folder = recipe["data"].partition("=")
    return task if folder else Path(task).stem


def records() -> list[Record]:
    """One for each student; a figure that was not measured is None."""
    return [_record(run) for run in runs()]


def _record(run: Run) -> Record:
    name, recipe, results, _ = run
    task = task_of(recipe)
    metric = headline(results)
    own = {f"{prefix}value": results.get(f"{prefix}{metric}") for prefix in ("", "teacher_", "ref2k_", "aby3_")}
    return {
        "model": name,
        "task": task,
        "metric": metric,
        **shape(run),
        **own,
        "attention": recipe["attention"],
        "activation": recipe["activation"],
        "layer_norm": recipe["layer_norm"],
        "stages": stages(recipe),
        "seed": recipe["seed"],
        "train_embeddings": recipe["train_embeddings"],
        **{figure: results.get(figure) for figure in FIGURES},
    }


def short(row: Record) -> str:
    """A student's name without its teacher's."""
    return row["model"].removeprefix(f"{row['task']}-minilm-l6-")


def plot(found: list[Record]) -> Any:
    """Each student's difference from its teacher, with its interval, in points."""
    rows = [record for record in found if record["difference"] is not None]
    made, axes = figure(figsize=(8, 1.6 + 0.3 * len(rows)))
    axis = axes[0][0]
    for y, row in enumerate(reversed(rows)):
        low, middle, high = (100 * row[name] for name in ("ci_low", "difference", "ci_high"))
        own = colour(row["attention"]) if isinstance(row["attention"], str) else "0.5"
        axis.errorbar(middle, y, xerr=[[middle - low], [high - middle]], fmt="o", color=own, capsize=3)
    axis.axvline(0, color="0.4", linewidth=0.8)
    axis.axvspan(-0.5, 0.5, color="0.92", zorder=0)
    axis.set_yticks(range(len(rows)), [f"{row['task']}: {short(row)}" for row in reversed(rows)])
    axis.set(xlabel="student minus teacher, points of test accuracy\n(95 % interval; grey: within 0.5)")
    axis.margins(y=0.02)
    return titled(made, "What students lose, in the clear; colours are attentions", [{}])


def table(found: list[Record]) -> list[list[str]]:
    """Heading and rows of the students of one task, in per cent; differences in points."""

    def percent(value: float | None, form: str = ".1f") -> str:
        return "" if value is None else format(100 * value, form)

    def points(row: Record) -> str:
        if row["metric"] != "accuracy":
            return percent(row["value"] - row["teacher_value"], "+.2f")
        middle, low, high = (percent(row[name], "+.2f") for name in ("difference", "ci_low", "ci_high"))
        return f"{middle} ({low} to {high})" if low else middle

    head = ["model", "test", "teacher", "difference", "pieces", "REF2K", "as in REF2K", "as in ABY3"]
    rows = []
    for row in found:
        names = ("pieces_agreement", "ref2k_value", "ref2k_agreement", "aby3_agreement")
        clear = [percent(row["value"]), percent(row["teacher_value"]), points(row)]
        rows.append([short(row), *clear, *(percent(row[name]) for name in names)])
    return [head, *rows]


def tables(found: list[Record]) -> dict[str, list[list[str]]]:
    """A table for each task, by its name and metric."""
    titles = dict.fromkeys(f"`{row['task']}`, {row['metric']}" for row in found)
    return {title: table([row for row in found if title == f"`{row['task']}`, {row['metric']}"]) for title in titles}


BESIDE = "GLUE, MPCFormer's published drops beside ours"


def glue(found: Iterable[Run]) -> list[list[str]]:
    """Heading and rows, in per cent: MPCFormer's drop on each task beside that of our `2quad-freediv`.

    Ours is the mean over the seeds. Of several tasks, the last row is the mean.
    """
    found = list(found)
    rows: dict[str, list[float]] = {}
    for task, (names, *published) in MPCFORMER.items():
        entry = f"{task}-minilm-l6-2quad-freediv"
        seeds = [run.results for run in found if run.name == entry or run.name.startswith(f"{entry}/seed-")]
        if seeds:
            own = [100 * mean(seed[f"{of}{name}"] for seed in seeds for name in names) for of in ("teacher_", "")]
            rows[", ".join((task, *names))] = [*published, *own]
    if len(rows) > 1:
        rows["mean"] = [mean(column) for column in zip(*rows.values(), strict=True)]
    head = ["task", "BERT-Base", "MPCFormer", "drop", "MiniLM-L6", "2quad-freediv", "drop"]
    return [head] + [
        [
            title,
            *(f"{figure:.1f}" for figure in (teacher, student, teacher - student, own_teacher, own, own_teacher - own)),
        ]
        for title, (teacher, student, own_teacher, own) in rows.items()
    ]


def measurements(found: list[Record]) -> list[Record]:
    """One row for each model and what it was measured in: float32 in the clear, fixed point (REF2K), shares (ABY3).

    `rounds` and `bytes_sent_total` are those of a text of 64 tokens on ABY3, where pareto.py measured the model.
    """
    costs = {record["model"]: record for record in saved("pareto")}
    rows = []
    for record in found:
        same = ("model", "task", "metric", "size", "num_layers", "attention", "activation", "seed")
        for protocol, prefix in (("", ""), ("REF2K", "ref2k_"), ("ABY3", "aby3_")):
            if record[f"{prefix}value"] is None:
                continue
            cost = costs.get(record["model"], {}) if protocol == "ABY3" else {}
            rows.append(
                {name: record[name] for name in same}
                | {"precision": "FM64" if protocol else "float32", "protocol": protocol}
                | {"value": record[f"{prefix}value"], "agreement": record.get(f"{prefix}agreement")}
                | {name: cost.get(name) for name in ("rounds", "bytes_sent_total")}
            )
    return rows


def main(options: Options) -> None:
    """Prints the tables or the records; without --show and --quick also writes tables, records and plot."""
    found = records()
    by_task = tables(found) | {BESIDE: glue(runs())}
    if not (options.show or options.quick):
        with (RESULTS / "accuracy.csv").open("w", encoding="utf-8", newline="") as file:
            rows = measurements(found)
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    # In the clear, then under MPC: together they are wider than 80 columns.
    printed = [[[row[0], *row[c]] for row in rows] for rows in by_task.values() for c in (slice(1, 4), slice(4, None))]
    joined = "\n\n".join(f"{title}:\n\n{markdown(rows)}" for title, rows in by_task.items())
    collected("accuracy", found, joined, plot, options, printed)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
