"""Every attention variant x protocol x length: the attention alone, 12 heads of size 64.

    python benchmarks/attention.py [--json] [--show] [--quick]

From queries, keys and values to the context, as a folded model runs it: heads as a grouped convolution, 1/sqrt(d) and
r_h folded away, and where a variant allows it also c, the mask and 1/n. Compiled with one reciprocal a row
(`shared_reciprocal`), as SPU's public scripts are. `error` is the largest distance of a context from the one in the
clear, of scores and values of unit size. "softmax, pade" is softmax with SPU's other exponential (`exp_mode`), which is
more exact. CHEETAH at 32 tokens only. About 10 minutes on 2 idle cores.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from harness import Benchmark, Options, Record, record
from style import colour, figure, log, titled
from variants import SHARED_RECIPROCAL, Workload

from flaxmpc import secure
from flaxmpc.nn.attention import ATTENTION, Attention, RowSum
from flaxmpc.nn.mask import Mask
from flaxmpc.nn.product import grouped_conv

HEADS, HEAD_SIZE = 12, 64
LENGTHS = {"ABY3": (32, 64, 128, 256, 512), "SEMI2K": (32, 64, 128, 256, 512), "CHEETAH": (32,)}
QUICK = {"ABY3": (4, 8)}


def workload(part: Attention, heads: int, length: int) -> Workload:
    """The part on random (1, head, token, depth): (scalars, queries, keys, values, mask) -> context."""
    folds = part.score_degree is not None
    scalars = part.fold(part.scalars(heads), heads).scalars
    # c is one more feature of a query where it folds.
    depth = HEAD_SIZE + (folds and "shift" in scalars)

    def context(scalars: Any, query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> jax.Array:
        if folds:
            return part.mix(query, key, value, mask, product=grouped_conv)
        return part(query, key, value, mask, scalars, product=grouped_conv)

    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, heads, length, size)) for size in (depth, depth, HEAD_SIZE))
    query = query / np.sqrt(depth)
    mask = jax.device_get(Mask.from_tokens(jnp.ones((1, length)), degree=part.score_degree))
    return Workload(context, jax.device_get(scalars), (query, key, value, mask))


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    heads = 2 if quick else HEADS
    for protocol, lengths in (QUICK if quick else LENGTHS).items():
        parties = {mode: secure.InProcess(protocol, exp_mode=mode) for mode in secure.EXP_MODES}
        cases = [(name, part, "taylor") for name, part in ATTENTION.items()]
        cases.insert(1, ("softmax, pade", ATTENTION["softmax"], "pade"))
        for length in lengths:
            for name, part, mode in cases:

                def measure(parties=parties[mode], length=length, name=name, part=part, mode=mode) -> Record:
                    work = workload(part, heads, length)
                    output, cost = work.run(parties)
                    return record(
                        cost, variant=name, num_tokens=length, num_heads=heads, head_size=HEAD_SIZE, exp_mode=mode,
                        shared_reciprocal=SHARED_RECIPROCAL,
                        error=float(np.abs(output - work.plain()).max()),
                    )  # fmt: skip

                yield f"{protocol}, {length} tokens, {name}", measure


def plot(records: list[Record]) -> Any:
    """Bytes, rounds and modelled WAN seconds against the length, of the protocols that have several."""
    protocols = [p for p in dict.fromkeys(r["protocol"] for r in records) if len(_lengths(records, p)) > 1]
    panels = {
        "bytes_sent_total": ("MB sent, all parties", 1e6),
        "rounds": ("rounds", 1),
        "wan_seconds": ("seconds, WAN (modelled)", 1),
    }
    made, axes = figure(len(protocols), len(panels), figsize=(11, 3.4 * len(protocols)), sharex=True)
    for row, protocol in zip(axes, protocols, strict=True):
        for axis, (field, (label, unit)) in zip(row, panels.items(), strict=True):
            for name in dict.fromkeys(r["variant"] for r in records):
                own = [r for r in records if r["protocol"] == protocol and r["variant"] == name]
                divides = isinstance(ATTENTION[name.split(",")[0]].normaliser, RowSum)
                line = {
                    "marker": "s" if divides else "o",
                    "linestyle": ":" if "pade" in name else "--" if divides else "-",
                }
                x, y = [r["num_tokens"] for r in own], [r[field] / unit for r in own]
                axis.plot(x, y, color=colour(name), label=name, **line)
            axis.set(ylabel=label, title=protocol)
            log(axis.xaxis)
            log(axis.yaxis)
            axis.set_xticks(_lengths(records, protocol))
    for axis in axes[-1]:
        axis.set(xlabel="tokens")
    handles, labels = axes[0][0].get_legend_handles_labels()
    title = "squares and broken lines divide by what depends on the text; circles do not"
    made.legend(handles, labels, loc="outside lower center", ncols=4, title=title)
    several = [record for record in records if record["protocol"] in protocols]
    heads, size = records[0]["num_heads"], records[0]["head_size"]
    return titled(made, f"Attention alone, {heads} heads of {size}", several)


def _lengths(records: list[Record], protocol: str) -> list[int]:
    return sorted({r["num_tokens"] for r in records if r["protocol"] == protocol})


def benchmark(quick: bool) -> Benchmark:
    columns = ("protocol", "num_tokens", "variant", "error", "bytes_sent_total", "rounds", "seconds", "lan_seconds",
               "wan_seconds")  # fmt: skip
    return Benchmark("attention", partial(jobs, quick), (columns,), plots={"": plot})


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
