"""BERT-Base, 12 layers, 128 tokens, end to end: the unmodified Flax BERT, the published variants, and ours, on ABY3.

    python benchmarks/bert_base.py [--json] [--show] [--quick]

Embedding and head are included; weights are random, as the cost does not depend on them. flax_bert is transformers'
own model, as public scripts run such models on SPU: it looks its secret ids up in its secret table, a loop of about 130
rounds a token. In flax_bert_embedded, and in all others, the client embeds, see embedding.py for that. All are compiled
as those scripts are, with one reciprocal a row (`shared_reciprocal`). puma and secformer are the functions of these
papers in our encoder and on this protocol; SecFormer's own code runs on another one, and sends 526 MB a layer there.
2quad_freediv_planned is 2quad_freediv as a plan of bits says; the plan is made first, in some minutes.
Three repetitions, alternating, each in a fresh process; seconds are medians. Those that take minutes run
once. About 40 minutes on 2 idle cores.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import tyro
from harness import Benchmark, Options, Record, held, in_child, medians, model_parties, per_op, ratios, record, short
from style import colour, figure, log, titled
from variants import BASELINE, EMBEDDED, SHARED_RECIPROCAL, VARIANTS, Workload, workload

from flaxmpc import secure

NAMES = (BASELINE, EMBEDDED, *VARIANTS)
PLANNED = "2quad_freediv_planned"
REPETITIONS = 3
LONG = (BASELINE, EMBEDDED, "puma", "secformer")  # run once
TABLES = (
    ("variant", "bytes_sent_total", "rounds", "seconds", "lan_seconds", "wan_seconds", "bytes_per_layer",
     "rounds_per_layer"),
    ("variant", "time_ratio", "bytes_ratio", "rounds_ratio", "lan_ratio", "wan_ratio"),
    ("variant", "compile_seconds", "compile_cached_seconds", "peak_memory_bytes"),
)  # fmt: skip
FULL: dict[str, Any] = {"shape": "base", "layers": 12, "tokens": 128, "vocab_size": 30522}
QUICK: dict[str, Any] = {"shape": "tiny", "layers": 1, "tokens": 8, "vocab_size": 100}


def one_layer(size: dict[str, Any]) -> dict[str, Any]:
    return {**size, "layers": 1}


_Plans = dict[int, secure.BitPlan]
"""Plans of bits by the number of layers."""


def plan(size: dict[str, Any]) -> Record:
    """The plan of `PLANNED`'s bits, as a dict."""
    return workload(PLANNED, **size).plan().as_dict()


def work_of(variant: str, size: dict[str, Any], plans: _Plans) -> Workload:
    made = workload(variant, **size)
    return made.planned(plans[size["layers"]]) if variant == PLANNED else made


def measure(variant: str, size: dict[str, Any], layer_too: bool, plans: _Plans) -> Record:
    """One run, with compiled programs in a folder of its own."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FLAXMPC_CACHE"] = cache
        work = work_of(variant, size, plans)
        parties = model_parties("ABY3", fraction_bits=work.fraction_bits)
        weights = parties.put(work.weights)
        cost = (
            secure.jit(work.function, parties=parties, shared_reciprocal=SHARED_RECIPROCAL)
            .run(weights, *work.inputs)
            .cost
        )
        found = record(
            cost,
            variant=variant,
            num_tokens=size["tokens"],
            num_layers=size["layers"],
            shared_reciprocal=SHARED_RECIPROCAL,
        )
        found["embedding"] = "gather" if variant == BASELINE else "public"
        found["per_op"] = per_op(cost)

        jax.clear_caches()  # as a new process would: traced again, the code comes from disk
        start = time.perf_counter()
        secure.jit(work.function, parties=parties, shared_reciprocal=SHARED_RECIPROCAL).compile(weights, *work.inputs)
        found["compile_cached_seconds"] = time.perf_counter() - start
        weights.delete()

        if layer_too:  # what each layer after the first adds
            one = work_of(variant, one_layer(size), plans).run(parties).cost
            found["bytes_per_layer"] = (cost.bytes_sent - one.bytes_sent) / (size["layers"] - 1)
            found["rounds_per_layer"] = (cost.rounds - one.rounds) / (size["layers"] - 1)
        return found


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    import transformers

    size = QUICK if quick else FULL
    names = [*NAMES]
    if not hasattr(transformers, "FlaxBertForSequenceClassification"):
        print(f"transformers {transformers.__version__} has no Flax BERT: {BASELINE} is left out", file=sys.stderr)
        names = [*VARIANTS]
    print(f"the plan of {PLANNED} is made first{'' if quick else ', in about 8 minutes'}", file=sys.stderr)
    sizes = [size] if quick else [size, one_layer(size)]
    plans = {each["layers"]: secure.BitPlan.from_dict(in_child(plan, each)) for each in sizes}
    for repetition in range(1 if quick else REPETITIONS):
        for variant in names if repetition == 0 else (name for name in names if name not in LONG):
            yield (
                f"{variant}, repetition {repetition + 1}",
                partial(measure, variant, size, False, plans)
                if quick
                else partial(in_child, measure, variant, size, repetition == 0, plans),
            )


_TIMES = ("seconds", "lan_seconds", "wan_seconds", "compile_seconds", "compile_cached_seconds")


def finish(records: list[Record]) -> list[Record]:
    """A record a variant, with medians, and how many times less than the baseline it takes."""
    found: dict[str, Record] = {}
    for variant in NAMES:
        runs = [run for run in records if run["variant"] == variant]
        if not runs:
            continue
        peak = max(run["peak_memory_bytes"] for run in runs)
        found[variant] = medians(runs, _TIMES) | {"peak_memory_bytes": peak, "repetitions": len(runs)}
    base = found.get(BASELINE)
    return [own | ratios(base, own) for own in found.values()]


def notes(records: list[Record]) -> list[str]:
    """What the fastest variant must hold, on the full size."""
    by = {record["variant"]: record for record in records}
    if any(by[name]["num_layers"] < FULL["layers"] for name in by) or BASELINE not in by:
        return []
    own, puma, mpcformer = (by[name] for name in ("2quad_freediv", "puma", "mpcformer"))
    base = by[BASELINE]
    planned = by[PLANNED]
    lines = [
        held("against the unmodified Flax BERT, at least 5x less time", own["time_ratio"], least=5),
        held("20x fewer bytes", own["bytes_ratio"], least=20),
        held("7x fewer rounds", own["rounds_ratio"], least=7),
        held("7x fewer rounds in a layer, so without its embedding",
             base["rounds_per_layer"] / own["rounds_per_layer"], least=7),
        held("8x less time on the modelled WAN", own["wan_ratio"], least=8),
    ]  # fmt: skip
    for name, other, fewer in (("PUMA's parts", puma, 5), ("2quad + quad", mpcformer, 1.5)):
        times = {field: other[field] / own[field] for field in ("bytes_sent_total", "rounds", "seconds", "lan_seconds")}
        lines += [
            held(f"against {name}, {fewer}x fewer bytes", times["bytes_sent_total"], least=fewer),
            held(f"against {name}, 3x fewer rounds", times["rounds"], least=3),
            f"against {name}, {times['seconds']:.3g}x less time here, {times['lan_seconds']:.3g}x on the modelled LAN",
        ]
    if EMBEDDED in by:
        bytes_ratio, rounds_ratio = (by[EMBEDDED][field] / own[field] for field in ("bytes_sent_total", "rounds"))
        lines.append(
            f"against the unmodified Flax BERT whose client embeds, {bytes_ratio:.3g}x fewer bytes, "
            f"{rounds_ratio:.3g}x fewer rounds"
        )
    return [
        *lines,
        held("a layer, MB of all parties, at most 105", own["bytes_per_layer"] / 1e6, most=105),
        held("a layer, rounds, at most 85", own["rounds_per_layer"], most=85),
        held("peak memory of all parties, GB, at most 12", own["peak_memory_bytes"] / 1e9, most=12),
        held("compile the first time, seconds, at most 20", own["compile_seconds"], most=20),
        held("compile from the disk cache, seconds, at most 2", own["compile_cached_seconds"], most=2),
        held("with a plan of bits, MB of all parties, at most 750", planned["bytes_sent_total"] / 1e6, most=750),
        held("rounds, at most 560", planned["rounds"], most=560),
        held("a layer, MB, at most 66", planned["bytes_per_layer"] / 1e6, most=66),
        held("a layer, rounds, at most 43", planned["rounds_per_layer"], most=43),
        held("modelled WAN, seconds, at most 66", planned["wan_seconds"], most=66),
        held("time, of that without a plan, at most 1.05", planned["seconds"] / own["seconds"], most=1.05),
        held(
            "against 2quad + quad, 2.6x fewer bytes",
            mpcformer["bytes_sent_total"] / planned["bytes_sent_total"],
            least=2.6,
        ),
        held("5.5x fewer rounds", mpcformer["rounds"] / planned["rounds"], least=5.5),
    ]


# What operations do, by SPU's name of them.
_KINDS = {
    "matrix products": ("dot", "dot_general", "convolution"),
    "products": ("multiply", "power", "negate", "subtract", "add"),
    "inverse square roots": ("rsqrt", "sqrt"),
    "divisions": ("divide", "reciprocal"),
    "exponentials, tanh": ("exponential", "tanh", "log", "logistic", "sine", "cosine"),
    "comparisons": ("less", "greater", "less_equal", "greater_equal", "equal", "select", "maximum", "minimum", "abs",
                    "clamp", "reduce", "sign", "and", "or", "not", "convert"),
    "gather of secret ids": ("while",),
}  # fmt: skip


def shares(record: Record, field: str) -> dict[str, float]:
    """`field` of `per_op` by kind of operation; what is of no kind is "other"."""
    kinds = {f"pphlo.{name}": kind for kind, names in _KINDS.items() for name in names}
    found = dict.fromkeys([*_KINDS, "other"], 0.0)
    for name, op in record["per_op"].items():
        found[kinds.get(name, "other")] += op[field]
    return found


def plot_operations(records: list[Record]) -> Any:
    """Where seconds, bytes and rounds go, before and after: parts of each's own total."""
    by = {record["variant"]: record for record in records}
    rows = {"unmodified\n(flax_bert)": by.get(BASELINE), "ours\n(2quad_freediv)": by["2quad_freediv"]}
    rows = {label: found for label, found in reversed(rows.items()) if found is not None}
    panels = (("seconds", "compute", 1, "s"), ("bytes_sent", "bytes sent", 1e6, "MB"), ("rounds", "rounds", 1, ""))
    made, axes = figure(1, len(panels), figsize=(11, 3.6), sharey=True)
    for axis, (field, title, unit, symbol) in zip(axes[0], panels, strict=True):
        for y, found in enumerate(rows.values()):
            parts = shares(found, field)
            total, left = sum(parts.values()), 0.0
            for i, (kind, value) in enumerate(parts.items()):
                axis.barh(y, 100 * value / total, left=left, color=f"C{i}", label=kind if y == 0 else None)
                left += 100 * value / total
            axis.text(50, y + 0.43, f"{short(total / unit)} {symbol}".strip(), ha="center", va="bottom", weight="bold")
        axis.set(title=title, xlabel="% of the total above the bar", xlim=(0, 100), ylim=(-0.5, len(rows) - 0.25))
        axis.grid(visible=False)
    axes[0][0].set_yticks(range(len(rows)), rows)
    handles, labels = axes[0][0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=4)
    return titled(made, "BERT-Base: what takes the time, the bytes and the rounds", list(filter(None, by.values())))


# What the variants are called in figures.
_SHOWN = {
    "flax_bert": "unmodified (flax_bert)",
    "flax_bert_embedded": "unmodified, embedded by the client",
    "puma": "PUMA's functions",
    "mpcformer": "MPCFormer's (2quad + quad)",
    "secformer": "SecFormer's",
    "2quad_freediv": "ours: 2quad_freediv + quad",
    "2quad_freediv_planned": "ours: the same by a plan of bits",
    "softmax_freediv": "ours: softmax_freediv + quad",
}


def plot_variants(records: list[Record]) -> Any:
    """The variants side by side, on logarithmic axes: they differ by a factor of fifty."""
    panels = {
        "lan_seconds": ("LAN, modelled", "seconds", 1),
        "wan_seconds": ("WAN, modelled", "seconds", 1),
        "bytes_sent_total": ("sent, all parties", "GB", 1e9),
        "rounds": ("rounds", "rounds", 1),
    }
    made, axes = figure(1, len(panels), figsize=(12, 3.4), sharey=True)
    rows = list(reversed(records))
    for axis, (field, (title, unit, size)) in zip(axes[0], panels.items(), strict=True):
        for y, row in enumerate(rows):
            value = row[field] / size
            ours = _SHOWN[row["variant"]].startswith("ours")
            axis.plot(value, y, "o" if ours else "s", color=colour(row["variant"]))
            axis.annotate(short(value), (value, y), xytext=(8, 0), textcoords="offset points", va="center")
        log(axis.xaxis)
        axis.margins(x=0.3, y=0.08)
        axis.set(title=title, xlabel=f"{unit} (logarithmic)")
    axes[0][0].set_yticks(range(len(rows)), [_SHOWN[row["variant"]] for row in rows])
    return titled(made, "BERT-Base, 12 layers: circles are ours, squares are others' functions", records)


def benchmark(quick: bool) -> Benchmark:
    return Benchmark(
        "bert_base",
        lambda: jobs(quick),
        TABLES,
        finish,
        notes,
        {"variants": plot_variants, "operations": plot_operations},
    )


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
