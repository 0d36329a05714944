"""The front that `flaxmpc convert --budget` searched, beside choices by hand, by the same losses and costs.

    python benchmarks/front.py [--json] [--show] [--quick]

Nothing is measured here: a search leaves what it found with its student, in models/*/runs/*.json. Costs are of one text
of 64 tokens on ABY3, without a plan of bits. A loss is a sum over places, of the mean squared difference of the logits
that a part makes in its place after a short training, in the variance of the teacher's: it ranks choices, and what
a whole student of one loses after distillation is in its results. By hand are choices of the same parts in every layer.
No search has `layer_norm_constant` after the feed-forward of two layers in a row, see `convert.search.neighbours`.
"""

import json
from typing import Any

import tyro
from accuracy import ZOO
from harness import Options, Record, collected, markdown
from style import figure, log, titled

FIELDS = ("attention", "activation", "after_attention", "after_feed_forward")
POLYNOMIALS = ("layer_norm_chebyshev", "layer_norm_chebyshev")
BY_HAND = {
    "the teacher's": ("softmax", "gelu", *POLYNOMIALS),
    "softmax_freediv + quad": ("softmax_freediv", "quad", *POLYNOMIALS),
    "2quad_freediv + quad": ("2quad_freediv", "quad", *POLYNOMIALS),
    "no root after attention": ("2quad_freediv", "quad", "layer_norm_constant", "layer_norm_chebyshev"),
    "scaling + quad": ("scaling", "quad", *POLYNOMIALS),
}


def records() -> list[Record]:
    """One for each choice of each search, cheapest first; `cost` is in `unit`."""
    found = []
    for path in sorted(ZOO.glob("*/runs/*.json")):
        run = json.loads(path.read_text("utf-8"))
        if (search := run.get("search")) is None:
            continue
        shared = {"model": f"{path.parents[1].name}/{path.stem}", "budget": search["budget"]["what"]}
        found += [
            {**shared, "choice": "searched", "cost": one["cost"], "loss": one["loss"], **one["parts"]}
            for one in search["front"]
        ]
        chosen = search["chosen"]
        figures = {name: run["results"][name] for name in ("accuracy", "difference", "ci_low", "ci_high")}
        found.append({
            **shared, "choice": "chosen", "cost": chosen["cost"], "loss": chosen["loss"], **chosen["parts"], **figures
        })  # fmt: skip
        places = [place.split(", ") for place in search["losses"]]
        for name, parts in BY_HAND.items():
            taken = [(f"{layer}, {field}", parts[FIELDS.index(field)]) for layer, field in places]
            if all(part in search["losses"][place] for place, part in taken):
                loss, above = (
                    sum(search[table][place][part] for place, part in taken) for table in ("losses", "costs")
                )
                found.append({**shared, "choice": name, "cost": search["base"] + above, "loss": loss})
    return found


def plot(found: list[Record]) -> Any:
    """Loss against cost, a panel for each search."""
    models = list(dict.fromkeys(row["model"] for row in found))
    made, axes = figure(1, len(models), figsize=(7 * len(models), 4.8))
    for axis, model in zip(axes[0], models, strict=True):
        rows = [row for row in found if row["model"] == model]
        front = [row for row in rows if row["choice"] == "searched"]
        x, y = [row["cost"] for row in front], [row["loss"] for row in front]
        axis.plot(x, y, ".-", color="0.5", label="front of the search")
        for i, row in enumerate(row for row in rows if row["choice"] != "searched"):
            label = "the student of this search, its cost as measured" if row["choice"] == "chosen" else row["choice"]
            marker = {"marker": "*", "markersize": 12} if row["choice"] == "chosen" else {"marker": "o"}
            axis.plot(row["cost"], row["loss"], linestyle="", color=f"C{i}", label=label, **marker)
        axis.set(
            xlabel=f"cost of a request: {LABELS[rows[0]['budget']]}",
            ylabel="loss: of the logits' variance, summed over places",
        )
        log(axis.xaxis)
        axis.legend(fontsize="small")
    return titled(made, f"Parts that a search chose, beside choices by hand: {', '.join(models)}", [{}])


LABELS = {
    "lan": "modelled seconds, LAN",
    "wan": "modelled seconds, WAN",
    "bytes": "bytes of all parties",
    "rounds": "rounds",
}


def table(found: list[Record]) -> list[list[str]]:
    """Heading and rows: what stands by hand, and the student; of the front a few."""

    def points(row: Record) -> str:
        if "difference" not in row:
            return ""
        return " ".join(f"{100 * row[name]:+.2f}" for name in ("difference", "ci_low", "ci_high"))

    head = ["model", "budget", "choice", "cost", "loss", "student minus teacher, points (95 %)"]
    rows = [
        [row["model"], row["budget"], row["choice"], f"{row['cost']:.4g}", f"{row['loss']:.3f}", points(row)]
        for row in sorted(found, key=lambda row: (row["model"], row["cost"]))
    ]
    return [head, *rows]


def main(options: Options) -> None:
    """Prints the table or the records; without --show and --quick also writes table and plot."""
    found = records()
    if not found:
        raise SystemExit("no run in models/*/runs has a search: `train/movie.py 2quad-freediv/budget` makes one")
    rows = table(found)
    collected("front", found, markdown(rows), plot, options, [[row[1:] for row in rows]])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
