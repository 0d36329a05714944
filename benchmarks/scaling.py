"""How the cost of our BERT grows with length, layers, batch and width, and the growth law fitted to it.

    python benchmarks/scaling.py [--json] [--show] [--quick]

2quad_freediv + quad, folded, heads of size 64, on ABY3; one of the four varies, the others stay at 128 tokens,
2 layers, 1 sentence, width 768. Head included, the client embeds. About 4 minutes on 2 idle cores.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import tyro
from harness import Benchmark, Options, Record, model_parties, record
from style import figure, titled
from variants import VARIANTS, ours

from flaxmpc import secure

BASE = {"length": 128, "layers": 2, "batch": 1, "width": 768}
# Each axis, its values, and the degree of the polynomial that bytes follow: attention is a square of the length; the
# matrices' bytes go with their results, so the width is linear.
AXES = {
    "length": ((16, 32, 64, 128, 256, 512), 2),
    "layers": ((1, 2, 3, 4, 6), 1),
    "batch": ((1, 2, 4, 8), 1),
    "width": ((256, 512, 768, 1024), 1),
}
QUICK = {"length": ((4, 8, 12), 2)}


def measure(axis: str, value: int, base: dict[str, int], parties: secure.Parties) -> Record:
    size = base | {axis: value}
    variant = VARIANTS["2quad_freediv"]
    config = variant.config(
        "base",
        size["layers"],
        vocab_size=100,
        hidden_size=size["width"],
        num_attention_heads=size["width"] // 64,
        intermediate_size=4 * size["width"],
    )
    cost = ours(config, folded=variant.folded, batch=size["batch"], tokens=size["length"]).run(parties).cost
    return record(
        cost, variant="2quad_freediv", axis=axis, value=value, num_tokens=size["length"], num_layers=size["layers"],
        batch_size=size["batch"], hidden_size=size["width"],
    )  # fmt: skip


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    parties = model_parties("ABY3")
    base = {"length": 8, "layers": 1, "batch": 1, "width": 64} if quick else BASE
    for axis, (values, _) in (QUICK if quick else AXES).items():
        for value in values:
            yield f"{axis} {value}", partial(measure, axis, value, base, parties)


FITTED = ("bytes_sent_total", "rounds", "seconds")


def finish(records: list[Record]) -> list[Record]:
    """With what was fitted along a record's axis.

    `*_exponent` is p of the power law ~ value^p (least squares of the logarithms); `bytes_polynomial` has the
    coefficients of the polynomial, lowest power first, and `bytes_polynomial_error` its largest relative error.
    """
    for axis in dict.fromkeys(r["axis"] for r in records):
        own = [r for r in records if r["axis"] == axis]
        x = np.array([r["value"] for r in own], float)
        fitted: Record = {}
        for field in FITTED:
            y = np.array([r[field] for r in own], float)
            fitted[f"{field}_exponent"] = float(np.polyfit(np.log(x), np.log(y), 1)[0])
        y = np.array([r["bytes_sent_total"] for r in own], float)
        # Relative errors count, so that short lengths weigh as much as long ones.
        coefficients = np.polyfit(x, y, AXES[axis][1], w=1.0 / y)
        fitted["bytes_polynomial"] = coefficients[::-1].tolist()
        fitted["bytes_polynomial_error"] = float(np.abs(np.polyval(coefficients, x) / y - 1).max())
        for r in own:
            r |= fitted
    return records


def notes(records: list[Record]) -> list[str]:
    lines = []
    for r in {r["axis"]: r for r in records}.values():
        terms = [f"{c / 1e6:.3g}" + f" {r['axis']}^{k}" * (k > 0) for k, c in enumerate(r["bytes_polynomial"])]
        powers = ", ".join(f"{field.split('_')[0]} ~ {r['axis']}^{r[f'{field}_exponent']:.2f}" for field in FITTED)
        error = r["bytes_polynomial_error"]
        lines.append(f"{r['axis']}: {powers}; MB = {' + '.join(terms)} (within {error:.1%})")
    return lines


def plot(records: list[Record]) -> Any:
    names = list(dict.fromkeys(r["axis"] for r in records))
    made, axes = figure(2, len(names), figsize=(3.2 * len(names), 5.4))
    for name, (top, bottom) in zip(names, axes.T, strict=True):
        own = [r for r in records if r["axis"] == name]
        x = [r["value"] for r in own]
        grid = np.linspace(min(x), max(x), 100)
        fit = own[0]["bytes_polynomial"]
        top.plot(grid, np.polyval(fit[::-1], grid) / 1e6, color="0.6", label="fit: the polynomial above")
        top.plot(x, [r["bytes_sent_total"] / 1e6 for r in own], "o", label="measured")
        bottom.plot(x, [r["rounds"] for r in own], "o")
        letter = "n" if name == "length" else name[0]
        powers = ("", f" {letter}", f" {letter}\u00b2")
        terms = [f"{c / 1e6:.3g}{power}" for c, power in zip(fit, powers, strict=False)]
        top.set(title=f"MB = {' + '.join(terms)}")
        bottom.set(xlabel=f"{_LABELS[name]} ({letter})")
        for axis in (top, bottom):
            axis.set_ylim(0, 1.1 * axis.dataLim.y1)
    axes[0][0].set(ylabel="MB sent, all parties")
    axes[1][0].set(ylabel="rounds")
    axes[0][0].legend()
    what = (
        f"{records[0]['variant']}: a BERT of 2 layers of width 768, one text of 128 tokens, and one of these at a time"
    )
    return titled(made, what, records)


_LABELS = {"length": "tokens", "layers": "layers", "batch": "sentences", "width": "hidden size"}


def benchmark(quick: bool) -> Benchmark:
    columns = ("axis", "value", "bytes_sent_total", "rounds", "seconds", "lan_seconds", "wan_seconds")
    return Benchmark("scaling", partial(jobs, quick), (columns,), finish, notes, {"": plot})


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
