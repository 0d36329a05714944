"""Every activation, on 128 x 3072 numbers, and every normalisation, on 128 x 768: a BERT-Base layer's sizes.

    python benchmarks/parts.py [--json] [--show] [--quick]

A normalisation is measured as written, and as a folded model has it (`form`): only the division by the deviation is
left there. The Chebyshev parts are those of variants.py. About 3 minutes on 2 idle cores.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import tyro
from harness import Benchmark, Options, Record, model_parties, record, short
from style import figure, titled
from variants import AFTER_ATTENTION, AFTER_FEED_FORWARD, Workload

from flaxmpc.nn.activation import ACTIVATIONS
from flaxmpc.nn.layers import Norm
from flaxmpc.nn.lazy import square_mean_by_product
from flaxmpc.nn.normalization import EXACT, InverseRoot
from flaxmpc.nn.product import Product
from flaxmpc.serve.private import product_for

NORMALIZATIONS = {
    "layer_norm": EXACT,
    "layer_norm_chebyshev, after attention": AFTER_ATTENTION,
    "layer_norm_chebyshev, after feed-forward": AFTER_FEED_FORWARD,
}


def layer_norm(part: InverseRoot, hidden: int) -> Workload:
    """As written: (scale and bias, x) -> the normalised x."""
    module = Norm(part)
    weights = {"scale": np.ones(hidden, np.float32), "bias": np.zeros(hidden, np.float32)}
    return Workload(lambda weights, x: module.apply({"params": weights}, x), weights, ())


def divided(part: InverseRoot, product: Product) -> Workload:
    """Folded: what a layer has computed -> the same by its deviation."""
    return Workload(lambda _, c: c * part.inverse_root(square_mean_by_product(c, product)), None, ())


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    tokens, hidden, intermediate = (4, 16, 32) if quick else (128, 768, 3072)
    rng = np.random.default_rng(0)
    cases: list[tuple[str, str, str, int, Workload]] = [
        ("activation", name, "as written", intermediate, Workload(lambda _, x, act=act: act(x), None, ()))
        for name, act in ACTIVATIONS.items()
    ]
    for name, part in NORMALIZATIONS.items():
        cases.append(("normalisation", name, "as written", hidden, layer_norm(part, hidden)))
    for protocol in ("ABY3", "SEMI2K"):
        parties = model_parties(protocol)
        folded = [
            ("normalisation", name, "folded", hidden, divided(part, product_for(parties.config)))
            for name, part in NORMALIZATIONS.items()
        ]
        for kind, name, form, width, case in [*cases, *folded]:

            def measure(parties=parties, kind=kind, name=name, form=form, width=width, case=case) -> Record:
                cost = case._replace(inputs=(rng.normal(size=(tokens, width)),)).run(parties).cost
                return record(cost, variant=name, kind=kind, form=form, num_tokens=tokens, width=width)

            yield f"{protocol}, {name}, {form}", measure


def plot(records: list[Record]) -> Any:
    """MB and rounds of every part, ABY3."""
    own = [r for r in reversed(records) if r["protocol"] == "ABY3"]
    labels = [r["variant"] + (", folded" if r["form"] == "folded" else "") for r in own]
    sizes = {r["kind"]: f"{r['kind']}s of {r['num_tokens']} x {r['width']} numbers" for r in own}
    colours = dict(zip(sizes, ("C0", "C1"), strict=True))
    made, axes = figure(1, 3, figsize=(12, 5.6), sharey=True)
    panels = {
        "bytes_sent_total": ("MB sent, all parties", 1e6),
        "rounds": ("rounds", 1),
        "wan_seconds": ("seconds, WAN (modelled)", 1),
    }
    for axis, (field, (label, unit)) in zip(axes[0], panels.items(), strict=True):
        values = [r[field] / unit for r in own]
        bars = axis.barh(labels, values, color=[colours[r["kind"]] for r in own])
        axis.bar_label(bars, [short(value) for value in values], padding=3)
        axis.set(xlabel=label, xlim=(0, max(values) * 1.2))
        axis.grid(visible=False)
    for kind, size in sizes.items():
        axes[0][0].barh(0, 0, color=colours[kind], label=size)
    handles, names = axes[0][0].get_legend_handles_labels()
    made.legend(handles, names, loc="outside lower center", ncols=2)
    return titled(made, "Activations and normalisations of a BERT-Base layer", own)


def benchmark(quick: bool) -> Benchmark:
    columns = ("protocol", "variant", "form", "bytes_sent_total", "rounds", "seconds", "lan_seconds", "wan_seconds")
    return Benchmark("parts", partial(jobs, quick), (columns,), plots={"": plot})


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
