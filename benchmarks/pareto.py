"""Accuracy against modelled latency, LAN and WAN, of every model in the zoo and of the teachers they come from.

    python benchmarks/pareto.py [--json] [--show] [--quick]

Accuracies are those in the zoo (models/*/results.json), with the 95 % interval of their difference from the teacher's;
costs are measured here, on ABY3, one sentence of 64 tokens. A teacher is its students' shape with softmax and GeLU, as
written, in their place. Twenty seconds a model on 2 idle cores.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from harness import Benchmark, Options, Record, record
from style import colour, figure, log, titled
from variants import SHARED_RECIPROCAL, ours

from flaxmpc import secure
from flaxmpc.models import zoo
from flaxmpc.models.config import EncoderConfig
from flaxmpc.models.folder import read_config


def names(config: EncoderConfig) -> dict[str, str]:
    """The parts' names, of all layers that differ."""
    layers = range(config.num_hidden_layers)
    return {
        "attention": ", ".join(dict.fromkeys(config.attention_of(i).name for i in layers)),
        "activation": ", ".join(dict.fromkeys(config.hidden_act_of(i).name for i in layers)),
    }


def teacher_of(config: EncoderConfig) -> EncoderConfig:
    return dataclasses.replace(config, attention="softmax", hidden_act="gelu", layer_norm="layer_norm")


def measure(config: EncoderConfig, tokens: int, *, folded: bool, **fields: Any) -> Record:
    """Of the shape, with random weights: not all entries have theirs in the repository."""
    cost = ours(config, folded=folded, batch=1, tokens=tokens).run(secure.InProcess("ABY3")).cost
    return record(cost, shared_reciprocal=SHARED_RECIPROCAL, **fields, **names(config), num_tokens=tokens)


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    tokens = 4 if quick else 64
    teachers: set[str] = set()
    for name, folder in zoo.entries().items():
        found = zoo.results(folder)
        if "difference" not in found:
            continue  # such as a teacher, which its students bring
        config = read_config(folder)
        teacher = Path(json.loads((folder / "recipe.json").read_text("utf-8"))["teacher"]).name
        figures = {field: found[field] for field in ("accuracy", "teacher_accuracy", "ci_low", "ci_high")}
        yield name, partial(measure, config, tokens, folded=True, model=name, **figures)
        if teacher not in teachers:
            teachers.add(teacher)
            figures = dict.fromkeys(("accuracy", "teacher_accuracy"), found["teacher_accuracy"])
            figures |= {"ci_low": 0.0, "ci_high": 0.0}
            yield teacher, partial(measure, teacher_of(config), tokens, folded=False, model=teacher, **figures)


def finish(records: list[Record]) -> list[Record]:
    """With `pareto_lan` and `pareto_wan`: that no model is as accurate in less time, or more so in no more."""

    def better(a: Record, b: Record, field: str) -> bool:
        return a["accuracy"] >= b["accuracy"] and a[field] <= b[field] and (
            a["accuracy"] > b["accuracy"] or a[field] < b[field]
        )  # fmt: skip

    for network in ("lan", "wan"):
        for own in records:
            own[f"pareto_{network}"] = not any(better(r, own, f"{network}_seconds") for r in records)
    return records


def plot(records: list[Record]) -> Any:
    made, axes = figure(1, 2, figsize=(11, 4.6), sharey=True)
    for axis, network in zip(axes[0], ("lan", "wan"), strict=True):
        field = f"{network}_seconds"
        for own in records:
            teacher = own["activation"] == "gelu"
            label = f"{own['model']} ({own['attention']} + {own['activation']})"
            look = {"color": "0.5" if teacher else colour(own["attention"]), "marker": "s" if teacher else "o"}
            axis.plot(own[field], 100 * own["accuracy"], linestyle="", markersize=9, label=label, **look)
            interval = [100 * (own["teacher_accuracy"] + own[end]) for end in ("ci_low", "ci_high")]
            axis.plot([own[field]] * 2, interval, color=look["color"], linewidth=1)
        front = sorted((r for r in records if r[f"pareto_{network}"]), key=lambda r: r[field])
        x, y = [r[field] for r in front], [100 * r["accuracy"] for r in front]
        axis.step(x, y, where="post", color="0.6", zorder=0, label="none is as accurate in less time")
        axis.set(xlabel=f"seconds, {network.upper()} (modelled)")
        log(axis.xaxis)
        axis.margins(x=0.15, y=0.2)
    axes[0][0].set(ylabel="test accuracy, %\n(line: 95 % interval of the\ndifference from the teacher)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=2)
    return titled(made, "The zoo on movie sentences: a circle is a student, the square their teacher", records)


def benchmark(quick: bool) -> Benchmark:
    columns = ("model", "accuracy", "bytes_sent_total", "rounds", "lan_seconds", "wan_seconds")
    return Benchmark("pareto", partial(jobs, quick), (columns,), finish, plots={"": plot})


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
