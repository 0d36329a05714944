"""What it is worth to keep the first layers public, by how many: what a request costs, and which accuracy is left.

    python benchmarks/public_layers.py [--json] [--show] [--quick]

Public layers stay those of the published encoder, and the client computes them. The others are fine-tuned, secret and
on shares. With 0 none is public; with all 6 the head alone is secret. Costs are measured here: MiniLM-L6 with
2quad_freediv + quad, a linear head and random weights, a sentence of 16 tokens on ABY3, without a plan of bits.
Accuracies, each of one seed, are those that `train/movie.py teacher/public-K` and `2quad-freediv/public-K` leave in
models/*/runs/, and None where these were not run. A minute on 2 idle cores.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import tyro
from accuracy import ZOO
from harness import Benchmark, Options, Record, model_parties, record
from style import figure, titled
from variants import CHEBYSHEV_PARTS, ours

from flaxmpc.models.bert import preset

TEACHER, STUDENT = "movie-minilm-l6", "movie-minilm-l6-2quad-freediv"


def accuracy(entry: str, count: int) -> float | None:
    """Test accuracy of an entry of the zoo whose first `count` layers are public; None where it was not trained."""
    path = ZOO / entry / (f"runs/public-{count}.json" if count else "results.json")
    if not path.is_file():
        return None
    found = json.loads(path.read_text("utf-8"))
    return (found["results"] if count else found)["accuracy"]


def measure(count: int, shape: str, tokens: int) -> Record:
    size = preset(shape)
    public = {
        "num_hidden_layers": count,
        "num_attention_heads": size.num_attention_heads,
        "intermediate_size": size.intermediate_size,
        "hidden_act": "gelu",
    }
    rest = size.num_hidden_layers - count
    config = preset(
        shape,
        num_hidden_layers=rest,
        attention="2quad_freediv",
        hidden_act="quad",
        classifier_activation="identity",
        layer_norm=[CHEBYSHEV_PARTS] * rest,
        public_layers=public if count else None,
    )
    cost = ours(config, folded=True, batch=1, tokens=tokens).run(model_parties("ABY3")).cost
    return record(
        cost,
        public_layers=count,
        teacher_accuracy=accuracy(TEACHER, count),
        accuracy=accuracy(STUDENT, count),
        num_tokens=tokens,
    )


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    shape, tokens = ("tiny", 4) if quick else ("minilm-l6", 16)
    for count in range(preset(shape).num_hidden_layers + 1):
        yield f"{count} layers public", partial(measure, count, shape, tokens)


def plot(records: list[Record]) -> Any:
    """Accuracy and cost over the number of public layers."""
    made, axes = figure(1, 3, figsize=(12, 4))
    counts = [row["public_layers"] for row in records]
    for field, label, marker in (("teacher_accuracy", "teacher", "s--"), ("accuracy", "student on shares", "o-")):
        known = [row for row in records if row[field] is not None]
        x, y = [row["public_layers"] for row in known], [100 * row[field] for row in known]
        axes[0][0].plot(x, y, marker, label=label)
    axes[0][0].set(ylabel="test accuracy, %")
    axes[0][0].legend()
    axes[0][1].plot(counts, [row["bytes_sent_total"] / 1e6 for row in records], "o-", color="C2")
    axes[0][1].set(ylabel="MB of all parties", ylim=(0, None))
    axes[0][2].plot(counts, [row["rounds"] for row in records], "o-", color="C3")
    axes[0][2].set(ylabel="rounds", ylim=(0, None))
    for axis in axes[0]:
        axis.set(xlabel="first layers that are public", xticks=counts)
    return titled(made, "MiniLM-L6 on movie sentences, its first layers as they were published", records)


def benchmark(quick: bool) -> Benchmark:
    columns = ("public_layers", "teacher_accuracy", "accuracy", "bytes_sent_total", "rounds", "lan_seconds",
               "wan_seconds")  # fmt: skip
    return Benchmark("public_layers", partial(jobs, quick), (columns,), plots={"": plot})


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
