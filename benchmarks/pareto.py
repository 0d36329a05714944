"""What models get right against modelled latency, LAN and WAN: every student in the zoo, and the teachers, by task.

    python benchmarks/pareto.py [--json] [--show] [--quick]

Scores, in each task's own metric, are those in the zoo (models/*/results.json), where it is accuracy with the 95 %
interval of their difference from the teacher's; costs are measured here, on ABY3, one text of 64 tokens. A teacher is
its students' shape with softmax and GeLU, as written, in their place. Twenty seconds a model on 2 idle cores.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from accuracy import task_of
from harness import Benchmark, Options, Record, model_parties, record
from style import colour, figure, log, titled
from variants import SHARED_RECIPROCAL, ours

from flaxmpc.models import zoo
from flaxmpc.models.config import EncoderConfig
from flaxmpc.models.folder import read_config
from flaxmpc.training.metrics import headline


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
    cost = ours(config, folded=folded, batch=1, tokens=tokens).run(model_parties("ABY3")).cost
    return record(cost, shared_reciprocal=SHARED_RECIPROCAL, **fields, **names(config), num_tokens=tokens)


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    tokens = 4 if quick else 64
    teachers: set[str] = set()
    for name, folder in zoo.entries().items():
        found = zoo.results(folder)
        metric = headline(found)
        if f"teacher_{metric}" not in found:
            continue  # such as a teacher, which its students bring
        config, recipe = read_config(folder), json.loads((folder / "recipe.json").read_text("utf-8"))
        teacher, task = Path(recipe["teacher"]).name, task_of(recipe)
        assert metric is not None
        same = {"task": task, "metric": metric, "teacher_score": found[f"teacher_{metric}"]}
        interval = {end: found[end] if metric == "accuracy" else None for end in ("ci_low", "ci_high")}
        own = {"model": name, **same, "score": found[metric], **interval}
        yield name, partial(measure, config, tokens, folded=True, **own)
        if teacher not in teachers:
            teachers.add(teacher)
            own = {"model": teacher, **same, "score": same["teacher_score"], "ci_low": None, "ci_high": None}
            yield teacher, partial(measure, teacher_of(config), tokens, folded=False, **own)


def finish(records: list[Record]) -> list[Record]:
    """With `pareto_lan` and `pareto_wan`: that no model of the task is as good in less time, or better in no more."""

    def better(a: Record, b: Record, field: str) -> bool:
        return a["task"] == b["task"] and a["score"] >= b["score"] and a[field] <= b[field] and (
            a["score"] > b["score"] or a[field] < b[field]
        )  # fmt: skip

    for network in ("lan", "wan"):
        for own in records:
            own[f"pareto_{network}"] = not any(better(r, own, f"{network}_seconds") for r in records)
    return records


def plot(records: list[Record]) -> Any:
    """A row of panels for each task."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    made, axes = figure(len(tasks), 2, figsize=(11, 1.6 + 3 * len(tasks)), sharey="row")
    for row, task in zip(axes, tasks, strict=True):
        of_task = [record for record in records if record["task"] == task]
        for axis, network in zip(row, ("lan", "wan"), strict=True):
            _draw(axis, of_task, f"pareto_{network}", f"{network}_seconds")
            axis.set(xlabel=f"seconds, {network.upper()} (modelled)", title=task)
        metric = of_task[0]["metric"].replace("_", " ")
        known = any(record["ci_low"] is not None for record in of_task)
        interval = "\n(line: 95 % interval of the\ndifference from the teacher)" if known else ""
        row[0].set(ylabel=f"test {metric}, %{interval}")
    handles = {label: handle for row in axes for handle, label in zip(*row[0].get_legend_handles_labels(), strict=True)}
    made.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    return titled(made, "The zoo, task by task: a circle is a student, the square their teacher", records)


def _draw(axis: Any, records: list[Record], on_front: str, field: str) -> None:
    for own in records:
        teacher = own["activation"] == "gelu"
        label = "a teacher: softmax + gelu" if teacher else f"{own['attention']} + {own['activation']}"
        look = {"color": "0.5" if teacher else colour(own["attention"]), "marker": "s" if teacher else "o"}
        axis.plot(own[field], 100 * own["score"], linestyle="", markersize=9, label=label, **look)
        if own["ci_low"] is not None:
            interval = [100 * (own["teacher_score"] + own[end]) for end in ("ci_low", "ci_high")]
            axis.plot([own[field]] * 2, interval, color=look["color"], linewidth=1)
    front = sorted((r for r in records if r[on_front]), key=lambda r: r[field])
    x, y = [r[field] for r in front], [100 * r["score"] for r in front]
    axis.step(x, y, where="post", color="0.6", zorder=0, label="none is as good in less time")
    log(axis.xaxis)
    axis.margins(x=0.15, y=0.2)


def benchmark(quick: bool) -> Benchmark:
    columns = ("model", "metric", "score", "bytes_sent_total", "rounds", "lan_seconds", "wan_seconds")
    return Benchmark("pareto", partial(jobs, quick), (columns,), finish, plots={"": plot})


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
